"""The contenders of a case compute the same thing: a ratio of different things means nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.cases import DIRECTIONS, PARTS, Case, is_quick
from benchmarks.contenders import against_one_thread, against_others, against_softmax
from benchmarks.patterns import NAMES, pattern, visible_pairs
from benchmarks.variants import MORE_WORK, VARIANTS
from tests.part import part_of


def assert_agreement(contenders) -> None:
    results = {name: contender.run() for name, contender in contenders.items()}
    for name, result in results.items():
        torch.testing.assert_close(result, results["ours"], atol=2e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("name", NAMES)
def test_contenders_of_the_table_agree(name: str, direction: str):
    contenders = against_others(Case("table", name, "float32", direction, 600, 600, 16), with_flex=False)
    assert set(contenders) == {"ours", "sdpa", "eager"} - ({"sdpa"} if name == "soft-cap" else set())
    assert_agreement(contenders)


def test_backward_can_be_repeated_and_is_the_same_gradient():
    case = Case("table", "causal", "float32", "backward", 100, 100, 16)
    torch.manual_seed(3)
    alone = against_others(case, with_flex=False)["ours"].run
    torch.manual_seed(3)
    both = against_others(replace(case, direction="forward+backward"), with_flex=False)["ours"].run
    for _ in range(2):
        torch.testing.assert_close(alone(), both(), atol=0, rtol=0)


@pytest.mark.parametrize("queries", [1, 4])
@pytest.mark.parametrize("heads, kv_heads", [(8, 8), (32, 8), (32, 4)])
def test_contenders_of_decode_agree(queries: int, heads: int, kv_heads: int):
    case = Case("decode", "full", "float32", "forward", queries, 500, 64, heads, kv_heads)
    contenders = against_others(case, with_flex=False)
    assert set(contenders) == {"ours", "sdpa"}
    assert_agreement(contenders)


# Backward compiles a forward pass as well: alone, it is fast in two.
@pytest.mark.parametrize(
    ("name", "direction"),
    part_of(lambda n, d: d == "backward" or n in ("relu", "pair bias (S, S)"), VARIANTS, DIRECTIONS[:2]),
)
def test_variants_run_with_the_gradients_of_what_they_learn(name: str, direction: str):
    contenders = against_softmax(Case("mods", name, "float32", direction, 70, 70))
    assert set(contenders) == {"ours", "softmax"}
    plain, varied = contenders["softmax"].run(), contenders["ours"].run()
    if direction == "backward":
        assert isinstance(plain, tuple)
        assert isinstance(varied, tuple)
        learned = len(VARIANTS[name](70, 8).learned)
        assert len(varied) == len(plain) + learned == 3 + learned
        assert all(bool(gradient.abs().sum() > 0) for gradient in varied)
    assert name in MORE_WORK


def test_one_thread_is_one_thread():
    before = torch.get_num_threads()
    contenders = against_one_thread(Case("threads", "full", "float32", "forward", 64, 64), most=2)
    counts = {}
    try:
        for name, contender in contenders.items():
            assert contender.prepare is not None
            contender.prepare()
            counts[name] = torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
    assert counts == {"ours": 2, "one thread": 1}


@pytest.mark.parametrize("name", NAMES)
def test_operations_count_the_visible_pairs(name: str):
    index = torch.arange(700)
    mask = pattern(name, 700).mask_mod
    expected = 700 * 700 if mask is None else int(mask(0, 0, index[:, None], index[None, :]).sum())
    assert visible_pairs(name, 700, 700) == expected
    assert Case("table", name, "float32", "backward", 700, 700, 16).flops == 10 * 8 * 16 * expected


def test_the_cases_are_what_the_targets_are_stated_for():
    cases = {name: list(part.cases()) for name, part in PARTS.items()}
    everything = [case for part in cases.values() for case in part]
    assert len(set(everything)) == len(everything)
    assert len(cases["table-1024"]) == 7 * 2 * 2 * 3
    assert len(cases["decode"]) == 3 * 4 * 3 * 3 * 2
    assert {case.part for case in everything if is_quick(case)} == {
        "table", "share", "decode", "mods", "small", "threads",
    }  # fmt: skip

"""The GPU checks themselves, in small sizes through the interpreter; and each of them fails when it should."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from attn_engine.gpu_check import checks
from attn_engine.gpu_check.cases import Case, Sizes
from attn_engine.gpu_check.catalogue import CHECKS, RAGGED, SPARSE, Check
from attn_engine.gpu_check.checks import (
    KINDS,
    Failed,
    Place,
    attend,
    engine_of,
    numbers,
    options_of,
    refused,
    repeated,
)
from attn_engine.gpu_check.dense import EXACT, dense, kept_rows, straightforward
from attn_engine.gpu_check.given import LAYOUTS, Given, draw
from attn_engine.gpu_check.programs import program_of
from attn_engine.runtime import triton_launch

INTERPRETER = Place("triton-interpreter", "cpu", small=True)
TILES = Place(
    "torch", "cpu", small=True
)  # the same kernels carried out by torch: quick, for what is about the checks
QUICK = (
    Case(RAGGED, mask="empty rows", layout="surrounded"),
    Case(RAGGED, dtype="float32", score="alibi", mask="causal", layout="odd"),
    Case(Sizes(1, 64, 8, 2**18 + 9, 24, 128, 128), sampled=True),
)
PACKED_BLOCKS = SPARSE[1]
CAUSAL = Case(RAGGED, mask="causal")


@pytest.mark.parametrize("case", QUICK, ids=str)
def test_kernels_pass(case: Case) -> None:
    assert "o " in numbers(case, INTERPRETER)


@pytest.mark.parametrize(
    "check",
    [pytest.param(c, marks=() if c is PACKED_BLOCKS else pytest.mark.slow) for c in SPARSE],
    ids=lambda c: c.name,
)
def test_sequences_and_blocks_pass(check: Check) -> None:
    assert "dk " in numbers(check.case, TILES)


def test_programs_compiled_ahead_of_time_are_those_of_calls() -> None:
    by_name = {(c.case.blocks, bool(c.case.lengths)): program_of(c.case.small()) for c in SPARSE[:4]}
    assert by_name["", True].sequences is not None and by_name["", True].listed is None
    both, blocks, tokens = by_name["2D", True], by_name["2D", False], by_name["per token", False]
    assert both.sequences is not None and both.listed is not None and both.listed.tested
    assert blocks.sequences is None and blocks.listed is not None and blocks.listed.parts == (0, 0)
    assert tokens.listed is not None and tokens.listed.group > 1


@pytest.mark.parametrize("change", ["a row of the next sequence", "a block that is not given"])
def test_a_pair_too_many_is_seen(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = PACKED_BLOCKS.case

    def other(case: Case, given: Given, backend: str) -> dict[str, Tensor]:
        blocks = given.tensors["blocks"].clone()
        lengths = case.lengths
        if change == "a row of the next sequence":
            lengths = (lengths[0] + 1, lengths[1] - 1, *lengths[2:])
        else:
            blocks[0, 0, 0, 0] = ~blocks[0, 0, 0, 0]
        return attend(replace(case, lengths=lengths), replace(given, tensors={"blocks": blocks}), backend)

    monkeypatch.setattr(checks, "attend", other)
    with pytest.raises(Failed, match="mean error"):
        numbers(case, TILES)


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.name)
def test_every_check_passes(check: Check) -> None:
    KINDS[check.kind](check.case, INTERPRETER)


def test_the_same_bits() -> None:
    assert "three times" in repeated(CAUSAL, TILES)


def test_mistakes_about_devices_are_named() -> None:
    assert "3 mistakes" in refused(CAUSAL, INTERPRETER)


# -- poisoned results


def poisoned(monkeypatch: pytest.MonkeyPatch, name: str, change: Any) -> None:
    """From now on the engine's result `name` is changed before it is looked at."""

    def changed(case: Case, given: Given, backend: str) -> dict[str, Tensor]:
        found = attend(case, given, backend)
        return {**found, name: change(found[name].clone())}

    monkeypatch.setattr(checks, "attend", changed)


def one_element(to: float) -> Any:
    def change(x: Tensor) -> Tensor:
        x.view(-1)[x.numel() // 2] = to
        return x

    return change


@pytest.mark.parametrize("name", ["o", "dq", "dk", "dv", "lse", "d slopes"])
def test_one_element_that_was_not_written(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    poisoned(monkeypatch, name, one_element(float("nan")))
    with pytest.raises(Failed, match=f"{name}: mean error nan"):
        numbers(replace(CAUSAL, score="alibi"), TILES)


@pytest.mark.parametrize("name", ["o", "dq", "dk", "dv"])
def test_one_wrong_element_among_many(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    poisoned(monkeypatch, name, one_element(9.0))
    with pytest.raises(Failed, match=f"{name}: mean error"):
        numbers(CAUSAL, TILES)


@pytest.mark.parametrize("name", ["o", "dq", "dk", "dv"])
def test_errors_that_are_all_a_little_too_large(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    poisoned(monkeypatch, name, lambda x: x * (1 + 2**-6))
    with pytest.raises(Failed, match=f"{name}: mean error"):
        numbers(CAUSAL, TILES)


def test_a_row_that_sees_nothing_must_be_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    def a_little(x: Tensor) -> Tensor:
        x[..., 0, 0] += 0.25
        return x

    poisoned(monkeypatch, "o", a_little)
    with pytest.raises(Failed, match="o: mean error"):
        numbers(Case(RAGGED, mask="empty rows"), TILES)


def test_a_write_beside_the_output(monkeypatch: pytest.MonkeyPatch) -> None:
    def beyond(case: Case, given: Given, backend: str) -> dict[str, Tensor]:
        found = attend(case, given, backend)
        found["dk"].as_strided((1,), (1,), found["dk"].storage_offset() - 1).zero_()
        return found

    monkeypatch.setattr(checks, "attend", beyond)
    with pytest.raises(Failed, match="bytes beside what was allocated"):
        numbers(CAUSAL, TILES)


def test_a_read_beside_the_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies around a surrounded input is NaN: a kernel that lets it in gives NaN."""

    def beyond(case: Case, given: Given, backend: str) -> dict[str, Tensor]:
        k = given.k.as_strided(given.k.shape, given.k.stride(), given.k.storage_offset() - 1)
        return attend(case, replace(given, k=k), backend)

    monkeypatch.setattr(checks, "attend", beyond)
    with pytest.raises(Failed, match="o: mean error nan"):
        numbers(replace(CAUSAL, layout="surrounded"), TILES)


def test_other_bits_in_another_run(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[int] = []

    def drifting(case: Case, given: Given, backend: str) -> dict[str, Tensor]:
        runs.append(1)
        found = attend(case, given, backend)
        return {**found, "dq": found["dq"] * (1 if len(runs) < 3 else 1 + 2**-7)}

    monkeypatch.setattr(checks, "attend", drifting)
    with pytest.raises(Failed, match="other bits of dq"):
        repeated(CAUSAL, TILES)


def test_a_device_mismatch_that_is_not_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def accepting(case: Case, tensors: object, backend: str) -> Any:
        return lambda q, k, v: q

    monkeypatch.setattr(checks, "engine_of", accepting)
    with pytest.raises(Failed, match="k elsewhere was accepted"):
        refused(CAUSAL, TILES)


# -- what the numbers are compared with


@pytest.mark.parametrize(
    "case", {str(c.case.small()): c.case.small() for c in CHECKS if not c.case.listed}.values(), ids=str
)
def test_formulas_are_those_of_the_reference(case: Case) -> None:
    """The dense formulas share no code with the compiler, and agree with its reference in float64."""
    case = replace(case, gradients=False, layout="contiguous", dtype="float64", sampled=False)
    given = draw(case, "cpu")
    engine = engine_of(case, given.tensors, "reference")
    options = options_of(case, given.tensors, given.q.device)
    inputs = (x[0] if case.lengths else x for x in (given.q, given.k, given.v))
    want = engine.reference(*inputs, **options)
    assert isinstance(want, Tensor)
    want = want[None] if case.lengths else want
    torch.testing.assert_close(dense(case, given, EXACT)["o"], want, rtol=1e-9, atol=1e-9)


def test_rows_in_pieces_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    case = replace(CAUSAL, score="alibi").small()
    given = draw(case, "cpu")
    whole = dense(case, given, EXACT)
    monkeypatch.setattr("attn_engine.gpu_check.dense.BYTES_OF_SCORES", 50_000)
    for name, x in dense(case, given, EXACT).items():
        torch.testing.assert_close(x, whole[name], rtol=1e-12, atol=1e-12, msg=name)
    kept = kept_rows(replace(case, sampled=True), "cpu")
    assert kept is not None
    torch.testing.assert_close(dense(case, given, EXACT, kept)["dq"], whole["dq"][:, :, kept])


def test_straightforward_code_rounds() -> None:
    given = draw(CAUSAL.small(), "cpu")
    plain = dense(CAUSAL.small(), given, straightforward(torch.bfloat16))
    exact = dense(CAUSAL.small(), given, EXACT)
    assert plain["o"].dtype is torch.bfloat16
    assert 1e-4 < (plain["o"].double() - exact["o"]).abs().mean() < 1e-2


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_hold_the_same_numbers(layout: str) -> None:
    case = replace(CAUSAL, score="alibi").small()
    plain, laid = draw(case, "cpu"), draw(replace(case, layout=layout), "cpu", far=3000)
    assert laid.q.shape == plain.q.shape
    assert torch.isfinite(laid.q).all()
    again = draw(replace(case, layout=layout), "cpu", far=3000)
    assert torch.equal(laid.k, again.k), "the numbers depend on the case alone"


def test_distant_layouts_need_more_than_32_bits() -> None:
    for check in (c for c in CHECKS if c.heavy and c.case.layout != "contiguous"):
        sizes = check.case.sizes
        x = torch.empty(sizes.batches, sizes.heads, sizes.q_len, sizes.dim, device="meta")
        laid = LAYOUTS[check.case.layout](x, 2**31 + 64)
        within_a_head = laid.stride(2) * (sizes.q_len - 1)
        assert max(laid.stride(0) * (sizes.batches - 1), within_a_head) > 2**31
    (sampled,) = (c.case.sizes for c in CHECKS if c.case.sampled)
    assert sampled.heads * sampled.q_len * sampled.dim > 2**31


# Documents and lists are read on the host, which a tensor without data cannot serve.
ON_NO_DEVICE = [  # the host looks at what documents, lists, blocks and places hold
    c.case.small()
    for c in CHECKS
    if c.kind == "numbers" and "doc" not in c.case.mask and not c.case.listed and c not in SPARSE
]


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=[] if i % 6 == 2 else pytest.mark.slow) for i, c in enumerate(ON_NO_DEVICE)],
    ids=str,
)
def test_no_step_around_a_launch_leaves_the_device(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything but the launches, on a device that computes nothing: torch refuses to mix it with the CPU."""
    launched: list[str] = []

    def launch(self: Any, grid: object, args: list[Any]) -> None:
        devices = {x.device.type for x in args if isinstance(x, Tensor)}
        launched.append(f"{self.name} {devices}")

    def on_any_device(case: Case, tensors: Any, backend: str) -> Any:
        engine = engine_of(case, tensors, backend)
        engine._checks.device = None
        return engine

    monkeypatch.setattr(triton_launch.TritonKernel, "_run", launch)
    monkeypatch.setattr(checks, "engine_of", on_any_device)
    given = draw(case, "meta")
    assert {x.device.type for x in dense(case, given, straightforward(torch.bfloat16)).values()} == {"meta"}
    found = attend(case, given, "triton")
    assert {x.device.type for x in found.values()} == {"meta"}
    assert launched
    assert all(x.endswith("{'meta'}") for x in launched), launched

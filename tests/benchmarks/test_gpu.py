"""The GPU benchmark, tried on the CPU in tiny sizes: its cases, who takes part and what they compute, its page."""

from __future__ import annotations

import json
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend

from benchmarks import gpu, gpu_measure, gpu_report, gpu_sparse
from benchmarks.gpu_cases import (
    DIRECTIONS,
    HEADS,
    LENGTHS,
    PATTERNS,
    GpuCase,
    attention,
    is_quick,
    pairs,
    table,
)
from benchmarks.gpu_contenders import PEERS, Cannot, dense, fla, flash, flashinfer, flex, ours, sdpa, tensors
from benchmarks.gpu_measure import Functions, GpuOutcome, Timer, difference, matmul_rate, measure
from benchmarks.gpu_targets import goals_of
from benchmarks.results import Results, load

TINY = GpuCase("causal", "forward", 96, 16, 4, 2, dtype="float32")
LONG = replace(TINY, length=1100, heads=2, kv_heads=1)
GOAL = GpuCase("causal", "backward", 8192)


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here is about how long something takes."""
    monkeypatch.setattr(gpu_measure, "MOST_ROUNDS", 1)
    monkeypatch.setattr(gpu_measure, "FEWEST_ROUNDS", 1)
    monkeypatch.setattr(torch.compiler, "reset", lambda: None)
    monkeypatch.setattr("benchmarks.gpu_measure.gc.collect", lambda: 0)


def maker(backend: str) -> Any:
    return ours(backend)


# -- cases


def test_every_case_is_there_once() -> None:
    cases = list(table())
    assert (
        len(cases)
        == len(set(cases))
        == (len(PATTERNS) * len(LENGTHS) * len(HEADS) * 2 + len(gpu_sparse.PATTERNS)) * 2
    )
    assert {(c.length, c.heads, c.dim) for c in cases[:18]} == {(8192, 64, 128)}, "the goals come first"
    assert [c.direction for c in cases[:2]] == list(DIRECTIONS)
    assert sum(is_quick(c) for c in cases) == 20


@pytest.mark.parametrize("name", PATTERNS)
def test_pairs_are_those_of_the_mask(name: str) -> None:
    case = replace(TINY, pattern=name, length=1100)
    mask_mod = attention(case, "cpu").mask_mod
    q_idx, kv_idx = torch.arange(1100)[:, None], torch.arange(1100)[None, :]
    counted = 1100**2 if mask_mod is None else int(mask_mod(0, 0, q_idx, kv_idx).sum())
    assert pairs(name, 1100) == counted


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=() if n in ("packed", "hash 16") else pytest.mark.slow)
        for n in gpu_sparse.PATTERNS
    ],
)
def test_pairs_and_peers_of_sparse_patterns(name: str) -> None:
    case = replace(TINY, pattern=name, length=1100, direction="backward")
    mask_mod = attention(case, "cpu").mask_mod
    assert mask_mod is not None
    h, q_idx, kv_idx = torch.arange(4)[:, None, None], torch.arange(1100)[:, None], torch.arange(1100)
    counted = float(mask_mod(0, h, q_idx, kv_idx).expand(4, 1100, 1100).sum()) / 4
    assert gpu_sparse.pairs(name, 1100, 4, 2) == pytest.approx(counted, rel=1e-5)
    assert case.flops == pytest.approx(10 * case.heads * case.dim * counted, rel=1e-5)
    small = replace(case, length=200)
    found = results({"SDPA": sdpa(SDPBackend.MATH), "ours": maker("torch")}, small)
    assert set(found.seconds) == {"SDPA", "ours"}, found.left_out


def test_operations() -> None:
    assert GOAL.flops == 10 * 64 * 128 * 8192 * 8193 / 2
    assert replace(GOAL, direction="forward", pattern="full").flops == 4 * 64 * 128 * 8192**2


def test_goals() -> None:
    assert [(g.of, g.bound) for g in goals_of(GOAL)] == [("TFLOP/s", 400), ("over flex", 1.4)]
    assert [g.bound for g in goals_of(replace(GOAL, direction="forward"))] == [520, 1.0]
    assert [g.bound for g in goals_of(replace(GOAL, pattern="causal documents"))] == [260, 1.4]
    assert [g.bound for g in goals_of(replace(GOAL, pattern="alibi"))] == [1.0]
    assert [g.bound for g in goals_of(replace(GOAL, length=4096))] == [1.4]


# -- contenders


def results(makers: dict[str, Any], case: GpuCase) -> GpuOutcome:
    return measure(case, makers, Functions(makers, "cpu"), Timer("cpu"))


@pytest.mark.parametrize("name", PATTERNS)
def test_peers_compute_the_same(name: str) -> None:
    """A contender that computes something else would be left out: that nobody is says that all agree."""
    makers = {"SDPA": sdpa(SDPBackend.MATH), "dense": dense, "ours": maker("torch")}
    for direction in DIRECTIONS:
        case = replace(TINY, pattern=name, direction=direction, length=130)
        found = results(makers, case)
        with_sdpa = name not in ("soft-cap", "sigmoid", "relu", "retention")
        with_dense = name in ("sigmoid", "relu", "retention")
        expected = {"ours"} | ({"SDPA"} if with_sdpa else set()) | ({"dense"} if with_dense else set())
        assert set(found.seconds) == expected, found.left_out


def test_a_contender_that_computes_something_else_is_left_out() -> None:
    def wrong(case: GpuCase, a: Any, device: str) -> Any:
        return lambda q, k, v: q * 2

    found = results(
        {"SDPA": sdpa(SDPBackend.MATH), "wrong": lambda *_: wrong(*_), "ours": maker("torch")}, TINY
    )
    assert set(found.seconds) == {"SDPA", "ours"}
    assert "differs from that of SDPA" in found.left_out["wrong"]


def test_why_a_contender_is_left_out() -> None:
    found = results({"flash-attn": flash("flash_attn"), "ours": maker("no such")}, TINY)
    assert "flash_attn is not installed" in found.left_out["flash-attn"]
    assert "UnknownBackend" in found.left_out["ours"]
    assert found.seconds == {}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["causal", "causal documents", "alibi"])
def test_flex_computes_the_same(name: str) -> None:
    found = results({"flex": flex(None), "ours": maker("torch")}, replace(TINY, pattern=name, length=130))
    assert set(found.seconds) == {"flex", "ours"}, found.left_out


def attend(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int = -1, cap: float = 0.0, slopes: Any = None
) -> Tensor:
    """What a library computes: (batch, length, heads, dim)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    score = q @ k.mT * q.shape[-1] ** -0.5
    off = torch.arange(q.shape[2])[:, None] - torch.arange(k.shape[2])
    score = cap * torch.tanh(score / cap) if cap else score
    score = score if slopes is None else score - slopes[:, None, None] * off
    hidden = (off < 0) & torch.tensor(causal) | (off > window) & torch.tensor(window >= 0)
    return (torch.softmax(score.masked_fill(hidden, -torch.inf), -1) @ v).transpose(1, 2)


def packed(q: Tensor, k: Tensor, v: Tensor, ends: Tensor) -> Tensor:
    """Causal attention within each stretch of packed (tokens, heads, dim)."""
    parts = zip(ends.tolist()[:-1], ends.tolist()[1:], strict=True)
    return torch.cat([attend(q[None, a:b], k[None, a:b], v[None, a:b], True)[0] for a, b in parts])


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins with the signatures of the libraries."""

    def flash_attn_func(q, k, v, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None):
        return attend(q, k, v, causal, window_size[0], softcap, alibi_slopes)

    def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal=False):
        assert causal
        assert int(cu_seqlens_k.diff().max()) == max_seqlen_q == max_seqlen_k
        assert cu_seqlens_q.dtype is torch.int32
        return packed(q, k, v, cu_seqlens_q)

    def third(q, k, v, causal=False, window_size=(-1, -1), softcap=0.0):
        return attend(q, k, v, causal, window_size[0], softcap), None

    def prefill(q, k, v, causal=False, window_left=-1, logits_soft_cap=0.0):
        assert q.is_contiguous()
        return attend(q[None], k[None], v[None], causal, window_left, logits_soft_cap)[0]

    def parallel_attn(q, k, v, scale, cu_seqlens=None):
        ends = torch.tensor([0, q.shape[1]]) if cu_seqlens is None else cu_seqlens
        return packed(q[0], k[0], v[0], ends)[None]

    modules = {
        "flash_attn": {"flash_attn_func": flash_attn_func, "flash_attn_varlen_func": flash_attn_varlen_func},
        "flash_attn_interface": {"flash_attn_func": third, "flash_attn_varlen_func": flash_attn_varlen_func},
        "flashinfer": {"single_prefill_with_kv_cache": prefill},
        "fla": {}, "fla.ops": {}, "fla.ops.attn": {}, "fla.ops.attn.parallel": {"parallel_attn": parallel_attn},
    }  # fmt: skip
    for name, members in modules.items():
        module = types.ModuleType(name)
        module.__dict__.update(members)
        monkeypatch.setitem(sys.modules, name, module)


KNOWS: dict[str, tuple[Any, set[str]]] = {
    "flash-attn": (
        flash("flash_attn"),
        {"full", "causal", "causal documents", "window 1024", "soft-cap", "alibi"},
    ),
    "FA3": (flash("flash_attn_interface"), {"full", "causal", "causal documents", "window 1024", "soft-cap"}),
    "FlashInfer": (flashinfer, {"full", "causal", "window 1024", "soft-cap"}),
    "fla": (fla, {"causal", "causal documents"}),
}


@pytest.mark.parametrize("library", KNOWS)
def test_libraries_are_called_as_their_signatures_say(library: str, libraries: None) -> None:
    make, known = KNOWS[library]
    for name in PATTERNS:
        long = "1024" in name
        for batches, direction in ((1, "backward"), (2, "backward")) + (
            ((1, "forward"),) if library == "FlashInfer" else ()
        ):
            if long and batches == 2:
                continue
            size = LONG if long else TINY
            case = replace(size, pattern=name, direction=direction, batches=batches)
            found = results({"ours": maker("reference"), library: make}, case)
            fits = library not in ("FlashInfer", "fla") or (
                batches == 1 and (library, direction) != ("FlashInfer", "backward")
            )
            assert (library in found.seconds) == (name in known and fits), (case, found.left_out)


def test_functions_are_made_once_for_both_directions() -> None:
    made: list[str] = []

    def make(case: GpuCase, a: Any, device: str) -> Any:
        made.append(str(case))
        return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    functions = Functions({"x": make}, "cpu")
    for case in (TINY, replace(TINY, direction="backward"), replace(TINY, length=80)):
        measure(case, {"x": make}, functions, Timer("cpu"))
    assert len(made) == 2


def test_differences() -> None:
    x = torch.randn(100)
    assert difference(x, x) == 0
    assert difference(x * 1.5, x) == pytest.approx(0.5)
    assert difference(x * torch.nan, x) == float("inf")


def test_a_rate_of_products() -> None:
    assert matmul_rate(Timer("cpu"), (64,)) > 1e6


# -- a run and its page


def test_a_run_that_is_cut_off_loses_nothing_and_goes_on(tmp_path: Path) -> None:
    cases = [TINY, replace(TINY, direction="backward"), replace(TINY, pattern="full")]
    makers = {"SDPA, flash": sdpa(SDPBackend.MATH), "ours, triton": maker("torch")}
    path = tmp_path / "gpu.json"
    machine = {"date": "2026-11-21", "device": "a CPU", "matmul rate": 1e11}
    assert not gpu.measure_all(cases, makers, Results(machine), path, minutes=-1, device="cpu")
    assert not path.exists()
    assert gpu.measure_all(cases[:2], makers, Results(machine), path, minutes=5, device="cpu")
    kept = load(path)
    assert [kept.has(case) for case in cases] == [True, True, False]
    missing = [case for case in cases if not kept.has(case)]
    assert gpu.measure_all(missing, makers, kept, path, minutes=5, device="cpu")
    assert len(load(path).entries) == 3
    assert "| full | 96 | 16 | 4:2 | 1 |" in path.with_suffix(".md").read_text()


def entry(case: GpuCase, **tflops: float) -> Results:
    seconds = {name.replace("_", ", "): case.flops / x / 1e12 for name, x in tflops.items()}
    found = Results({"date": "2026-11-21", "matmul rate": 800e12})
    found.add(case, GpuOutcome({n: [x, x, x] for n, x in seconds.items()}, {"fla": "not | there"}))
    return found


def test_goals_on_the_page() -> None:
    page = gpu_report.markdown(entry(GOAL, ours_triton=390, ours_tilelang=410, flex=300, FA3=520))
    assert (
        "| causal | 8192 | 128 | 64:8 | 1 | 410 ✓ | tilelang | 0.51 | 520 (FA3) | 0.79 | 300 (flex) | 1.37 ✗ ≥ 1.4 |"
        in page
    )
    assert "| TFLOP/s | 1 | 1 |" in page
    assert "| over flex | 0 | 1 |" in page
    assert "| fla | not \\| there | 1 |" in page


def test_a_page_without_ours_or_without_peers() -> None:
    assert "| - | - | - | 300 (flex) | - | 300 (flex) | - |" in gpu_report.markdown(entry(GOAL, flex=300))
    page = gpu_report.markdown(entry(GOAL, ours_triton=390))
    assert "| 390 ✗ ≥ 400 | triton | 0.49 | - | - | - | - |" in page


def test_without_a_gpu_nothing_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--output", str(tmp_path / "x.json")]) == 0
    assert "nothing to measure" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_the_command_chooses(tmp_path: Path) -> None:
    assert "flex, max-autotune" not in gpu.contenders(gpu.parse(["--quick"]))
    assert "flex, max-autotune" in gpu.contenders(gpu.parse([]))
    assert list(gpu.contenders(gpu.parse([])))[: len(PEERS)] == list(PEERS), "peers are what is compared with"
    assert len(gpu.selected(gpu.parse(["--only", "^causal S=8192 D=128 H=64"]))) == 2
    assert gpu_report.main([str(tmp_path / "missing.json")]) == 1
    file = tmp_path / "x.json"
    entry(GOAL, ours_triton=390).save(file)
    assert gpu_report.main([str(file)]) == 0
    assert json.loads(file.read_text())["entries"][0]["case"]["pattern"] == "causal"


def test_tensors_are_the_same_every_time() -> None:
    first, again = tensors(TINY, "cpu"), tensors(TINY, "cpu")
    assert [x.shape[1] for x in first] == [4, 2, 2, 4]
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


def test_sdpa_says_what_it_cannot() -> None:
    for name, backend, why in (
        ("window 1024", SDPBackend.FLASH_ATTENTION, "no mask"),
        ("soft-cap", SDPBackend.CUDNN_ATTENTION, "no soft-cap"),
        ("relu", SDPBackend.CUDNN_ATTENTION, "softmax only"),
    ):
        case = replace(TINY, pattern=name)
        with pytest.raises(Cannot, match=why):
            sdpa(backend)(case, attention(case, "cpu"), "cpu")
    long = replace(TINY, pattern="alibi", length=8192, heads=64)
    with pytest.raises(Cannot, match="too large"):
        sdpa(SDPBackend.EFFICIENT_ATTENTION)(long, attention(long, "cpu"), "cpu")

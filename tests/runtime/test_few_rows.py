"""Calls with few query rows: packed heads and split keys give what the formulas say, on every backend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from attn_engine import AttentionEngine, meta_tensor
from attn_engine.codegen.schedule import Schedule, cpu_schedule, tile_of_few_rows
from attn_engine.frontend import OnlineFunc
from attn_engine.ir.passes.pack_heads import Packing
from attn_engine.ir.program import Attention
from attn_engine.ir.tile import Kernel
from attn_engine.library import OnlineRelu, OnlineRetention, OnlineSigmoid, OnlineSoftmax
from attn_engine.runtime import cpu_launch, few_rows
from attn_engine.runtime.backend import Launchable
from attn_engine.runtime.backends import TorchBackend, TritonBackend
from attn_engine.runtime.compiled import CompiledAttention
from attn_engine.runtime.few_rows import choose_packing, choose_splits
from tests.conformance.cases import NORMALISERS, Variant
from tests.conformance.test_conformance import run_case
from tests.ir.user_rules import HeadScaled, LogLinear, LogSum
from tests.part import part_of

HEADS = {"mha": (4, 4), "gqa_4": (8, 2), "gqa_8": (8, 1), "mqa": (5, 1)}
LENGTHS = ((1, 3), (1, 517), (3, 261), (16, 1003))


def _at_the_end(t: dict[str, Tensor]) -> int:
    """How many keys come before the first query's own."""
    return t["keys"].shape[0] - t["queries"].shape[0]


def _lengths(b: int, h: int, q: int, kv: int) -> dict[str, Tensor]:
    return {"queries": torch.zeros(q), "keys": torch.zeros(kv)}


def _causal(t: dict[str, Tensor]) -> Callable:
    offset = _at_the_end(t)
    return lambda b, h, q_idx, kv_idx: kv_idx <= q_idx + offset


def _window(t: dict[str, Tensor]) -> Callable:
    offset = _at_the_end(t)
    return lambda b, h, q_idx, kv_idx: (kv_idx <= q_idx + offset) & (q_idx + offset - kv_idx < 150)


def _documents(t: dict[str, Tensor]) -> Callable:
    of_query, of_key = t["of_query"], t["of_key"]
    return lambda b, h, q_idx, kv_idx: of_query[q_idx] == of_key[kv_idx]


def _empty_rows(t: dict[str, Tensor]) -> Callable:
    """Odd queries see nothing, odd heads only keys from 300 on: whole splits are masked."""
    return lambda b, h, q_idx, kv_idx: (q_idx % 2 == 0) & ((h % 2 == 0) | (kv_idx >= 300))


def _biases(t: dict[str, Tensor]) -> Callable:
    by_key, by_head, by_query = t["by_key"], t["by_head"], t["by_query"]
    return lambda score, b, h, q_idx, kv_idx: (
        score + by_key[kv_idx] * by_head[h] + by_query[h, q_idx] * by_head[h]
    )


def _window_visible(c: Any) -> Tensor:
    distance = c.q + c.kv_len - c.q_len - c.kv
    return (distance >= 0) & (distance < 150)


def _empty_rows_visible(c: Any) -> Tensor:
    even = torch.arange(c.heads)[:, None, None] % 2 == 0
    return (c.q % 2 == 0) & (even | (c.kv >= 300))


def _biased(s: Tensor, c: Any) -> Tensor:
    head = c.tensors["by_head"][:, None, None]
    return (s + c.tensors["by_key"] * head + c.tensors["by_query"][:, :, None] * head).to(s.dtype)


VARIANTS = {
    v.name: v
    for v in (
        Variant("none"),
        Variant("causal", mask_mod=_causal, tensors=_lengths, dense_mask=lambda c: c.kv <= c.q + c.kv_len - c.q_len),
        Variant("window", mask_mod=_window, tensors=_lengths, dense_mask=_window_visible),
        Variant(
            "documents",
            mask_mod=_documents,
            dense_mask=lambda c: c.tensors["of_query"][:, None] == c.tensors["of_key"],
            tensors=lambda b, h, q, kv: {
                "of_query": torch.randint(0, 4, (q,), dtype=torch.int32),
                "of_key": torch.arange(kv, dtype=torch.int64) // 100,
            },
        ),
        Variant("empty_rows", mask_mod=_empty_rows, dense_mask=_empty_rows_visible),
        Variant(
            "biases",
            score_mod=_biases,
            dense_score=_biased,
            tensors=lambda b, h, q, kv: {
                "by_key": torch.randn(kv),
                "by_head": torch.rand(h) + 0.5,
                "by_query": torch.randn(h, q),
            },
            learned=("by_key", "by_head"),  # a bias by query alone changes nothing
        ),
    )
}  # fmt: skip


# Each is six kernels and more to compile. Rules and masks meet in test_cpu_rows.py too.
SHOWN = {
    "softmax": ("causal", "empty_rows", "biases"),
    "sigmoid": ("documents",),
    "relu": ("window",),
    "retention": ("empty_rows",),
}


@pytest.fixture
def short_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Splits of a few dozen keys, so that short calls have many; and every launch on all threads."""
    monkeypatch.setattr(few_rows, "LEAST_NUMBERS_PER_SPLIT", 56 * 70)
    monkeypatch.setattr(cpu_launch, "SMALL_WORK", 0)


def engine_of(
    dtype: torch.dtype = torch.float32, online_func: OnlineFunc | None = None, dim: int = 64, **given: Any
) -> AttentionEngine:
    metas = [meta_tensor(None, None, None, dim, dtype=dtype)] * 3
    return AttentionEngine(metas, layout="bhsd", online_func=online_func, **given)


def inputs_of(
    q_len: int,
    kv_len: int,
    heads: int = 8,
    kv_heads: int = 8,
    dim: int = 64,
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    shapes = ((heads, q_len), (kv_heads, kv_len), (kv_heads, kv_len))
    return [torch.randn(1, *s, dim).to(dtype) for s in shapes]


def assert_within(errors: dict[str, tuple[float, float]]) -> None:
    for name, (error, budget) in errors.items():
        assert error <= budget, f"{name}: error {error:.2e} above {budget:.2e}"  # also false for NaN


@pytest.mark.usefixtures("short_splits")
@pytest.mark.parametrize(
    ("normaliser", "variant"),
    part_of(lambda n, v: v in SHOWN[n], NORMALISERS, VARIANTS),
)
def test_output_and_gradients_on_cpu(normaliser: str, variant: str) -> None:
    for heads in HEADS.values():
        for lengths in LENGTHS:
            assert_within(run_case("cpu", normaliser, VARIANTS[variant], torch.float32, heads, lengths))


@pytest.mark.usefixtures("short_splits")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("variant", ["causal", "biases"])
def test_other_dtypes_on_cpu(variant: str, dtype: torch.dtype) -> None:
    for heads in HEADS.values():
        assert_within(run_case("cpu", "softmax", VARIANTS[variant], dtype, heads, (3, 517)))


@pytest.mark.usefixtures("short_splits")
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("machine", ["torch", "triton-interpreter"])
def test_the_lowering_on_other_machines(machine: str, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They do not split the keys by themselves; told to, they run the same kernels."""
    kind = TorchBackend if machine == "torch" else TritonBackend
    monkeypatch.setattr(kind, "schedule", lambda *_: replace(cpu_schedule(32), split_tasks=64))
    for lengths in ((1, 517), (3, 261)):
        assert_within(run_case(machine, "softmax", VARIANTS[variant], torch.float32, HEADS["gqa_4"], lengths))


RULES: tuple[type[OnlineFunc], ...] = (
    OnlineSoftmax,
    OnlineSigmoid,
    OnlineRelu,
    OnlineRetention,
    LogLinear,
)  # fmt: skip


@pytest.mark.parametrize("function", RULES)
def test_row_values_are_those_of_the_unsplit_pass(
    function: type[OnlineFunc], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The backward pass and the user read them: splitting must not show beyond rounding."""
    engine = engine_of(online_func=function())
    for q_len, kv_heads in ((1, 8), (5, 2)):
        inputs = inputs_of(q_len, 4099, kv_heads=kv_heads)
        monkeypatch.setattr(few_rows, "LEAST_NUMBERS_PER_SPLIT", 10**9)
        whole, whole_rows = engine(*inputs, return_final_rowscales=True)
        monkeypatch.setattr(few_rows, "LEAST_NUMBERS_PER_SPLIT", 10**4)
        split, split_rows = engine(*inputs, return_final_rowscales=True)
        assert not torch.equal(whole, split), "nothing was split"
        largest = whole.abs().max().item()  # sigmoid and relu add up thousands of weights of about 1
        torch.testing.assert_close(split, whole, rtol=0, atol=1e-5 * largest)
        torch.testing.assert_close(split_rows, whole_rows, rtol=1e-5, atol=1e-5)
        assert all(x.is_contiguous() for x in split_rows.values())


@pytest.mark.usefixtures("short_splits")
def test_random_lengths(generator: torch.Generator) -> None:
    """Any number of queries and keys, with one engine: nothing is compiled for a length."""
    offset = 0

    def causal(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return kv_idx <= q_idx + offset

    engines = [engine_of(mask_mod=causal), engine_of(online_func=LogLinear())]
    for _ in range(12):
        q_len, kv_len = (int(torch.randint(1, n, (), generator=generator)) for n in (17, 5001))
        kv_heads = (1, 2, 4, 8)[int(torch.randint(4, (), generator=generator))]
        offset = max(kv_len - q_len, 0)
        inputs = inputs_of(q_len, kv_len, kv_heads=kv_heads)
        for engine in engines:
            got, rows = engine(*inputs, return_final_rowscales=True)
            want, want_rows = engine.reference(*inputs, return_final_rowscales=True)
            torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=2e-5)
            torch.testing.assert_close(
                rows, {n: x.float() for n, x in want_rows.items()}, rtol=1e-5, atol=1e-5
            )


@pytest.mark.usefixtures("short_splits")
def test_same_bits_for_any_number_of_threads() -> None:
    engine, before = engine_of(), torch.get_num_threads()
    for q_len, kv_heads in ((1, 8), (4, 2)):
        inputs = [x.requires_grad_() for x in inputs_of(q_len, 3001, kv_heads=kv_heads)]
        found: list[list[Tensor]] = []
        try:
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                o, rows = engine(*inputs, return_final_rowscales=True)
                found.append([o, *rows.values(), *torch.autograd.grad(o.square().sum(), inputs)])
        finally:
            torch.set_num_threads(before)
        for other in found[1:]:
            assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.usefixtures("short_splits")
def test_huge_scores() -> None:
    engine = engine_of()
    q, k, v = inputs_of(1, 2001, kv_heads=2)
    got, rows = engine(q * 1e4, k, v, return_final_rowscales=True)
    want, want_rows = engine.reference(q * 1e4, k, v, return_final_rowscales=True)
    torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(rows["lse"].double(), want_rows["lse"], rtol=1e-5, atol=0)


@pytest.mark.usefixtures("short_splits")
def test_compiled_graph_with_both_layouts() -> None:
    metas = [meta_tensor(None, None, None, 64, dtype=torch.float32)] * 3
    engine = AttentionEngine(metas)
    q, k, v = (x.transpose(1, 2).contiguous() for x in inputs_of(3, 1501, kv_heads=2))
    compiled = torch.compile(lambda q, k, v: engine(q, k, v) * 2, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(q, k, v), engine(q, k, v) * 2, rtol=0, atol=0)
    same_heads = engine_of()(*(x.transpose(1, 2) for x in (q, k, v)))
    torch.testing.assert_close(same_heads.transpose(1, 2), engine(q, k, v), rtol=0, atol=0)


@pytest.mark.usefixtures("short_splits")
@pytest.mark.parametrize("function", [LogSum, HeadScaled])
def test_rules_that_cannot_be_split_or_packed(function: type[OnlineFunc]) -> None:
    engine = engine_of(online_func=function())
    inputs = inputs_of(1, 1501, kv_heads=2)
    torch.testing.assert_close(engine(*inputs).double(), engine.reference(*inputs), rtol=1e-4, atol=1e-4)
    text = engine.explain().sections["Few query rows"]
    if function is LogSum:
        assert "never split, because merging two parts of a row does not give the row" in text
        assert engine.source(kernel="decode").startswith("no kernels: merging two parts")
    else:
        assert "asks for the head" in text


def test_explain_and_source_show_the_merge() -> None:
    engine = engine_of(backend="torch")
    compiled = CompiledAttention(engine.program, TorchBackend(), cpu_schedule(32))
    assert [k.name for k in compiled.module("decode").kernels] == ["decode", "merge"]
    text = engine_of(backend="cpu").explain().sections["Few query rows"]
    assert "new_row_max = max(row_max, part_row_max)" in text
    assert "out = out * rescale + part_out * part_rescale" in text
    assert "split_begin" in engine.source(kernel="decode")


def test_the_choice_depends_on_shapes() -> None:
    program, schedule = engine_of().program, cpu_schedule(32)

    def packing(q_len: int, heads: int, kv_heads: int) -> Packing:
        q, k, _ = inputs_of(q_len, 1, heads, kv_heads)
        return choose_packing(program, schedule, q, k)

    assert packing(1, 8, 8) is Packing.NONE
    assert packing(1, 8, 2) is Packing.ONE_QUERY
    assert packing(16, 8, 2) is Packing.QUERIES
    assert packing(17, 8, 2) is Packing.NONE

    def splits(batches: int, q_len: int, kv_len: int, of: Attention = program) -> int:
        return choose_splits(
            of, schedule, *(torch.empty(batches, 8, n, 64, device="meta") for n in (q_len, kv_len))
        )

    assert splits(1, 1, 1000) == 1, "too little to read"
    assert splits(1, 1, 2**20) == 8
    assert splits(8, 1, 2**20) == 1, "tiles enough"
    assert splits(1, 256, 2**20) == 1
    assert splits(0, 1, 2**20) == splits(1, 0, 2**20) == splits(1, 1, 0) == 1
    assert splits(1, 1, 2**20, of=engine_of(online_func=LogSum()).program) == 1


def test_few_row_kernels_and_splits_are_chosen_apart() -> None:
    program, inputs = engine_of().program, [torch.empty(1, 8, n, 64, device="meta") for n in (1, 2**20)]
    never_split = replace(cpu_schedule(32), split_tasks=0)
    assert tile_of_few_rows(never_split, 3) == 4
    assert choose_splits(program, never_split, *inputs) == 1
    same_kernels = replace(cpu_schedule(32), few_row_kernels=False)
    assert tile_of_few_rows(same_kernels, 3) == 0
    assert choose_splits(program, same_kernels, *inputs) == 8


@pytest.mark.usefixtures("short_splits")
def test_nothing_is_compiled_for_a_length(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []
    original = TorchBackend.compile
    monkeypatch.setattr(TorchBackend, "schedule", lambda *_: replace(cpu_schedule(32), split_tasks=64))

    def compile_once(self: TorchBackend, kernel: Kernel, schedule: Schedule) -> Launchable:
        compiled.append(kernel.name)
        return original(self, kernel, schedule)

    monkeypatch.setattr(TorchBackend, "compile", compile_once)
    engine = engine_of(backend="torch")
    for q_len, kv_len in ((1, 501), (1, 999), (1, 1501), (1, 700)):
        engine(*inputs_of(q_len, kv_len, kv_heads=2))
    assert compiled == ["decode", "merge"]
    for q_len, kv_len in ((3, 501), (4, 999), (3, 1501)):
        engine(*inputs_of(q_len, kv_len, kv_heads=4))
    assert compiled == ["decode", "merge"] * 2

"""The forward kernel for few query rows, keys in lanes, against formulas and the reference in float64."""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from attn_engine import OnlineFunc
from attn_engine.codegen.schedule import few_rows_schedule
from attn_engine.frontend import CustomIO
from attn_engine.ir.expr import postorder
from attn_engine.ir.ops import Storage
from attn_engine.ir.program import KV_IDX, Q_IDX, SCORE, Attention, Captured
from attn_engine.library import OnlineRelu, OnlineRetention, OnlineSigmoid, OnlineSoftmax
from attn_engine.runtime.compiled import CompiledAttention
from attn_engine.runtime.cpu_compile import find_compiler
from attn_engine.runtime.reference import reference
from attn_engine.runtime.storage import TORCH_DTYPES
from attn_engine.traced_program import Description
from tests.conformance.cases import VARIANTS, Context, dense_attention
from tests.part import part_of
from tests.runtime.cpu_attention import CpuOn, Shapes, compiled, inputs
from tests.runtime.rules import WINDOW as WINDOW_SIZE
from tests.runtime.rules import function, program
from tests.runtime.test_cpu_kernels import ALPHA, CASES, Case, at_the_end_of_a_page, every_operation, read

pytestmark = pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler")

NORMALISERS = {
    "softmax": OnlineSoftmax,
    "sigmoid": OnlineSigmoid,
    "relu": OnlineRelu,
    "retention": OnlineRetention,
}
UNITS = {torch.float64: 2000, torch.float32: 100, torch.float16: 2, torch.bfloat16: 2}
Q_LENGTHS = (1, 2, 3, 8, 13)
KV_LENGTHS = (1, 33, 128, 250)  # less than a vector, ragged vectors, whole tiles, two tiles
SCALE = 0.25


def few_rows(p: Attention, rows: int, processor: str = "native") -> CompiledAttention:
    return CompiledAttention(p, CpuOn(processor), few_rows_schedule(rows))


def traced(
    rule: OnlineFunc,
    dtype: torch.dtype = torch.float32,
    dims: tuple[int, int] = (40, 24),
    score_mod: Callable[..., Any] | None = None,
    mask_mod: Callable[..., Any] | None = None,
):
    return Description(score_mod, mask_mod, CustomIO({}), rule, dtype, *dims).trace({})


def lengths() -> Iterator[tuple[int, int]]:
    for i, q_len in enumerate(Q_LENGTHS):
        yield q_len, KV_LENGTHS[i % len(KV_LENGTHS)]
        yield q_len, KV_LENGTHS[(i + 2) % len(KV_LENGTHS)]


def assert_close(got: Tensor, want: Tensor, dtype: torch.dtype, what: object) -> None:
    assert got.shape == want.shape
    assert (got.isinf() == want.isinf()).all(), what
    got, want = (torch.where(t.isinf(), 0.0, t.double()) for t in (got, want))
    limit = UNITS[dtype] * torch.finfo(dtype).eps * max([1.0, *want.abs().flatten(0).tolist()])
    error = (got - want).abs().max().item() if got.numel() else 0.0
    assert error <= limit, f"{what}: {error:.1e} > {limit:.1e}"


def run(
    attention: CompiledAttention, tensors: list[Tensor], captured: dict[str, Tensor], scalars: dict
) -> list[Tensor]:
    """o, poisoned before, and the saved row values."""
    q, k, v, _ = tensors
    out = torch.full((*q.shape[:3], v.shape[3]), math.nan, dtype=q.dtype)
    return [out, *attention.forward(q, k, v, captured, {"scale": SCALE, **scalars}, out)]


@pytest.mark.parametrize(
    ("variant", "name"),
    part_of(lambda v, n: n == "softmax" or v in ("prefix", "relative_bias"), VARIANTS, NORMALISERS),
)
def test_rules_masks_and_scores(name: str, variant: str, generator: torch.Generator):
    """Every rule with every mask and score_mod: grouped heads, unequal dimensions, ragged tiles of both kinds."""
    v = VARIANTS[variant]
    attention: CompiledAttention | None = None
    for q_len, kv_len in lengths():
        shapes = Shapes(2, 4, 2, q_len, kv_len)
        captured = v.tensors(2, 4, q_len, kv_len)
        t = traced(
            NORMALISERS[name](),
            score_mod=v.score_mod(captured) if v.score_mod else None,
            mask_mod=v.mask_mod(captured) if v.mask_mod else None,
        )
        attention = attention or few_rows(t.program, 4)
        assert attention.program == t.program, "one kernel for all lengths"
        tensors = inputs(t.program, shapes, generator)
        out, *saved = run(attention, tensors, t.tensors({}), t.scalars())
        exact = [x.double() for x in tensors[:3]]
        context = Context(
            2, 4, q_len, kv_len, {n: c.double() if c.is_floating_point() else c for n, c in captured.items()}
        )
        want = dense_attention(name, v, *exact, SCALE, context)
        where = f"{q_len} queries, {kv_len} keys"
        assert_close(out, want, torch.float32, where)
        _, rows = reference(t.program, *tensors[:3], t.tensors({}), {"scale": SCALE, **t.scalars()})
        for n, got, exact_row in zip(rows, saved, rows.values(), strict=True):
            assert_close(got, exact_row, torch.float32, f"{n}, {where}")


SIZES = (
    pytest.param(1, (64, 64)), pytest.param(1, (33, 80)), pytest.param(2, (80, 33)), pytest.param(4, (256, 144)),
    pytest.param(8, (8, 5)), pytest.param(8, (64, 128)),
)  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "dims", "dtype"),
    part_of(lambda r, d, t: t is torch.float32 or d in ((33, 80), (256, 144)), SIZES, UNITS),
)
def test_dimensions_and_types(
    rows: int, dims: tuple[int, int], dtype: torch.dtype, generator: torch.Generator
):
    v = VARIANTS["soft_cap"]
    t = traced(OnlineSoftmax(), dtype, dims, score_mod=v.score_mod({}))
    attention = few_rows(t.program, rows)
    for q_len, kv_len in ((1, 250), (13, 31), (8, 140)):
        tensors = inputs(t.program, Shapes(1, 2, 1, q_len, kv_len), generator)
        out, *_ = run(attention, tensors, {}, t.scalars())
        exact = [x.double() for x in tensors[:3]]
        want = dense_attention("softmax", v, *exact, SCALE, Context(1, 2, q_len, kv_len, {}))
        assert_close(out, want, dtype, (q_len, kv_len))


# In double, every operation is in test_cpu_kernels.py and test_cpu_functions.py too.
@pytest.mark.parametrize(
    ("name", "element"),
    part_of(
        lambda n, e: e is Storage.FLOAT32 or n == "learned relative table, kept pairs",
        [*CASES, "every operation"],
        [Storage.FLOAT32, Storage.FLOAT64],
    ),
)
def test_captured_tensors_and_operations(name: str, element: Storage, generator: torch.Generator):
    case: Case = every_operation() if name == "every operation" else CASES[name]
    captures = tuple(Captured(n, storage, len(shape)) for n, (shape, storage) in case.captured.items())
    numbers = (ALPHA,) if case.score is not None and ALPHA in postorder(case.score) else ()
    score = None if case.score is None else function(case.score, *captures, scalars=numbers)
    mask = None if case.mask is None else function(case.mask, *captures)
    p = program(score, mask, None, element, *case.dims)
    captured = {
        n: torch.rand(shape, generator=generator) > 0.6
        if storage is Storage.BOOL
        else torch.randint(0, 3, shape, generator=generator)
        if not storage.floating
        else (torch.randn(shape, generator=generator) * 0.3).to(TORCH_DTYPES[storage])
        for n, (shape, storage) in case.captured.items()
    }
    scalars = {v.name: 0.75 for v in numbers}
    attention = few_rows(p, 8)
    for q_len in Q_LENGTHS:
        tensors = inputs(p, Shapes(2, 4, 2, q_len, 90), generator)
        got = run(attention, tensors, captured, scalars)
        want, rows = reference(p, *tensors[:3], captured, {"scale": SCALE, **scalars})
        assert_close(got[0], want, TORCH_DTYPES[element], q_len)
        assert_close(got[1], *rows.values(), TORCH_DTYPES[element], q_len)


class TopShare(OnlineFunc):
    """A rule of one's own: a condition on the old state is read after the state has changed, and keys are counted."""

    def __init__(self) -> None:
        super().__init__({"top": float("-inf"), "share": 0.0, "seen": 0.0}, {"top": 0.0, "share": 0.0})

    @staticmethod
    def online_fwd(scores: Any, online_rowscales: Any, b: Any, h: Any, q_idx: Any) -> Any:
        old, share = online_rowscales["top"], online_rowscales["share"]
        top = old.max(scores.get_reduce("max"))
        raised = top > old
        above = scores > share
        rescale = torch.where(raised, torch.exp(old - top), 1.0)
        weights = torch.exp(scores - top) * torch.where(above, 1.0, 0.5)
        share = share * rescale + torch.where(raised, 1.0, 0.5) * weights.get_reduce("sum")
        return weights, {"top": top, "share": share, "seen": online_rowscales["seen"] + 1.0}, rescale

    @staticmethod
    def online_fwd_epilogue(o: Any, online_rowscales: Any, b: Any, h: Any, q_idx: Any) -> Any:
        share = online_rowscales["share"]
        return o / torch.where(share > 0, share, 1.0), {"top": online_rowscales["top"], "share": share}

    @staticmethod
    def forward(scores: Any, final_rowscales: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return torch.exp(scores - final_rowscales["top"]) / final_rowscales["share"]

    @staticmethod
    def backward(
        dp: Any, scores: Any, final_rowscales: Any, doosum: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any
    ) -> Any:
        return scores * (dp - doosum)


@pytest.mark.parametrize("rows", [1, 8])
def test_a_rule_of_ones_own(rows: int, generator: torch.Generator):
    t = traced(TopShare(), dims=(16, 16))
    attention = few_rows(t.program, rows)
    for q_len in Q_LENGTHS:
        tensors = inputs(
            t.program, Shapes(2, 4, 2, q_len, 100), generator
        )  # one tile: the rule depends on their cut
        out, *saved = run(attention, tensors, {}, {})
        want, kept = reference(t.program, *tensors[:3], {}, {"scale": SCALE})
        assert_close(out, want, torch.float32, q_len)
        for got, row in zip(saved, kept.values(), strict=True):
            assert_close(got, row, torch.float32, q_len)


def test_quotients_of_integers_are_not_rounded(generator: torch.Generator):
    score = SCORE + Q_IDX / WINDOW_SIZE + KV_IDX / WINDOW_SIZE
    p = program(function(score, scalars=(WINDOW_SIZE,)), None)
    tensors = inputs(p, Shapes(1, 2, 1, 5, 40), generator)
    for attention in (few_rows(p, 2), compiled(p)):
        out, *_ = run(attention, tensors, {}, {"window": 7})
        want, _ = reference(p, *tensors[:3], {}, {"scale": SCALE, "window": 7})
        assert_close(out, want, torch.float32, "quotients")


@pytest.mark.parametrize("sizes", [(1, 0), (0, 5), (3, 1)])
def test_short_lengths(sizes: tuple[int, int], generator: torch.Generator):
    p = program(None, function(KV_IDX <= Q_IDX), dim_qk=16, dim_v=16)
    tensors = inputs(p, Shapes(1, 2, 1, *sizes), generator)
    out, lse = run(few_rows(p, 2), tensors, {}, {})
    want, rows = reference(p, *tensors[:3], {}, {"scale": SCALE})
    assert_close(out, want, torch.float32, sizes)
    assert_close(lse, rows["lse"], torch.float32, sizes)


def test_rows_that_see_nothing(generator: torch.Generator):
    p = program(None, function((Q_IDX >= 5) & (KV_IDX >= 3)), dim_qk=16, dim_v=16)
    out, lse = run(few_rows(p, 4), inputs(p, Shapes(1, 2, 2, 13, 40), generator), {}, {})
    assert (out[:, :, :5] == 0).all()
    assert (lse[:, :, :5] == -torch.inf).all()
    assert out.isfinite().all()
    assert lse[:, :, 5:].isfinite().all()


def test_keys_out_of_sight_may_hold_anything(generator: torch.Generator):
    """NaN and infinity in hidden keys, and in the columns beside a row's end, stay out of the result."""
    p = program(None, function(KV_IDX < 70), dim_qk=33, dim_v=33)
    q, k, v, d_out = inputs(p, Shapes(1, 2, 2, 2, 133), generator)
    q[..., 20] = q[..., 20].abs() + 0.1
    k[:, :, 7, 20] = -torch.inf  # in a column that two vectors of the row share: the key weighs nothing
    want, _ = reference(p, q, k[:, :, :70], v[:, :, :70], {}, {"scale": SCALE})
    assert want.isfinite().all()
    wide = [torch.full((*t.shape[:3], 64), math.nan) for t in (k, v)]
    for x, t in zip(wide, (k, v)):
        x[..., :33] = t
        x[:, :, 70:] = math.nan
    wide[1][:, :, 70:] = (
        0.0  # a weight of zero times a value: as in every spelling, values in a tile are read
    )
    out, _ = run(few_rows(p, 2), [q, *(x[..., :33] for x in wide), d_out], {}, {})
    assert_close(out, want, torch.float32, "hidden keys")


def test_any_strides(generator: torch.Generator):
    p = program(None, function(KV_IDX <= Q_IDX + 60), dim_qk=20, dim_v=37)
    tensors = inputs(p, Shapes(2, 4, 2, 7, 150), generator)
    want, _ = reference(p, *tensors[:3], {}, {"scale": SCALE})
    turned = [t.transpose(-1, -2).contiguous().transpose(-1, -2) for t in tensors]
    spread = [torch.stack([t, t], -1).flatten(-2)[..., ::2] for t in tensors]
    for strided in (turned, spread):
        assert strided[1].stride(-1) != 1
        out, _ = run(few_rows(p, 4), strided, {}, {})
        assert_close(out, want, torch.float32, strided[1].stride())


@pytest.mark.parametrize("dims", [(20, 37), (5, 3)])
@pytest.mark.parametrize("element", [Storage.FLOAT32, Storage.BFLOAT16, Storage.FLOAT64])
def test_nothing_outside_the_tensors_is_touched(
    element: Storage, dims: tuple[int, int], generator: torch.Generator
):
    score = function(SCORE + read("column", KV_IDX), Captured("column", Storage.FLOAT32, 1))
    p = program(score, None, element=element, dim_qk=dims[0], dim_v=dims[1])
    captured = {"column": at_the_end_of_a_page(torch.rand(71, generator=generator))}
    tensors = [at_the_end_of_a_page(t) for t in inputs(p, Shapes(1, 2, 1, 5, 71), generator)]
    attention = few_rows(p, 4)
    attention.kernels("forward")
    q, k, v, d_out = tensors
    work = partial(attention.forward, q, k, v, captured, {"scale": SCALE}, d_out)
    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    child.join(60)
    assert child.exitcode == 0


@pytest.mark.parametrize("rows", [1, 8])
def test_the_same_bits_for_any_number_of_threads(rows: int, generator: torch.Generator):
    p = program(None, function(KV_IDX <= Q_IDX + 1500), dim_qk=64, dim_v=64)
    tensors = inputs(p, Shapes(2, 8, 2, 13, 1600), generator)
    attention, before = few_rows(p, rows), torch.get_num_threads()
    results: list[list[Tensor]] = []
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            results.append(run(attention, tensors, {}, {}))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("processor", ["x86-64-v3", "x86-64-v2"])
@pytest.mark.parametrize("element", [Storage.FLOAT32, Storage.FLOAT64, Storage.BFLOAT16])
def test_narrower_processors(processor: str, element: Storage, generator: torch.Generator):
    if find_compiler(processor) is None:
        pytest.skip(f"the compiler knows no {processor}")
    p = program(None, function(KV_IDX <= Q_IDX + 60), element=element, dim_qk=20, dim_v=37)
    for rows in (1, 8):
        tensors = inputs(p, Shapes(2, 4, 2, 9, 150), generator)
        want, _ = reference(p, *tensors[:3], {}, {"scale": SCALE})
        out, _ = run(few_rows(p, rows, processor), tensors, {}, {})
        assert_close(out, want, TORCH_DTYPES[element], rows)

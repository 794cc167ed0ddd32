"""Generated C++ against dense float64 formulas: forward, and the gradients of everything."""

from __future__ import annotations

import ctypes
import mmap
import multiprocessing
from dataclasses import dataclass, field
from functools import partial

import pytest
import torch
from torch import Tensor

from attn_engine.ir.expr import Expr, Load, Var, call, where
from attn_engine.ir.ops import DType, Op, Storage
from attn_engine.ir.program import BATCH, HEAD, KV_IDX, Q_IDX, SCORE, Captured
from attn_engine.runtime.cpu_compile import find_compiler
from tests.runtime.cpu_attention import CpuOn, Formula, Shapes, compiled, expected, inputs, measured
from tests.runtime.rules import RULES, function, program

pytestmark = pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler")

TOLERANCE = {  # of o and of gradients, relative to the largest element
    Storage.FLOAT64: 1e-12,
    Storage.FLOAT32: 1e-5,
    Storage.FLOAT16: 4e-3,
    Storage.BFLOAT16: 3e-2,
}
ALPHA = Var("alpha", DType.FLOAT)


def read(name: str, *indices: Expr, kind: DType = DType.FLOAT) -> Load:
    return Load(name, kind, indices)


@dataclass
class Case:
    """A description on the IR and the same in torch."""

    score: Expr | None = None
    score_mod: Formula | None = None
    mask: Expr | None = None
    mask_mod: Formula | None = None
    captured: dict[str, tuple[tuple[int, ...], Storage]] = field(default_factory=dict)
    learned: tuple[str, ...] = ()
    shapes: Shapes = field(default_factory=Shapes)
    dims: tuple[int, int] = (16, 16)


def causal_mod(b, h, i, j, **_: Tensor) -> Tensor:
    return j <= i


CAUSAL = KV_IDX <= Q_IDX
CASES = {
    "plain": Case(shapes=Shapes(q_len=70, kv_len=200), dims=(64, 64)),
    "causal softcap": Case(
        call(Op.TANH, SCORE / 5.0) * 5.0,
        lambda s, *_, **__: 5 * torch.tanh(s / 5),
        CAUSAL,
        causal_mod,
        shapes=Shapes(q_len=200, kv_len=150),
        dims=(64, 96),
    ),
    "learned slopes, documents": Case(
        SCORE + read("slopes", HEAD) * (KV_IDX - Q_IDX),
        lambda s, b, h, i, j, slopes, **_: s + slopes[h] * (j - i),
        read("doc", BATCH, Q_IDX, kind=DType.INT).equals(read("doc", BATCH, KV_IDX, kind=DType.INT)) & CAUSAL,
        lambda b, h, i, j, doc, **_: (doc[b, i] == doc[b, j]) & (j <= i),
        {"slopes": ((4,), Storage.FLOAT32), "doc": ((2, 90), Storage.INT64)},
        ("slopes",),
    ),
    "learned bias of pairs": Case(
        SCORE + read("bias", HEAD, Q_IDX, KV_IDX),
        lambda s, b, h, i, j, bias: s + bias[h, i, j],
        captured={"bias": ((4, 75, 90), Storage.FLOAT32)},
        learned=("bias",),
    ),
    "learned relative table, kept pairs": Case(
        SCORE + read("table", HEAD, Q_IDX - KV_IDX + 89),
        lambda s, b, h, i, j, table, **_: s + table[h, i - j + 89],
        read("keep", Q_IDX, KV_IDX, kind=DType.BOOL) | KV_IDX.equals(0),
        lambda b, h, i, j, keep, **_: keep[i, j] | (j == 0),
        {"table": ((4, 165), Storage.FLOAT16), "keep": ((75, 90), Storage.BOOL)},
        ("table",),
    ),
    "learned rows and columns": Case(
        SCORE * read("column", KV_IDX) + read("row", BATCH, Q_IDX) * ALPHA,
        lambda s, b, h, i, j, column, row: s * column[j] + row[b, i] * 0.75,
        captured={"column": ((90,), Storage.FLOAT32), "row": ((2, 75), Storage.BFLOAT16)},
        learned=("column", "row"),
    ),
}


def every_operation() -> Case:
    x = SCORE
    c = call
    functions = [c(op, x) for op in (Op.SIN, Op.COS, Op.TANH, Op.SIGMOID, Op.ABS)]
    functions += [c(op, x * x + 1.0) for op in (Op.SQRT, Op.RSQRT, Op.LOG, Op.LOG2)]
    functions += [c(Op.EXP, -c(Op.ABS, x)), c(Op.EXP2, c(Op.MIN, x, 0.5)), c(Op.MAX, x, 0.25)]
    total: Expr = -x
    for f in functions:
        total = total + f
    parity = ((Q_IDX // 3) % 2).equals((KV_IDX - 50) % 3)
    total = total + where(parity, x * 2.0, c(Op.FLOOR, x)) / c(Op.MAX, KV_IDX, 2)
    total = total + c(Op.TO_FLOAT, c(Op.NE, (Q_IDX - KV_IDX) % 7, 0)) + c(Op.DIV, KV_IDX - Q_IDX, 8) * ALPHA
    total = total + where(~(x > 0.5) | KV_IDX.equals(2), 0.0, x * c(Op.TO_INT, c(Op.ABS, x)))

    def in_torch(x, b, h, i, j):
        f = torch.sin(x) + torch.cos(x) + torch.tanh(x) + torch.sigmoid(x) + x.abs()
        y = x * x + 1
        f = f + y.sqrt() + y.rsqrt() + y.log() + y.log2()
        f = f + torch.exp(-x.abs()) + torch.exp2(x.clamp(max=0.5)) + x.clamp(min=0.25) - x
        parity = (i // 3) % 2 == (j - 50) % 3
        f = f + torch.where(parity, x * 2, torch.floor(x)) / j.clamp(min=2).double()
        f = f + ((i - j) % 7 != 0).double() + (j - i).double() / 8 * 0.75
        return f + torch.where(~(x > 0.5) | (j == 2), 0.0, x * x.abs().detach().trunc())

    return Case(total, in_torch, dims=(20, 37))


def check(
    case: Case,
    generator: torch.Generator,
    rule: str = "softmax",
    element: Storage = Storage.FLOAT32,
    backend: CpuOn | None = None,
) -> None:
    captures = tuple(Captured(n, storage, len(shape)) for n, (shape, storage) in case.captured.items())
    scalars = (ALPHA,) if case.score is not None and ALPHA in _variables(case.score) else ()
    score = None if case.score is None else function(case.score, *captures, scalars=scalars)
    mask = None if case.mask is None else function(case.mask, *captures)
    p = program(score, mask, RULES[rule](), element, *case.dims)
    tensors = inputs(p, case.shapes, generator)
    captured = {n: _random(shape, storage, generator) for n, (shape, storage) in case.captured.items()}
    scale = case.dims[0] ** -0.5
    numbers = {"scale": scale, **{v.name: 0.75 for v in scalars}}
    got = measured(compiled(p, backend), tensors, captured, case.learned, numbers)
    want = expected(rule, tensors, captured, case.learned, scale, case.score_mod, case.mask_mod)
    for name, a, b in zip(("o", "dq", "dk", "dv", *case.learned), got, want):
        limit = TOLERANCE[element]
        if name in captured:  # a sum over many pairs, rounded to the tensor's own type
            limit = max(10 * limit, torch.finfo(captured[name].dtype).eps)
        error = (a.double() - b).abs().max() / max(1.0, b.abs().max())
        assert error <= limit, f"{name}: {error:.1e} > {limit:.1e}"


def _variables(e: Expr) -> set[Expr]:
    return {v for v in [e, *(x for o in e.operands for x in _variables(o))] if isinstance(v, Var)}


def _random(shape: tuple[int, ...], storage: Storage, generator: torch.Generator) -> Tensor:
    if storage is Storage.BOOL:
        return torch.rand(shape, generator=generator) > 0.6
    if not storage.floating:
        return torch.randint(0, 3, shape, generator=generator)
    return (torch.randn(shape, generator=generator) * 0.3).to(getattr(torch, storage.value))


@pytest.mark.parametrize("name", CASES)
def test_matches_dense_formulas(name: str, generator: torch.Generator):
    check(CASES[name], generator)


@pytest.mark.parametrize("element", [Storage.FLOAT32, Storage.FLOAT64])
def test_every_operation(element: Storage, generator: torch.Generator):
    check(every_operation(), generator, element=element)


@pytest.mark.parametrize("rule", ["sigmoid", "retention"])
def test_other_normalisers(rule: str, generator: torch.Generator):
    check(Case(mask=CAUSAL, mask_mod=causal_mod), generator, rule)


@pytest.mark.parametrize("element", [Storage.BFLOAT16])
def test_half_precision_is_converted(element: Storage, generator: torch.Generator):
    check(Case(mask=CAUSAL, mask_mod=causal_mod, dims=(20, 37)), generator, element=element)


@pytest.mark.parametrize("processor", ["x86-64-v3", "x86-64-v2"])
def test_narrower_processors(processor: str, generator: torch.Generator):
    check(CASES["learned relative table, kept pairs"], generator, backend=CpuOn(processor))


@pytest.mark.parametrize("lengths", [(1, 1), (1, 129), (33, 1), (5, 0), (0, 5)])
def test_short_lengths(lengths: tuple[int, int], generator: torch.Generator):
    p = program(None, function(CAUSAL), dim_qk=16, dim_v=16)
    tensors = inputs(p, Shapes(1, 2, 1, *lengths), generator)
    got = measured(compiled(p), tensors, {}, (), {"scale": 0.25})
    if 0 in lengths:
        assert all((t == 0).all() for t in got)
        return
    want = expected("softmax", tensors, {}, (), 0.25, None, causal_mod)
    for a, b in zip(got, want):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=1e-5)


def test_rows_that_see_nothing(generator: torch.Generator):
    p = program(None, function((Q_IDX >= 40) & (KV_IDX >= 3)), dim_qk=16, dim_v=16)
    q, k, v, d_out = inputs(p, Shapes(1, 2, 2), generator)
    attention = compiled(p)
    out = torch.full_like(d_out, torch.nan)
    (lse,) = attention.forward(q, k, v, {}, {"scale": 1.0}, out)
    assert (out[:, :, :40] == 0).all()
    assert (lse[:, :, :40] == -torch.inf).all()
    assert out.isfinite().all()
    assert lse[:, :, 40:].isfinite().all()
    dq, dk, dv = grads = (
        torch.full_like(q, torch.nan),
        torch.full_like(k, torch.nan),
        torch.full_like(v, torch.nan),
    )
    attention.backward(d_out, (q, k, v), out, [lse], {}, {"scale": 1.0}, grads, ())
    assert all(g.isfinite().all() for g in grads)
    assert (dq[:, :, :40] == 0).all()
    assert (dk[:, :, :3] == 0).all()
    assert (dv[:, :, :3] == 0).all()


def test_any_strides(generator: torch.Generator):
    p = program(None, function(CAUSAL), dim_qk=16, dim_v=16)
    tensors = inputs(p, Shapes(), generator)
    turned = [t.transpose(-1, -2).contiguous().transpose(-1, -2) for t in tensors]  # the last stride is not 1
    wide = [torch.cat([t, t], -1)[..., ::2] for t in tensors]
    for tensors in (turned, wide):
        got = measured(compiled(p), tensors, {}, (), {"scale": 0.25})
        want = expected("softmax", tensors, {}, (), 0.25, None, causal_mod)
        for a, b in zip(got, want):
            torch.testing.assert_close(a.double(), b, rtol=0, atol=2e-5)


def at_the_end_of_a_page(t: Tensor) -> Tensor:
    """A copy of t, laid out alike, whose last byte is followed by memory that nobody may touch."""
    order = sorted(range(t.ndim), key=lambda i: -t.stride(i))
    dense = t.permute(order).contiguous()
    size = dense.numel() * dense.element_size()
    pages = -(-size // mmap.PAGESIZE)
    memory = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(start + pages * mmap.PAGESIZE), mmap.PAGESIZE, 0) == 0
    raw = torch.frombuffer(memory, dtype=torch.uint8, count=size, offset=pages * mmap.PAGESIZE - size)
    return (
        raw.view(dense.dtype).view(dense.shape).copy_(dense).permute([order.index(i) for i in range(t.ndim)])
    )


@pytest.mark.parametrize("element", [Storage.FLOAT32, Storage.FLOAT64])
def test_nothing_outside_the_tensors_is_touched(element: Storage, generator: torch.Generator):
    p = program(None, function(CAUSAL), element=element, dim_qk=20, dim_v=37)
    tensors = [at_the_end_of_a_page(t) for t in inputs(p, Shapes(1, 2, 1), generator)]
    attention = compiled(p)
    attention.kernels("forward")
    attention.kernels("backward")
    work = partial(measured, attention, tensors, {}, (), {"scale": 0.2}, at_the_end_of_a_page)
    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    child.join(60)
    assert child.exitcode == 0


def test_an_index_outside_reads_the_edge(generator: torch.Generator):
    """A captured tensor that is too short for the padded rows of a tile is never read outside."""
    p = program(function(SCORE + read("row", Q_IDX * 1000), Captured("row", Storage.FLOAT32, 1)))
    q, k, v, _ = inputs(p, Shapes(1, 1, 1), generator)
    out = torch.full((1, 1, q.shape[2], v.shape[3]), torch.nan)
    compiled(p).forward(q, k, v, {"row": torch.ones(1)}, {"scale": 1.0}, out)
    assert out.isfinite().all()

"""Gradients of captured tensors, however they are indexed, against autograd of the dense formula in float64.

The formula is the score_mod itself, called with tensors: none of this package's tracing or differentiation is in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from attn_engine import AttentionEngine, meta_tensor
from attn_engine.codegen.lower.capture import CaptureGradient, Route, capture_gradients, shared_axes
from attn_engine.errors import GradientNotSupported
from attn_engine.runtime import compiled, query_parts
from attn_engine.runtime.cpu_compile import find_compiler
from tests.part import part_of

B, H, KV_HEADS, SQ, SKV, D = 2, 4, 2, 71, 90, 8
SCALE = 0.3
BACKENDS = [
    "torch",
    pytest.param("cpu", marks=pytest.mark.skipif(find_compiler() is None, reason="no compiler")),
]
Mod = Callable[..., Any]
Make = Callable[[dict[str, Tensor]], Mod]


def causal(b: Any, h: Any, q: Any, kv: Any) -> Any:
    return q >= kv - 3


def rows_without_keys(b: Any, h: Any, q: Any, kv: Any) -> Any:
    return (kv <= q - 20) & (kv > q - 45)


@dataclass(frozen=True)
class Case:
    """make(t): the score_mod that reads the tensors `t`. shapes: learned ones; integers: fixed, below a limit."""

    make: Make
    shapes: dict[str, tuple[int, ...]]
    integers: dict[str, tuple[tuple[int, ...], int]]
    mask: Mod | None
    dtype: torch.dtype


def case(
    make: Make,
    mask: Mod | None = causal,
    dtype: torch.dtype = torch.float32,
    integers: dict[str, tuple[tuple[int, ...], int]] | None = None,
    **shapes: tuple[int, ...],
) -> Case:
    return Case(make, shapes, integers or {}, mask, dtype)


def buckets(distance: Any) -> Any:
    """T5's: exact near, logarithmic far (limits that no distance hits exactly)."""
    near = torch.clamp(distance, 0, 7)
    far = 8 + (torch.log((torch.clamp(distance, 1, 200) + 0.3) / 8.0) * 3.0).to(torch.int64)
    return torch.where(distance < 8, near, torch.clamp(far, 8, 15))


def by_offset(t: dict[str, Tensor]) -> Mod:
    return lambda s, b, h, q, kv: s + t["table"][t["offset"][q]] + t["table"][t["ids"][kv]]


def by_double_index(t: dict[str, Tensor]) -> Mod:
    x = t["x"]  # torch's own x[b][q] would read all pairs of the index tensors b and q
    return lambda s, b, h, q, kv: s * (x[b, q] if isinstance(b, Tensor) else x[b][q])


N = SQ + SKV
CASES = {
    "(H,)": case(lambda t: lambda s, b, h, q, kv: s + t["x"][h], x=(H,)),
    "(H, S)": case(lambda t: lambda s, b, h, q, kv: s + t["x"][h, kv], x=(H, SKV)),
    "(S, S)": case(lambda t: lambda s, b, h, q, kv: s + t["x"][q, kv], x=(SQ, SKV)),
    "(H, S, S)": case(lambda t: lambda s, b, h, q, kv: s + t["x"][h, q, kv], x=(H, SQ, SKV)),
    "(B, H, S, S)": case(lambda t: lambda s, b, h, q, kv: s + t["x"][b, h, q, kv], x=(B, H, SQ, SKV)),
    "(B, S, S)": case(lambda t: lambda s, b, h, q, kv: s + t["x"][b, q, kv], x=(B, SQ, SKV)),
    "(S, S) turned": case(lambda t: lambda s, b, h, q, kv: s + t["x"][kv, q], x=(SKV, SQ)),
    "half the keys": case(lambda t: lambda s, b, h, q, kv: s + t["x"][q, kv // 2], x=(SQ, SKV)),
    "table by distance": case(
        lambda t: lambda s, b, h, q, kv: s + t["x"][q - kv + (SKV - 1)], mask=None, x=(N - 1,)
    ),
    "table per head, clamped": case(
        lambda t: lambda s, b, h, q, kv: s + t["x"][h, torch.clamp(q - kv, -9, 12) + 9], x=(H, 22)
    ),
    "T5": case(lambda t: lambda s, b, h, q, kv: s + t["x"][h, buckets(q - kv)], x=(H, 16)),
    "a table twice": case(
        lambda t: lambda s, b, h, q, kv: s + t["x"][q - kv + SKV] * t["x"][(kv - q) % 13], x=(N,)
    ),
    "buckets read from a table": case(
        lambda t: lambda s, b, h, q, kv: s + t["x"][t["bucket"][q - kv + SKV], h],
        integers={"bucket": ((N,), 6)},
        x=(6, H),
    ),
    "2-D distances": case(
        lambda t: lambda s, b, h, q, kv: s + t["x"][q // 9 - kv // 9 + 10, q % 9 - kv % 9 + 8], x=(18, 17)
    ),
    "pairs twice": case(
        lambda t: lambda s, b, h, q, kv: s + t["x"][h, q, kv] * t["x"][0, q, kv], x=(H, SQ, SKV)
    ),
    "symmetric": case(lambda t: lambda s, b, h, q, kv: s + t["x"][q] + t["x"][kv], x=(SKV,)),
    "turned view": case(lambda t: lambda s, b, h, q, kv: s + t["x"].T[q, kv], x=(SKV, SQ)),
    "shifted view": case(lambda t: lambda s, b, h, q, kv: s + t["x"][1:][q, kv], x=(SQ + 1, SKV)),
    "double index": case(by_double_index, x=(B, SQ)),
    "indirect": case(by_offset, integers={"offset": ((SQ,), 5), "ids": ((SKV,), 5)}, table=(5,)),
    "factor": case(lambda t: lambda s, b, h, q, kv: s * t["x"][q, kv] * t["y"][h], x=(SQ, SKV), y=(H,)),
    "two biases": case(
        lambda t: lambda s, b, h, q, kv: s + t["x"][q, kv] + t["y"][b, q - kv + SKV], x=(SQ, SKV), y=(B, N)
    ),
    "rows without keys": case(
        lambda t: lambda s, b, h, q, kv: s + t["x"][q, kv] + t["y"][q - kv + SKV],
        mask=rows_without_keys,
        x=(SQ, SKV),
        y=(N,),
    ),
    "float64": case(
        lambda t: lambda s, b, h, q, kv: s + t["x"][q, kv] + t["y"][q - kv + SKV],
        dtype=torch.float64,
        x=(SQ, SKV),
        y=(N,),
    ),
}
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5}


def tensors_of(c: Case, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    learned = {n: (torch.randn(s) * 0.5).to(dtype or c.dtype).requires_grad_() for n, s in c.shapes.items()}
    return {**learned, **{n: torch.randint(0, most, s) for n, (s, most) in c.integers.items()}}


def inputs_of(dtype: torch.dtype) -> list[Tensor]:
    shapes = ((H, SQ), (KV_HEADS, SKV), (KV_HEADS, SKV), (H, SQ))
    return [torch.randn(B, *s, D).to(dtype) for s in shapes]


def dense(c: Case, t: dict[str, Tensor], qkvd: list[Tensor]) -> list[Tensor]:
    """Gradients of q, k, v and of the learned tensors, in float64."""
    x = {n: v.detach().double().requires_grad_() if n in c.shapes else v for n, v in t.items()}
    q, k, v, d_out = (y.detach().double().requires_grad_() for y in qkvd)
    index = [
        torch.arange(n).reshape([-1 if i == j else 1 for j in range(4)])
        for i, n in enumerate((B, H, SQ, SKV))
    ]
    score = q @ k.repeat_interleave(H // KV_HEADS, 1).transpose(-1, -2) * SCALE
    score = c.make(x)(score, *index)
    if c.mask is not None:
        score = score.masked_fill(~c.mask(*index), -math.inf)
    weights = torch.softmax(score, -1).nan_to_num(0.0)
    out = weights @ v.repeat_interleave(H // KV_HEADS, 1)
    return list(torch.autograd.grad(out, [q, k, v, *(x[n] for n in c.shapes)], d_out.detach()))


@cache
def built(name: str, backend: str) -> tuple[AttentionEngine, dict[str, Tensor]]:
    c = CASES[name]
    torch.manual_seed(len(name))
    t = tensors_of(c)
    metas = [meta_tensor(None, None, None, D, dtype=c.dtype)] * 3
    return AttentionEngine(metas, c.make(t), mask_mod=c.mask, backend=backend, layout="bhsd", scale=SCALE), t


def measured(c: Case, engine: AttentionEngine, t: dict[str, Tensor], qkvd: list[Tensor]) -> list[Tensor]:
    *qkv, d_out = qkvd
    leaves = [x.detach().requires_grad_() for x in qkv]
    return list(torch.autograd.grad(engine(*leaves), [*leaves, *(t[n] for n in c.shapes)], d_out))


def compare(got: list[Tensor], want: list[Tensor], limit: float) -> None:
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert a.shape == b.shape
        error = float((a.double() - b).abs().max() / b.abs().max().clamp(min=1.0))
        assert error <= limit, f"gradient {i}: {error:.1e} > {limit:.1e}"


# One for each way to sum a gradient, and for what only rendering decides; the others differ in the tile program alone.
COMPILED = (
    "(H,)", "(S, S)", "(B, S, S)", "(H, S, S)", "table by distance", "table per head, clamped", "T5", "a table twice",
    "buckets read from a table", "2-D distances", "pairs twice", "indirect", "rows without keys",
)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "backend"), part_of(lambda n, b: b == "torch" or n in COMPILED, CASES, BACKENDS)
)
def test_against_dense_autograd(name: str, backend: str) -> None:
    c = CASES[name]
    engine, t = built(name, backend)
    qkvd = inputs_of(c.dtype)
    want = dense(c, t, qkvd)
    compare(measured(c, engine, t, qkvd), want, TOLERANCE[c.dtype])


@pytest.mark.parametrize("name", ["(S, S)", "T5", "pairs twice", "indirect", "rows without keys"])
def test_the_reference(name: str) -> None:
    c = CASES[name]
    engine, t = built(name, "torch")
    *qkv, d_out = qkvd = inputs_of(c.dtype)
    leaves = [x.requires_grad_() for x in qkv]
    want = dense(c, t, qkvd)
    got = torch.autograd.grad(engine.reference(*leaves), [*leaves, *(t[n] for n in c.shapes)], d_out)
    compare(list(got), want, TOLERANCE[c.dtype])


@pytest.mark.parametrize("mixed", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bias_of_another_type(mixed: tuple[torch.dtype, torch.dtype], backend: str) -> None:
    c = CASES["two biases"]
    t = tensors_of(c, mixed[1])
    qkvd = inputs_of(mixed[0])
    metas = [meta_tensor(None, None, None, D, dtype=mixed[0])] * 3
    engine = AttentionEngine(metas, c.make(t), mask_mod=c.mask, backend=backend, layout="bhsd", scale=SCALE)
    got = measured(c, engine, t, qkvd)
    assert all(g.dtype is mixed[1] for g in got[3:])
    compare(got, dense(c, t, qkvd), 4e-2 if mixed[0] is torch.bfloat16 else 1e-2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["(S, S)", "table by distance", "a table twice", "2-D distances"])
def test_the_same_bits_for_any_number_of_threads(name: str, backend: str) -> None:
    c = CASES[name]
    engine, t = built(name, backend)
    qkvd, before = inputs_of(c.dtype), torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3, 3):
            torch.set_num_threads(threads)
            found.append(measured(c, engine, t, qkvd))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["(S, S)", "(B, S, S)", "(H, S, S)"])
def test_only_the_bias_is_learned(name: str, backend: str) -> None:
    c = CASES[name]
    engine, t = built(name, backend)
    *qkv, d_out = qkvd = inputs_of(c.dtype)
    (got,) = torch.autograd.grad(engine(*qkv), [t["x"]], d_out)
    compare([got], dense(c, t, qkvd)[3:], TOLERANCE[c.dtype])


@pytest.mark.skipif(find_compiler() is None, reason="no compiler")
@pytest.mark.parametrize(
    ("name", "heads_at_once"), [("(S, S)", 1), ("(B, S, S)", 1), ("(H, S, S)", 2), ("(S, S)", 2)]
)
def test_pieces_of_the_query_gradient(name: str, heads_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the parts of dQ would be too large, batches and heads are taken one after the other."""
    c = CASES[name]
    engine, t = built(name, "cpu")
    qkvd = inputs_of(c.dtype)
    whole = measured(c, engine, t, qkvd)
    seen: list[dict[str, int]] = []
    plain = query_parts.QueryParts.pieces

    def small(self: Any, tensors: dict[str, Tensor], scale: float) -> Any:
        of_head = self.splits * self.group * SQ * D
        object.__setattr__(self, "room", heads_at_once * of_head)
        for numbers in plain(self, tensors, scale):
            seen.append(numbers)
            yield numbers

    monkeypatch.setattr(compiled.QueryParts, "pieces", small)
    got = measured(c, engine, t, qkvd)
    compare(got, dense(c, t, qkvd), TOLERANCE[c.dtype])
    assert all(torch.equal(a, b) for a, b in zip(got, whole, strict=True))
    assert len(seen) > 1


def reads(engine: AttentionEngine) -> list[CaptureGradient]:
    floating = tuple(c.name for c in engine.program.captures if c.storage.floating)
    return list(capture_gradients(engine.program, floating))


ROUTES = {
    "(H,)": {Route.COLUMN},
    "(S, S)": {Route.PAIR},
    "table by distance": {Route.DIAGONAL},
    "table per head, clamped": {Route.DIAGONAL},
    "T5": {Route.DIAGONAL},
    "buckets read from a table": {Route.DIAGONAL},
    "a table twice": {Route.DIAGONAL},
    "2-D distances": {Route.PAIR},
    "symmetric": {Route.ROW, Route.COLUMN},
    "indirect": {Route.ROW, Route.COLUMN},
}


@pytest.mark.parametrize("name", ROUTES)
def test_the_index_decides_the_route(name: str) -> None:
    engine, _ = built(name, "torch")
    assert {g.route for g in reads(engine)} == ROUTES[name]


def test_instances_run_over_the_axes_that_share_elements() -> None:
    axes = {
        "(S, S)": ("kv_head", "batch"),
        "(B, S, S)": ("kv_head",),
        "(H, S, S)": ("batch",),
        "(B, H, S, S)": (),
    }
    for name, shared in axes.items():
        engine, _ = built(name, "torch")
        assert shared_axes(reads(engine)) == shared


def test_triton_refuses_sums_per_diagonal() -> None:
    pytest.importorskip("triton")
    engine, t = built("table by distance", "triton-interpreter")
    with pytest.raises(GradientNotSupported, match="several pairs of one tile"):
        measured(CASES["table by distance"], engine, t, inputs_of(torch.float32))

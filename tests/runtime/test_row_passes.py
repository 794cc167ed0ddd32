"""Row rules of several passes and with parameters of their own, against dense formulas in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from attn_engine.codegen.pipeline import lower
from attn_engine.codegen.schedule import cpu_schedule
from attn_engine.ir.expr import Expr
from attn_engine.ir.ops import Storage
from attn_engine.ir.program import KV_IDX, Q_IDX, OnlineRule, saved_var
from attn_engine.runtime.backends import backend_named
from attn_engine.runtime.compiled import CompiledAttention
from attn_engine.runtime.cpu_compile import find_compiler
from tests.gpu_tiles import gpu_schedule
from tests.part import part_of
from tests.runtime.cpu_attention import Shapes, inputs
from tests.runtime.rules import centred, function, program, softmax_with_sink

CPU = "cpu" if find_compiler() is not None else "torch"
SCALE = 0.4
TOLERANCE = {Storage.FLOAT64: 1e-12, Storage.FLOAT32: 2e-5, Storage.BFLOAT16: 4e-2}

# logits and what is visible -> weights and the rows that carry gradients
Dense = Callable[[Tensor, Tensor, dict[str, Tensor]], tuple[Tensor, list[Tensor]]]


def dense_centred(s: Tensor, seen: Tensor, _: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
    count = seen.sum(-1, keepdim=True).clamp(min=1)
    mean = (s * seen).sum(-1, keepdim=True) / count
    power = torch.relu(s - mean) ** 2 * seen
    norm = 1 + power.sum(-1, keepdim=True)
    return power / norm, [mean[..., 0], norm[..., 0]]


def dense_sink(s: Tensor, seen: Tensor, t: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
    s = (s / t["temperature"][:, None, None]).masked_fill(~seen, -math.inf)
    sink = t["sink"][:, None, None].expand(*s.shape[:3], 1)
    dead = ~seen.any(-1, keepdim=True)
    lse = torch.logsumexp(torch.cat([s, sink], -1), -1, keepdim=True)
    return torch.exp(s - lse), [torch.where(dead, 0.0, lse)[..., 0]]


@dataclass
class Case:
    rule: Callable[[], OnlineRule]
    dense: Dense
    rows: tuple[str, ...]
    captured: dict[str, Tensor] = field(default_factory=dict)


CASES = {
    "centred": Case(centred, dense_centred, ("mean", "norm")),
    "sink": Case(
        softmax_with_sink,
        dense_sink,
        ("lse",),
        {"sink": torch.tensor([0.5, -1.0, 2.0, 0.1]), "temperature": torch.tensor([0.7, 1.3, 0.9, 2.0])},
    ),
}
MASKS: dict[str, tuple[Expr | None, Callable[[Tensor, Tensor], Tensor]]] = {
    "everything": (None, lambda i, j: (i >= 0) & (j >= 0)),
    "causal": (KV_IDX <= Q_IDX, lambda i, j: j <= i),
    "window with dead rows": (
        (KV_IDX <= Q_IDX) & (Q_IDX - KV_IDX < 20) & ((Q_IDX % 5) > 0),
        lambda i, j: (j <= i) & (i - j < 20) & (i % 5 > 0),
    ),
}


def check(
    case: Case, mask: str, backend: str, element: Storage, shapes: Shapes, generator: torch.Generator
) -> list[Tensor]:
    """Compare output and all gradients, of a loss with and without row values; returns what was computed."""
    kept, visible = MASKS[mask]
    p = program(mask=None if kept is None else function(kept), rule=case.rule(), element=element)
    chosen = backend_named(backend)
    attention = CompiledAttention(p, chosen, chosen.schedule(p))
    q, k, v, d_out = inputs(p, shapes, generator)
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    learned = {n: x.double().requires_grad_() for n, x in case.captured.items()}
    group = shapes.heads // shapes.kv_heads
    keys, values = (x.repeat_interleave(group, 1) for x in exact[1:])
    i, j = torch.arange(shapes.q_len)[:, None], torch.arange(shapes.kv_len)[None]
    seen = visible(i, j).expand(shapes.batches, shapes.heads, shapes.q_len, shapes.kv_len)
    weights, rows = case.dense(exact[0] @ keys.mT * SCALE, seen, learned)
    o, alive = weights @ values, seen.any(-1)
    results: list[Tensor] = []
    out = torch.full(o.shape, math.nan, dtype=q.dtype)
    with torch.no_grad():
        saved = attention.forward(q, k, v, case.captured, {"scale": SCALE}, out)
    _close(out, o, element)
    for used in ((), case.rows):
        d_rows = {n: torch.randn(rows[0].shape, generator=generator).to(saved[0].dtype) for n in used}
        loss = (o * d_out.double()).sum()
        for name, row in zip(case.rows, rows, strict=True):
            loss = loss + ((row * d_rows[name].double())[alive].sum() if name in d_rows else 0.0)
        want = torch.autograd.grad(loss, [*exact, *learned.values()], retain_graph=True)
        grads = tuple(torch.full_like(x, math.nan) for x in (q, k, v))
        names = tuple(learned)
        with torch.no_grad():
            more = attention.backward(
                d_out, (q, k, v), out, saved, case.captured, {"scale": SCALE}, grads, names, d_rows
            )
        got = [*grads, *(more[n] for n in names)]
        results += got
        for x, y in zip(got, want, strict=True):
            _close(x, y, element)
    return [out, *results]


def _close(found: Tensor, exact: Tensor, element: Storage) -> None:
    error = (found.double() - exact).abs().max().item()
    tolerance = max(TOLERANCE[element], 1e-6 if found.dtype is torch.float32 else 0.0)
    assert error <= tolerance * max(1.0, exact.abs().max().item()), error


@pytest.mark.parametrize(
    ("name", "mask", "element"),
    part_of(
        lambda n, m, e: e is Storage.FLOAT32 or m == "window with dead rows",
        CASES,
        MASKS,
        [Storage.FLOAT64, Storage.FLOAT32, Storage.BFLOAT16],
    ),
)
def test_on_the_cpu(name: str, mask: str, element: Storage, generator: torch.Generator) -> None:
    check(CASES[name], mask, CPU, element, Shapes(), generator)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", ["torch", "triton-interpreter"])
def test_on_other_machines(name: str, backend: str, generator: torch.Generator) -> None:
    check(CASES[name], "window with dead rows", backend, Storage.FLOAT32, Shapes(), generator)


@pytest.mark.parametrize("rows", [1, 3, 16])
@pytest.mark.parametrize("name", CASES)
def test_few_query_rows(name: str, rows: int, generator: torch.Generator) -> None:
    for mask in ("everything", "window with dead rows"):
        shapes = Shapes(batches=1, q_len=rows, kv_len=300)
        check(CASES[name], mask, CPU, Storage.FLOAT32, shapes, generator)


def test_no_query_head_shares_its_keys(generator: torch.Generator) -> None:
    check(CASES["centred"], "causal", CPU, Storage.FLOAT32, Shapes(1, 4, 4, 33, 65), generator)


def test_results_do_not_depend_on_threads() -> None:
    found: list[list[Tensor]] = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        draw = torch.Generator().manual_seed(3)
        found.append(
            [x for c in CASES.values() for x in check(c, "causal", CPU, Storage.FLOAT32, Shapes(), draw)]
        )
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))


@pytest.mark.parametrize("schedule", [cpu_schedule(32), gpu_schedule(8, 5, 4)], ids=["cpu", "gpu"])
def test_every_pass_has_its_loops_and_leaves_rows(schedule: object) -> None:
    p = program(mask=function(KV_IDX <= Q_IDX), rule=centred())
    backward = lower(p, schedule, "backward")  # pyright: ignore[reportArgumentType]
    assert [k.name for k in backward.kernels[:2]] == ["delta", "adjoints"]
    assert [x.name for x in backward.kernel("adjoints").params if x.output] == ["adjoint_pull"]
    assert not any(p.output for p in backward.kernels[-1].params if p.name == "adjoint_pull")
    assert all(p.shape != ("q_len", "kv_len") for k in backward.kernels for p in k.params)


def test_a_pass_that_nothing_reads_is_left_out() -> None:
    p = program(rule=centred())
    used = lower(p, cpu_schedule(32), "backward", (), ("norm",))
    assert "d_saved_norm" in {x.name for x in used.kernel("adjoints").params}
    plain = program(rule=softmax_with_sink())
    assert [k.name for k in lower(plain, cpu_schedule(32), "backward").kernels] == ["delta", "backward"]
    assert saved_var("pull").axes == ("q",)

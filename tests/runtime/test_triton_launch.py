"""Rendered Triton kernels, forward and backward, through the interpreter against float64 autograd in plain torch."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor

from attn_engine.codegen.backends.triton import TritonOptions, render_triton
from attn_engine.codegen.pipeline import lower
from attn_engine.codegen.schedule import Edges, Gradients, Schedule
from attn_engine.errors import BackendNotInstalled, LaunchFailed
from attn_engine.ir.expr import Expr, Load, Var, call
from attn_engine.ir.ops import DType, Op, Storage
from attn_engine.ir.program import BATCH, HEAD, KV_IDX, Q_IDX, SCORE, Attention, Captured
from attn_engine.ir.tile import Kernel
from attn_engine.runtime.backends import TritonBackend
from attn_engine.runtime.compiled import CompiledAttention
from attn_engine.runtime.storage import TORCH_DTYPES
from attn_engine.runtime.triton_launch import TritonKernel, compile_triton
from tests.runtime.rules import function, program, relu, retention, sigmoid, softmax

WINDOW = Var("window", DType.INT)
SLOPES, BIAS = Captured("slopes", Storage.FLOAT32, 1), Captured("bias", Storage.FLOAT32, 3)
DOCUMENT, SHOWN = Captured("document", Storage.INT64, 1), Captured("shown", Storage.BOOL, 2)
BY_HEAD, BY_PAIR = Load("slopes", DType.FLOAT, (HEAD,)), Load("bias", DType.FLOAT, (HEAD, Q_IDX, KV_IDX))
CAUSAL = function(KV_IDX <= Q_IDX)


class Interpreter:
    """The Triton backend without the engine around it."""

    name = "triton-interpreter"

    def schedule(self, program: Attention) -> Schedule:
        return Schedule(64, 64, 64, 64, Edges.BRANCH, Gradients.TWO_KERNELS)

    def refuse(self, program: Attention, captures: object) -> None:
        pass

    def source(self, kernel: Kernel, schedule: Schedule) -> str:
        return render_triton(kernel)

    def compile(self, kernel: Kernel, schedule: Schedule) -> TritonKernel:
        return compile_triton(kernel, self.source(kernel, schedule), TritonOptions(), interpret=True)


@dataclass
class Case:
    """A program and the same thing written in torch: modify(score, b, h, i, j) and visible(b, h, i, j)."""

    score: Expr | None = None
    mask: Expr | None = None
    rule: Callable = softmax
    captures: tuple[Captured, ...] = ()
    scalars: dict[str, int | float] = field(default_factory=dict)
    modify: Callable | None = None
    visible: Callable | None = None
    weigh: Callable | None = None
    lengths: tuple[int, int] = (70, 130)
    heads: tuple[int, int] = (2, 2)
    batches: int = 1
    dims: tuple[int, int] = (16, 32)
    edges: Edges = Edges.BRANCH
    gradients: Gradients = Gradients.TWO_KERNELS


def softmax_weights(s: Tensor, keep: Tensor) -> Tensor:
    s = s.masked_fill(~keep, float("-inf"))
    top = s.amax(-1, keepdim=True).nan_to_num(neginf=0.0) if s.shape[-1] else 0.0
    e = torch.exp(s - top)
    total = e.sum(-1, keepdim=True)
    return e / torch.where(total == 0, 1.0, total)


def retention_weights(s: Tensor, keep: Tensor) -> Tensor:
    s = torch.where(keep, s, 0.0)
    return s / s.abs().sum(-1, keepdim=True).clamp(min=1.0)


def soft_cap(s, x, b, h, i, j):
    return 30 * torch.tanh(s / 30) - x["slopes"][:, None, None] * (i - j)


def floor_division(s, x, b, h, i, j):
    return s + torch.div(i - j, 3, rounding_mode="floor") * 0.01 + torch.remainder(j - i, 5) * 0.02


IJ = Q_IDX - KV_IDX
CASES = {
    "plain": Case(heads=(4, 2), batches=2),
    "causal": Case(mask=KV_IDX <= Q_IDX, visible=lambda x, b, h, i, j: j <= i, lengths=(130, 130), dims=(24, 40)),
    "window": Case(
        mask=(KV_IDX <= Q_IDX) & (IJ <= WINDOW), scalars={"window": 50}, lengths=(213, 90),  # rows past 140 are empty
        visible=lambda x, b, h, i, j: (j <= i) & (i - j <= 50),
    ),
    "split edges": Case(
        mask=(KV_IDX <= Q_IDX) & (IJ <= 100), lengths=(213, 213), edges=Edges.SPLIT,
        visible=lambda x, b, h, i, j: (j <= i) & (i - j <= 100),
    ),
    "soft-cap, ALiBi": Case(
        score=30.0 * call(Op.TANH, SCORE / 30.0) - BY_HEAD * IJ, mask=KV_IDX <= Q_IDX, captures=(SLOPES,),
        modify=soft_cap, visible=lambda x, b, h, i, j: j <= i, lengths=(130, 130), heads=(4, 1),
    ),
    "learned bias": Case(
        score=SCORE + BY_PAIR, captures=(BIAS,), modify=lambda s, x, b, h, i, j: s + x["bias"], heads=(2, 1), batches=2,
    ),
    "document, shown": Case(
        mask=Load("document", DType.INT, (Q_IDX,)).equals(Load("document", DType.INT, (KV_IDX,)))
        & ~Load("shown", DType.BOOL, (BATCH, KV_IDX)),
        captures=(DOCUMENT, SHOWN), lengths=(90, 90), batches=2,
        visible=lambda x, b, h, i, j: (x["document"][i] == x["document"][j]) & ~x["shown"][:, None, None, :],
    ),
    "floor division": Case(
        score=SCORE + call(Op.TO_FLOAT, IJ // 3) * 0.01 + call(Op.TO_FLOAT, (-IJ) % 5) * 0.02, modify=floor_division,
    ),
    "one kernel": Case(
        score=SCORE - BY_HEAD * call(Op.ABS, IJ), captures=(SLOPES,), heads=(2, 1),
        modify=lambda s, x, b, h, i, j: s - x["slopes"][:, None, None] * (i - j).abs(),
        lengths=(70, 150), gradients=Gradients.ONE_KERNEL,
    ),
    "sigmoid": Case(rule=sigmoid, mask=KV_IDX <= Q_IDX, visible=lambda x, b, h, i, j: j <= i, lengths=(64, 64),
                    weigh=lambda s, keep: torch.where(keep, torch.sigmoid(s), 0.0)),
    "relu": Case(rule=relu, weigh=lambda s, keep: torch.relu(s)),
    "retention": Case(rule=retention, mask=KV_IDX <= Q_IDX, visible=lambda x, b, h, i, j: j <= i,
                      weigh=retention_weights, lengths=(64, 64)),
    "no keys": Case(lengths=(3, 0)),
    "one query": Case(lengths=(1, 70), dims=(5, 7)),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_fp32_matches_autograd(name: str, generator: torch.Generator) -> None:
    check(CASES[name], Storage.FLOAT32, generator, 2e-5)


@pytest.mark.parametrize("name", ["soft-cap, ALiBi", "window"])
def test_fp16_matches_autograd(name: str, generator: torch.Generator) -> None:
    check(CASES[name], Storage.FLOAT16, generator, 1e-2)


@pytest.mark.parametrize("name", ["causal"])
def test_bf16_matches_autograd(name: str, generator: torch.Generator) -> None:
    check(CASES[name], Storage.BFLOAT16, generator, 6e-2)


def test_fp64_matches_autograd(generator: torch.Generator) -> None:
    check(CASES["soft-cap, ALiBi"], Storage.FLOAT64, generator, 1e-7)  # the slopes are float32


def test_a_kernel_launches_again(poison: Callable[..., Tensor], generator: torch.Generator) -> None:
    kernel = lower(program(dim_qk=16, dim_v=16), Interpreter().schedule(program()), "forward").kernels[0]
    launchable = Interpreter().compile(kernel, Interpreter().schedule(program()))
    for length in (3, 70):  # another length is the same kernel
        q, k = (torch.randn(1, 1, length, 16, generator=generator) for _ in range(2))
        tensors = {"Q": q, "K": k, "V": k, "O": poison(1, 1, length, 16), "saved_lse": poison(1, 1, length)}
        sizes = {"batches": 1, "heads": 1, "kv_heads": 1, "q_len": length, "kv_len": length}
        launchable.launch(tensors, {"scale": 1}, sizes)
        torch.testing.assert_close(tensors["O"], torch.softmax(q @ k.mT, -1) @ k)
        torch.testing.assert_close(tensors["saved_lse"], torch.logsumexp(q @ k.mT, -1))


def test_a_failing_kernel_names_itself() -> None:
    kernel = lower(program(), Interpreter().schedule(program()), "forward").kernels[0]
    source = render_triton(kernel).replace("tl.dot(", "tl.no_such_function(")
    broken = compile_triton(kernel, source, interpret=True)
    tensors = {p.name: torch.zeros(1, 1, 2, 8) for p in kernel.params}
    with pytest.raises(
        LaunchFailed, match=r'(?s)forward failed on backend "triton-interpreter".*no_such_function'
    ):
        broken.launch(
            tensors, {"scale": 1.0}, {"batches": 1, "heads": 1, "kv_heads": 1, "q_len": 2, "kv_len": 2}
        )


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = lower(program(), Interpreter().schedule(program()), "forward").kernels[0]
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(BackendNotInstalled, match="pip install"):
        compile_triton(kernel, render_triton(kernel))


def test_grid_counts_tiles_and_folds_further_axes() -> None:
    kernel = lower(program(), Interpreter().schedule(program()), "forward").kernels[0]
    sizes = {"batches": 3, "heads": 5, "kv_heads": 1, "q_len": 130, "kv_len": 9, "splits": 2}
    assert compile_triton(kernel, render_triton(kernel)).grid(sizes) == (3, 5, 3)
    folded = replace(kernel, grid=("q", "split", "head", "batch"))
    assert compile_triton(folded, render_triton(folded)).grid(sizes) == (3, 2, 15)


def check(
    case: Case,
    element: Storage,
    generator: torch.Generator,
    tolerance: float,
    schedule: Schedule | None = None,
    inputs: list[Tensor] | None = None,
) -> None:
    """schedule: not the usual one. inputs: q, k, v and d_out, else random."""
    captured = captured_tensors(case, generator)
    inputs = inputs or [x.to(TORCH_DTYPES[element]) for x in random_inputs(case, generator)]
    learned = tuple(c.name for c in case.captures if c.storage.floating)
    got = run(case, element, inputs, captured, learned, schedule)
    for key, want in reference(case, inputs, captured, learned).items():
        scale = max(1.0, want.abs().max().item()) if want.numel() else 1.0
        error = (got[key].double() - want).abs().max().item() / scale if want.numel() else 0.0
        assert error < tolerance, f"{key}: {error:.1e}"  # a NaN fails too


def random_inputs(case: Case, generator: torch.Generator) -> list[Tensor]:
    """q, k, v and d_out: strided views, of which k is transposed within its last two dimensions."""
    (heads, kv_heads), (rows, columns), (d, dv) = case.heads, case.lengths, case.dims

    def random(*shape: int) -> Tensor:
        return torch.randn(case.batches, *shape, generator=generator, dtype=torch.float64)

    def shape(h: int, n: int, width: int) -> Tensor:
        return random(n, h, width).transpose(1, 2)

    k = random(kv_heads, d, columns).mT
    return [shape(heads, rows, d), k, shape(kv_heads, columns, dv), shape(heads, rows, dv)]


def captured_tensors(case: Case, generator: torch.Generator) -> dict[str, Tensor]:
    rows, columns = case.lengths
    every = {
        "slopes": torch.rand(case.heads[0], generator=generator),
        "bias": torch.randn(case.heads[0], rows, columns, generator=generator),
        "document": torch.randint(0, 3, (rows,), generator=generator),
        "shown": torch.rand(case.batches, columns, generator=generator) < 0.3,
    }
    return {c.name: every[c.name] for c in case.captures}


def run(
    case: Case,
    element: Storage,
    inputs: list[Tensor],
    captured: dict,
    learned: tuple[str, ...],
    schedule: Schedule | None = None,
) -> dict[str, Tensor]:
    q, k, v, d_out = inputs
    scalars = tuple(WINDOW for name in case.scalars if name == "window")
    score = (
        None
        if case.score is None
        else function(case.score, *(c for c in case.captures if c.storage.floating))
    )
    mask = (
        None
        if case.mask is None
        else function(case.mask, *(c for c in case.captures if not c.storage.floating), scalars=scalars)
    )
    attention = program(score, mask, case.rule(), element, *case.dims)
    backend = Interpreter() if schedule is None else TritonBackend("triton-interpreter", interpret=True)
    schedule = schedule or Schedule(64, 64, 64, 64, case.edges, case.gradients)
    compiled = CompiledAttention(attention, backend, schedule)
    numbers = {"scale": case.dims[0] ** -0.5, **case.scalars}
    out = torch.full((*q.shape[:3], case.dims[1]), float("nan"), dtype=q.dtype)
    saved = compiled.forward(q, k, v, captured, numbers, out)
    gradients = tuple(torch.full_like(x, float("nan")) for x in (q, k, v))
    extra = compiled.backward(d_out, (q, k, v), out, saved, captured, numbers, gradients, learned)
    return {"o": out, **dict(zip(("dq", "dk", "dv"), gradients)), **{f"d_{n}": x for n, x in extra.items()}}


def reference(
    case: Case, inputs: list[Tensor], captured: dict, learned: tuple[str, ...]
) -> dict[str, Tensor]:
    """Dense float64 attention, written from the formulas, and its gradients by torch."""
    q, k, v, d_out = (x.detach().double().requires_grad_() for x in inputs)
    x = {n: t.double().requires_grad_() if t.is_floating_point() else t for n, t in captured.items()}
    group = case.heads[0] // case.heads[1]
    keys, values = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    b, h = torch.arange(case.batches)[:, None, None, None], torch.arange(case.heads[0])[:, None, None]
    i, j = torch.arange(case.lengths[0])[:, None], torch.arange(case.lengths[1])
    s = q @ keys.mT * case.dims[0] ** -0.5
    s = case.modify(s, x, b, h, i, j) if case.modify else s
    keep = case.visible(x, b, h, i, j).expand_as(s) if case.visible else torch.ones_like(s, dtype=torch.bool)
    o = (case.weigh or softmax_weights)(s, keep) @ values
    names = ["dq", "dk", "dv", *(f"d_{n}" for n in learned)]
    found = torch.autograd.grad(o, [q, k, v, *(x[n] for n in learned)], d_out.detach())
    return {"o": o.detach(), **dict(zip(names, found))}

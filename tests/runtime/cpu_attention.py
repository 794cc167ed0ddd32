"""Run programs on the CPU backend, for a chosen processor, and beside plain torch formulas in float64."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from attn_engine.codegen.backends.cpu import render_cpu
from attn_engine.codegen.pipeline import with_header
from attn_engine.codegen.schedule import Schedule, cpu_schedule
from attn_engine.ir.program import Attention
from attn_engine.ir.tile import Kernel
from attn_engine.runtime.backend import Launchable
from attn_engine.runtime.compiled import CompiledAttention
from attn_engine.runtime.cpu_compile import Compiler, compile_cpu, find_compiler
from attn_engine.runtime.storage import TORCH_DTYPES

Formula = Callable[..., Tensor]


def compiler_for(processor: str = "native", program: str = "") -> Compiler:
    """The compiler for a processor, `program` ("g++", "clang++") or any; skips the test where there is none."""
    if program and shutil.which(program) is None:
        pytest.skip(f"{program} is not installed")
    with pytest.MonkeyPatch.context() as environment:
        if program:
            environment.setenv("CXX", program)
        found = find_compiler(processor)
    if found is None or (program and os.path.basename(found.command[0]) != program):  # noqa: PTH119
        pytest.skip(f"{program or 'the compiler'} knows no {processor}")
    here = find_compiler()
    if here is None or found.vector_bytes > here.vector_bytes:
        pytest.skip(f"this machine cannot run what is compiled for {processor}")
    return found


@dataclass
class CpuOn:
    """The CPU backend for a processor that the compiler is told to assume."""

    processor: str = "native"
    program: str = ""
    name: str = "cpu"

    def __post_init__(self) -> None:
        self.compiler = compiler_for(self.processor, self.program)

    def schedule(self, program: Attention) -> Schedule:
        return cpu_schedule(self.compiler.target.lanes(program.element, program.dim_qk, program.dim_v))

    def refuse(self, program: Attention, captures: Sequence[object]) -> None: ...

    def source(self, kernel: Kernel, schedule: Schedule) -> str:
        return render_cpu(with_header(kernel, "cpu", "test"), self.compiler.target)

    def compile(self, kernel: Kernel, schedule: Schedule) -> Launchable:
        return compile_cpu(kernel, self.source(kernel, schedule), self.compiler)


@dataclass
class Shapes:
    batches: int = 2
    heads: int = 4
    kv_heads: int = 2
    q_len: int = 75
    kv_len: int = 90


def compiled(program: Attention, backend: CpuOn | None = None) -> CompiledAttention:
    backend = backend or CpuOn()
    return CompiledAttention(program, backend, backend.schedule(program))


def softmax_weights(score: Tensor, seen: Tensor) -> Tensor:
    hidden = score.masked_fill(~seen, -math.inf)
    top = hidden.amax(-1, keepdim=True)
    powers = torch.exp(hidden - torch.where(top == -math.inf, 0.0, top))
    total = powers.sum(-1, keepdim=True)
    return powers / torch.where(total == 0, 1.0, total)


def retention_weights(score: Tensor, seen: Tensor) -> Tensor:
    kept = score * seen
    return kept / kept.abs().sum(-1, keepdim=True).clamp(min=1)


WEIGHTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "softmax": softmax_weights,
    "sigmoid": lambda score, seen: torch.sigmoid(score) * seen,
    "relu": lambda score, seen: torch.relu(score) * seen,
    "retention": retention_weights,
}


def inputs(program: Attention, shapes: Shapes, generator: torch.Generator) -> list[Tensor]:
    """q, k, v and the gradient of o: the first in the memory order of bshd, all in logical order."""
    s, dtype = shapes, TORCH_DTYPES[program.element]

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return [
        normal(s.batches, s.q_len, s.heads, program.dim_qk).transpose(1, 2),
        normal(s.batches, s.kv_heads, s.kv_len, program.dim_qk),
        normal(s.batches, s.kv_len, s.kv_heads, program.dim_v).transpose(1, 2),
        normal(s.batches, s.heads, s.q_len, program.dim_v),
    ]


def expected(
    rule: str,
    tensors: Sequence[Tensor],
    captured: dict[str, Tensor],
    learned: Sequence[str],
    scale: float,
    score_mod: Formula | None,
    mask_mod: Formula | None,
) -> list[Tensor]:
    """o and the gradients of q, k, v and the learned tensors, densely in float64."""
    q, k, v, d_out = (t.double() for t in tensors)
    leaves = {
        n: t.double().requires_grad_(n in learned) if t.is_floating_point() else t
        for n, t in captured.items()
    }
    wanted = [t.requires_grad_() for t in (q, k, v)] + [leaves[n] for n in learned]
    group = q.shape[1] // k.shape[1]
    keys, values = (t.repeat_interleave(group, 1) for t in (k, v))
    b = torch.arange(q.shape[0])[:, None, None, None]
    h = torch.arange(q.shape[1])[:, None, None]
    i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])[None]
    score = q @ keys.transpose(-1, -2) * scale
    score = score if score_mod is None else score_mod(score, b, h, i, j, **leaves)
    seen = torch.ones_like(score, dtype=torch.bool)
    seen = seen if mask_mod is None else mask_mod(b, h, i, j, **captured).expand(score.shape)
    o = WEIGHTS[rule](score, seen) @ values
    return [o.detach(), *torch.autograd.grad(o, wanted, d_out)]


def measured(
    attention: CompiledAttention,
    tensors: Sequence[Tensor],
    captured: dict[str, Tensor],
    learned: Sequence[str],
    scalars: dict[str, float],
    place: Callable[[Tensor], Tensor] = lambda t: t,
) -> list[Tensor]:
    """The same from the kernels, with every output poisoned; `place` says where in memory the outputs go."""
    q, k, v, d_out = tensors
    out = place(torch.full((*q.shape[:3], v.shape[3]), math.nan, dtype=q.dtype))
    saved = attention.forward(q, k, v, captured, scalars, out)
    dq, dk, dv = (place(torch.full_like(t, math.nan)) for t in (q, k, v))
    grads = (dq, dk, dv)
    more = attention.backward(d_out, (q, k, v), out, saved, captured, scalars, grads, tuple(learned))
    return [out, *grads, *(more[n] for n in learned)]

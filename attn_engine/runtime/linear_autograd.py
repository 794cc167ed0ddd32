"""A linear attention as one differentiable operation, with gradients of all its tensors and states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from attn_engine.codegen.lower.chunked_backward import captured_reads, read_gradient
from attn_engine.errors import TransformNotSupported
from attn_engine.ir.expr import Load, Var
from attn_engine.ir.linear import LinearProgram
from attn_engine.runtime.dense import evaluate_all
from attn_engine.runtime.linear_inputs import LinearInputs
from attn_engine.runtime.token_rows import TokenRows

POSITIONAL = ("q", "k", "v", "decay", "beta")


class LinearMachine(Protocol):
    """What runs a program: a backend."""

    @property
    def program(self) -> LinearProgram: ...

    def forward(self, inputs: LinearInputs, keep: bool = False) -> tuple[Tensor, Tensor, Any]:
        """o, the final states, and what `backward` wants where `keep` says that it will come."""
        ...

    def backward(
        self, inputs: LinearInputs, kept: Any, d_out: Tensor, d_states: Tensor, wanted: Sequence[str]
    ) -> tuple[dict[str, Tensor], Tensor]: ...


def attend(machine: LinearMachine, inputs: LinearInputs) -> tuple[Tensor, Tensor]:
    """o (B, H, T, Dv) in v's type, and the final states."""
    tensors = inputs.tensors()
    names = tuple(tensors)
    needed = [*tensors.values(), *([] if inputs.initial_state is None else [inputs.initial_state])]
    if not (torch.is_grad_enabled() and any(x.requires_grad for x in needed)):
        o, states, _ = machine.forward(inputs)
        return o.to(inputs.v.dtype), states
    return _LinearAttention.apply(machine, inputs, names, inputs.initial_state, *tensors.values())


class _LinearAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        machine: LinearMachine,
        inputs: LinearInputs,
        names: tuple[str, ...],
        initial: Tensor | None,
        *tensors: Tensor,
    ) -> tuple[Tensor, Tensor]:
        inputs = _with(inputs, names, initial, tensors)
        o, states, kept = machine.forward(inputs, keep=True)
        ctx.machine, ctx.names, ctx.kept = machine, names, kept
        ctx.about = replace(inputs, q=None, k=None, v=None, decay=None, beta=None, captured={})
        ctx.save_for_backward(initial, *tensors)
        return o.to(inputs.v.dtype), states

    @staticmethod
    def backward(ctx: Any, d_out: Tensor, d_states: Tensor) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            raise TransformNotSupported(
                transform="a second derivative",
                instead='Differentiate engine.reference instead, or the engine with backend="reference".',
            )
        initial, *tensors = ctx.saved_tensors
        inputs = _with(ctx.about, ctx.names, initial, tuple(tensors))
        needs = ctx.needs_input_grad[4:]
        wanted = tuple(n for n, need in zip(ctx.names, needs, strict=True) if need)
        given = dict(zip(ctx.names, tensors, strict=True))
        found, d_initial = found_gradients(ctx.machine, inputs, ctx.kept, d_out, d_states, wanted, given)
        return (
            None, None, None, None if initial is None else d_initial.to(initial.dtype),
            *(found.get(n) for n in ctx.names),
        )  # fmt: skip


def found_gradients(
    machine: LinearMachine,
    inputs: LinearInputs,
    kept: Any,
    d_out: Tensor,
    d_states: Tensor,
    wanted: tuple[str, ...],
    given: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], Tensor]:
    """The gradients of those `given` tensors that are `wanted`, by name, and that of the initial states."""
    found, d_initial = machine.backward(inputs, kept, d_out, d_states, wanted)
    program = machine.program
    return {n: _gradient(program, inputs, n, given[n], found) for n in wanted}, d_initial


def _with(
    inputs: LinearInputs, names: tuple[str, ...], initial: Tensor | None, tensors: tuple[Tensor, ...]
) -> LinearInputs:
    named = dict(zip(names, tensors, strict=True))
    own = {name: named.get(name) for name in POSITIONAL}
    captured = {n: x for n, x in named.items() if n not in POSITIONAL}
    return replace(inputs, initial_state=initial, captured=captured, **own)


def _gradient(
    program: LinearProgram, inputs: LinearInputs, name: str, x: Tensor, found: dict[str, Tensor]
) -> Tensor:
    """The gradient of an input, from what the machine has found for each head of v."""
    if name not in POSITIONAL:
        return _captured_gradient(program, inputs, name, x, found)
    d = found.get(f"d_{name}")
    if d is None:
        return torch.zeros_like(x)
    if d.ndim < x.ndim:
        d = d.expand(x.shape)
    if x.ndim == 1:  # a decay of each head
        return d.sum(0).to(x.dtype)
    if x.shape[1] != d.shape[1]:  # heads of q or k that several heads of v share
        d = d.unflatten(1, (x.shape[1], -1)).sum(2)
    return d.to(x.dtype)


def _captured_gradient(
    program: LinearProgram, inputs: LinearInputs, name: str, x: Tensor, found: dict[str, Tensor]
) -> Tensor:
    """The sum over every read. In float64, which torch adds by index one after the other: the same bits every time."""
    total = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    for read in captured_reads(program):
        if read.tensor == name and (d := found.get(read_gradient(program, read))) is not None:
            _scatter(total, program, inputs, read, d)
    return total.to(x.dtype)


def _scatter(total: Tensor, program: LinearProgram, inputs: LinearInputs, read: Load, d: Tensor) -> None:
    """total[indices of the read] += d (B, H, then the axes of the read)."""
    tokens = torch.arange(inputs.q.shape[2] if "q" in read.axes else 1)
    rows = TokenRows(program, inputs, slice(0, d.shape[0]), tokens, torch.float64, with_inputs=False)
    value = Var("gradient", read.dtype, read.axes)
    rows.give(value, d)
    dense = rows.environment[value]
    assert isinstance(dense, Tensor)
    if not read.indices:
        total += dense.sum()
        return
    where = evaluate_all(read.indices, rows.environment, inputs.captured, torch.float64)
    places = [i.clamp(0, size - 1) for i, size in zip(where, total.shape, strict=True)]
    shape = torch.broadcast_shapes(dense.shape, *(p.shape for p in places))
    total.index_put_(tuple(p.expand(shape) for p in places), dense.expand(shape), accumulate=True)

"""The operators that torch.compile sees of a linear attention: one node for a call, one for its gradients.

A graph holds tensors and numbers, so an operator finds its engine by a number. It checks its tensors, and whether the
mods are still what they were, when it runs.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from attn_engine.codegen.backends.chunk_params import SEGMENT_TOKENS
from attn_engine.errors import GradientNotSupported, StaleGraph, TransformNotSupported, UnsupportedOnBackend
from attn_engine.runtime.bind import custom_by_name
from attn_engine.runtime.linear_autograd import found_gradients
from attn_engine.runtime.linear_cpu import CpuChunks
from attn_engine.runtime.storage import STORAGES, compute_dtype

if TYPE_CHECKING:
    from attn_engine.linear_engine import LinearAttentionEngine

_engines: WeakValueDictionary[int, LinearAttentionEngine] = WeakValueDictionary()
_numbers = itertools.count()


def numbered(engine: LinearAttentionEngine) -> int:
    """A number by which the operators find the engine for as long as it lives."""
    number = next(_numbers)
    _engines[number] = engine
    return number


def engine_of(number: int) -> LinearAttentionEngine:
    engine = _engines.get(number)
    if engine is None:
        raise StaleGraph(what="the engine that the graph was made with no longer exists")
    return engine


def in_graph(
    engine: LinearAttentionEngine,
    number: int,
    rows: tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None],
    custom: Sequence[Tensor],
    named: dict[str, Tensor],
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """o and the final states of a call that torch traces."""
    if engine.backend == "reference":
        instead = "Call it outside of the compiled function (torch.compiler.disable), or use another backend."
        raise UnsupportedOnBackend(backend="reference", feature="torch.compile", instead=instead)
    by_name = custom_by_name(engine.custom_io.shapes, custom, named)
    o, states, _ = torch.ops.attn_engine.linear_forward(
        *rows, initial, cu_seqlens, list(by_name.values()), number
    )
    return o, states


def _bound(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    beta: Tensor | None,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    custom: Sequence[Tensor],
    number: int,
) -> tuple[Any, Any, Any]:
    """(machine, inputs, traced), all checked as in a call."""
    engine = engine_of(number)
    traced, inputs = engine.bind(q, k, v, decay, tuple(custom), {}, beta, initial, cu_seqlens)
    for name, x in traced.bound().items():
        if x.requires_grad:
            raise GradientNotSupported(
                backend="torch.compile",
                what=f"{name}, which a mod captures",
                instead="Declare it in custom_io and pass it to the call, or detach it.",
            )
    return engine.machine(traced, q.device), inputs, traced


@torch.library.custom_op("attn_engine::linear_forward", mutates_args=())
def _forward_op(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    decay: torch.Tensor | None,
    beta: torch.Tensor | None,
    initial: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    custom: list[torch.Tensor],
    number: int,
) -> list[torch.Tensor]:
    """[o, the final states, what the backward pass wants]; what is kept has room for the most segments there can be."""
    machine, inputs, _ = _bound(q, k, v, decay, beta, initial, cu_seqlens, custom, number)
    o, states, kept = machine.forward(inputs, keep=True)
    _, room, _ = _sizes(v, cu_seqlens, number)
    stored = states.new_zeros((room, *states.shape[1:]))
    if kept is not None:
        stored[: len(kept)] = kept
    return [_turned(o.to(v.dtype), number).contiguous(), states, stored]


def _turned(x: Tensor, number: int) -> Tensor:
    """From logical order to the engine's layout, or back."""
    return x.transpose(1, 2) if engine_of(number).layout == "bshd" and x.ndim > 2 else x


def _empty_output(v: Tensor, number: int) -> Tensor:
    return torch.empty_like(v, memory_format=torch.contiguous_format)


def _sizes(v: Tensor, cu_seqlens: Tensor | None, number: int) -> tuple[Any, Any, int]:
    """The sequences, the most segments that their states are kept of, and the columns of a state."""
    engine = engine_of(number)
    batch, tokens = v.shape[0], v.shape[1 if engine.layout == "bshd" else 2]
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    room = batch * (tokens // SEGMENT_TOKENS) + sequences
    return sequences, room, engine.state_columns


@_forward_op.register_fake
def _(q, k, v, decay, beta, initial, cu_seqlens, custom, number):
    sequences, room, columns = _sizes(v, cu_seqlens, number)
    heads = v.shape[2 if engine_of(number).layout == "bshd" else 1]
    dtype = compute_dtype(STORAGES[v.dtype])
    shape = (heads, q.shape[3], columns)
    return [
        _empty_output(v, number),
        v.new_empty((sequences, *shape), dtype=dtype),
        v.new_empty((room, *shape), dtype=dtype),
    ]


@torch.library.custom_op("attn_engine::linear_backward", mutates_args=())
def _backward_op(
    d_out: torch.Tensor,
    d_states: torch.Tensor,
    rows: list[torch.Tensor],
    decay: torch.Tensor | None,
    beta: torch.Tensor | None,
    initial: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    custom: list[torch.Tensor],
    kept: torch.Tensor,
    number: int,
) -> list[torch.Tensor]:
    """The gradients of all tensors in the order of the call, without those that were not given."""
    q, k, v = rows
    machine, inputs, traced = _bound(q, k, v, decay, beta, initial, cu_seqlens, custom, number)
    read = {engine_name: name for name, engine_name in traced.custom_names().items()}
    names = [read.get(n, "") for n in engine_of(number).custom_io]
    tensors = {n: x for n, x in inputs.tensors().items() if x.is_floating_point()}
    states = kept if isinstance(machine, CpuChunks) else None
    found, d_initial = found_gradients(
        machine, inputs, states, _turned(d_out, number), d_states, tuple(tensors), tensors
    )
    own = [_turned(found[n], number) for n in ("q", "k", "v", "decay", "beta") if n in found]
    own += [] if initial is None else [d_initial.to(initial.dtype)]
    own += [found[n] if n in found else torch.zeros_like(x) for n, x in zip(names, custom, strict=True)]
    return [x.contiguous() for x in own]


@_backward_op.register_fake
def _(d_out, d_states, rows, decay, beta, initial, cu_seqlens, custom, kept, number):
    given = [*rows, *(x for x in (decay, beta, initial) if x is not None), *custom]
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in given]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    q, k, v, decay, beta, initial, cu_seqlens, custom, number = inputs
    ctx.number, ctx.count = number, len(custom)
    ctx.save_for_backward(q, k, v, decay, beta, initial, cu_seqlens, output[2], *custom)


def _backward(ctx: Any, gradients: list[Tensor]) -> tuple[Any, ...]:
    q, k, v, decay, beta, initial, cu_seqlens, kept, *custom = ctx.saved_tensors
    found = torch.ops.attn_engine.linear_backward(
        gradients[0], gradients[1], [q, k, v], decay, beta, initial, cu_seqlens, custom, kept, ctx.number
    )
    rest = iter(found)
    own = [None if x is None else next(rest) for x in (q, k, v, decay, beta, initial)]
    return (
        *own,
        None,
        [d if x.is_floating_point() else None for d, x in zip(rest, custom, strict=True)],
        None,
    )


def _second_backward(ctx: Any, *_: Any) -> Any:
    raise TransformNotSupported(
        transform="a second derivative",
        instead='Differentiate engine.reference instead, or the engine with backend="reference".',
    )


_backward_op.register_autograd(_second_backward)
_forward_op.register_autograd(_backward, setup_context=_setup_context)

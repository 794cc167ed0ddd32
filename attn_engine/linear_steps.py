"""engine.step: one token after another, for decoding. What equal steps share is laid out once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attn_engine.errors import GradientNotSupported, NotATensor, WrongRank
from attn_engine.linear_errors import StateMismatch
from attn_engine.runtime.linear_cpu import CpuChunks, Step
from attn_engine.runtime.linear_inputs import LinearInputs

if TYPE_CHECKING:
    from attn_engine.linear_engine import LinearAttentionEngine
    from attn_engine.traced_linear import TracedLinear


@dataclass(eq=False)
class StepPlan:
    """How steps of one kind of tensors run."""

    traced: TracedLinear
    names: tuple[
        str, ...
    ]  # the kernel's names of the call's tensors, in the order of the call; "" for unread ones
    run: Step | None


def step(
    engine: LinearAttentionEngine,
    rows: tuple[Tensor, Tensor, Tensor, Tensor | None],
    state: Tensor,
    custom: Sequence[Tensor],
    beta: Tensor | None,
    position: int,
    named: dict[str, Tensor],
    plans: dict[tuple[object, ...], StepPlan],
) -> tuple[Tensor, Tensor]:
    """o of one token, and `state` changed to that after it."""
    custom = (*custom, *(named[n] for n in engine.custom_io if n in named)) if named else tuple(custom)
    tensors = (*rows, beta, state, *custom)
    signature = tuple(
        [None if x is None else (x.shape, x.stride(), x.dtype) for x in tensors if _is_tensor(x)]
    )
    plan = plans.get(signature)
    if plan is None or plan.traced.stale():
        plan = plans[signature] = _plan(engine, rows, state, custom, beta)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        instead = "Call it under torch.no_grad(), or use the engine itself with initial_state= and one token."
        raise GradientNotSupported(
            backend=engine.backend, what="a step, which changes its state", instead=instead
        )
    v = rows[2]
    if plan.run is not None:
        found = {n: x for n, x in zip(plan.names, (*rows, beta, *custom), strict=True) if n and x is not None}
        if plan.traced.watched:
            found |= plan.traced.bound()
        out = torch.empty(v.shape, dtype=v.dtype)
        plan.run(found, state, out, position)
        return out, state
    inputs = _inputs(engine, rows, state, custom, beta)[1]
    machine = engine.machine(plan.traced, v.device)
    out, after, _ = machine.forward(inputs)
    state.copy_(after)
    return out[:, :, 0].to(v.dtype), state


def _is_tensor(x: object) -> bool:
    if x is not None and not isinstance(x, Tensor):
        raise NotATensor(argument="a tensor of step", got=type(x).__name__)
    return True


def _inputs(
    engine: LinearAttentionEngine,
    rows: tuple[Tensor, Tensor, Tensor, Tensor | None],
    state: Tensor,
    custom: Sequence[Tensor],
    beta: Tensor | None,
) -> tuple[TracedLinear, LinearInputs]:
    """The step as a call of the engine with one token, checked."""
    if not isinstance(state, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
        expected = "a tensor (batch, heads, D of k, D of v), zeros before the first token"
        raise StateMismatch(argument="state", got=f"no tensor: {state!r}", expected=expected)
    token = 1 if engine.layout == "bshd" else 2
    for name, x in zip("qkv", rows[:3], strict=False):
        assert x is not None
        if x.ndim != 3:
            layout = "(batch, heads, dim): one token"
            raise WrongRank(argument=name, got=x.ndim, shape=tuple(x.shape), expected=3, layout=layout)
    q, k, v, decay = rows
    lifted = [x.unsqueeze(token) for x in (q, k, v)]
    decay = decay if decay is None or decay.ndim == 1 else decay.unsqueeze(token)
    beta = None if beta is None else beta.unsqueeze(token)
    return engine.bind(lifted[0], lifted[1], lifted[2], decay, custom, {}, beta, state, None)


def _plan(
    engine: LinearAttentionEngine,
    rows: tuple[Tensor, Tensor, Tensor, Tensor | None],
    state: Tensor,
    custom: Sequence[Tensor],
    beta: Tensor | None,
) -> StepPlan:
    traced, inputs = _inputs(engine, rows, state, custom, beta)
    if not state.is_contiguous():
        got, expected = f"strides {state.stride()}", "a contiguous tensor, which a step changes in place"
        raise StateMismatch(argument="the state", got=got, expected=expected)
    machine = engine.machine(traced, state.device)
    if not isinstance(machine, CpuChunks) or traced.program.scalars:
        return StepPlan(traced, (), None)
    given = {custom: name for name, custom in traced.custom_names().items()}
    names = ("Q", "K", "V", "decay_given", "beta_given", *(given.get(n, "") for n in engine.custom_io))
    return StepPlan(traced, names, machine.prepare_step(inputs))

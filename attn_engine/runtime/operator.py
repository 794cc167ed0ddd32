"""The operator that torch sees: attn_engine::forward and ::backward, with fake implementations and autograd.

A call outside torch.compile takes the direct way through `torch.autograd.Function`, which costs a few microseconds; a
call that torch traces goes through the registered operators, so a compiled graph holds one node for the attention.
Both run the same two functions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from attn_engine.errors import PooledMaximumNotDifferentiable, UnsupportedOnBackend
from attn_engine.ir.ops import Number
from attn_engine.runtime.bind import check_kind
from attn_engine.runtime.call import Call, registered
from attn_engine.runtime.launch_plan import CallKind
from attn_engine.runtime.make_plan import planned_backward, planned_forward
from attn_engine.runtime.pools import pooled_gradients
from attn_engine.runtime.second_derivatives import no_second_derivative, second_derivatives
from attn_engine.runtime.storage import compute_dtype
from attn_engine.runtime.strides import empty_ordered_like


def run_forward(
    call: Call,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    captured: Mapping[str, Tensor],
    numbers: Mapping[str, Number],
    kind: CallKind | None = None,
) -> list[Tensor]:
    """[o, saved rows..., pooled weights...], or [o, all saved rows in one tensor (their number, B, H, Sq)] where `kind`
    has a plan."""
    if kind is not None and (plan := planned_forward(call, kind, q, k, v, captured)) is not None:
        return plan.run(q, k, v, captured, numbers)
    out = call.empty_output(q, v)
    views = (call.logical(q), call.logical(k), call.logical(v))
    found = call.compiled.forward(*views, captured, numbers, call.logical(out))
    if call.packed:
        rows = len(call.compiled.saved_names)
        found = [*call.without_batch(found[:rows]), *found[rows:]]
    return [out, *found]


def run_backward(
    call: Call,
    d_out: Tensor | None,
    tensors: Sequence[Tensor],
    captured: Mapping[str, Tensor],
    numbers: Mapping[str, Number],
    learned: tuple[str, ...],
    d_rows: Sequence[Tensor | None] = (),
    kind: CallKind | None = None,
) -> list[Tensor]:
    """[dq, dk, dv, gradients of `learned`...], lying as q, k, v do; `tensors` is q, k, v, o and the saved rows, each or
    all in one tensor.

    d_out, and each of d_rows (one per saved row value): None where no loss depends on it.
    """
    q, k, v, out, *saved = tensors
    given = {n: x for n, x in zip(call.rows, d_rows, strict=False) if x is not None}
    if not call.refused.isdisjoint(given):
        raise PooledMaximumNotDifferentiable()
    moved = {n: x for n, x in given.items() if n in call.moving}
    d_out = torch.zeros_like(out) if d_out is None else d_out
    if len(saved) == 1 and saved[0].ndim == 4:
        plan = (
            None
            if kind is None or learned or moved
            else planned_backward(call, kind, d_out, tensors, captured)
        )
        if plan is not None:
            return plan.run(d_out, tensors, captured, numbers)
        saved = list(saved[0])
    d_pools = pooled_gradients(call.rows, saved, moved)
    saved = call.with_batch(saved[: len(call.compiled.saved_names)])
    moved = dict(zip(moved, call.with_batch([*moved.values()]), strict=True))
    dq, dk, dv = (empty_ordered_like(x) for x in (q, k, v))
    found = call.compiled.backward(
        call.logical(d_out),
        (call.logical(q), call.logical(k), call.logical(v)),
        call.logical(out),
        saved,
        captured,
        numbers,
        (call.logical(dq), call.logical(dk), call.logical(dv)),
        learned,
        moved,
        d_pools,
    )
    return [dq, dk, dv, *(found[name] for name in learned)]


class _Function(torch.autograd.Function):
    """with_rows: the saved row values are outputs beside o, one by one, and may have gradients of their own."""

    @staticmethod
    def forward(
        ctx: Any,
        call: Call,
        numbers: Mapping[str, Number],
        kind: CallKind | None,
        with_rows: bool,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *captured: Tensor,
    ):
        by_name = call.named(captured)
        out, *saved = run_forward(call, q, k, v, by_name, numbers, kind)
        if kind is not None and not call.compiled.program.rule.pooled:
            saved = [_in_one(call, q, saved)]
        ctx.save_for_backward(q, k, v, out, *saved, *captured)
        ctx.call, ctx.numbers, ctx.kind, ctx.rows = call, numbers, kind, len(saved)
        ctx.learned = call.learned(by_name)
        if not with_rows:
            return out
        ctx.set_materialize_grads(False)
        # What is refused is not marked: its gradient would be left out where the error can still be told.
        ctx.mark_non_differentiable(*call.fixed(saved[: len(call.compiled.saved_names)]))
        return out, *saved

    @staticmethod
    def backward(ctx: Any, d_out: Tensor | None, *d_rows: Tensor | None):
        # Gradients are recorded only on the way to second derivatives.
        gradients = _Gradients.apply if torch.is_grad_enabled() else _gradients
        stored = ctx.saved_tensors
        found = gradients(ctx.call, ctx.numbers, ctx.kind, ctx.learned, ctx.rows, d_out, *stored, *d_rows)
        by_name = dict(zip(ctx.learned, found[3:], strict=True))
        return (None, None, None, None, *found[:3], *(by_name.get(n) for n in ctx.call.captures))


def _in_one(call: Call, q: Tensor, saved: Sequence[Tensor]) -> Tensor:
    """Saved rows in one tensor, as a plan has them: checkpointing compares a call with its repetition, which may be the
    first one that has a plan."""
    if len(saved) == 1 and saved[0].ndim == 4:
        return saved[0]
    if not saved:
        return q.new_empty((0, *call.logical(q).shape[:3]), dtype=call.compiled.compute)
    return torch.stack(tuple(saved))


def _gradients(
    call: Call,
    numbers: Mapping[str, Number],
    kind: CallKind | None,
    learned: tuple[str, ...],
    rows: int,
    d_out: Tensor | None,
    *given: Any,
) -> tuple[Tensor, ...]:
    """dq, dk, dv and those of `learned`; `given` is q, k, v, o, `rows` tensors of saved rows, what is captured, and the
    gradients of the rows where they were outputs."""
    stored, d_rows = given[: (end := 4 + rows + len(call.captures))], given[end:]
    captured = call.named(stored[4 + rows :])
    return tuple(run_backward(call, d_out, stored[: 4 + rows], captured, numbers, learned, d_rows, kind))


class _Gradients(torch.autograd.Function):
    """The backward pass as a step of its own, so that differentiating it is another, or says that it cannot be done."""

    @staticmethod
    def forward(ctx: Any, call: Call, numbers: Mapping[str, Number], *arguments: Any):
        kind, learned, rows, *given = arguments
        ctx.call, ctx.numbers, ctx.learned, ctx.rows = call, numbers, learned, rows
        ctx.save_for_backward(*given)
        return _gradients(call, numbers, kind, learned, rows, *given)

    @staticmethod
    def backward(ctx: Any, *wanted: Tensor | None):
        if not ctx.call.twice:
            raise no_second_derivative()
        found = second_derivatives(ctx.call, ctx.numbers, ctx.learned, ctx.rows, ctx.saved_tensors, wanted)
        return (None, None, None, None, None, *found)


def apply(
    call: Call,
    key: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    captured: Mapping[str, Tensor],
    numbers: Mapping[str, Number],
    kind: CallKind | None = None,
    with_rows: bool = False,
) -> tuple[Tensor, Iterable[Tensor]]:
    """o, and with_rows the saved rows one by one; recorded for autograd where an input requires it.

    kind: what is remembered of calls with exactly these shapes and strides; None: nothing.
    """
    tensors = (q, k, v, *captured.values())
    if _through_operator(q):
        scalars = [float(x) for x in numbers.values()]
        out, *rows = torch.ops.attn_engine.forward(q, k, v, list(captured.values()), scalars, key)
        return out, rows
    if _recorded(tensors):
        call.refuse_training(tensors)
        if call.compiled.program.sequences is not None:
            kind = None  # forward passes alone have plans
        if with_rows:  # each an output of its own, so not in one tensor
            out, *rows = _Function.apply(call, numbers, None, True, *tensors)
            return out, rows
        return _Function.apply(call, numbers, kind, False, *tensors), ()
    out, *rows = run_forward(call, q, k, v, captured, numbers, kind)
    # In one tensor, which is as good as a list of them but is cut apart only where somebody looks.
    return out, rows[0] if len(rows) == 1 and rows[0].ndim == 4 else rows


def stays_direct(tensors: Sequence[Tensor]) -> bool:
    """Whether a call of these tensors, q first, is neither recorded for autograd nor seen by torch as an operator."""
    return not _through_operator(tensors[0]) and not _recorded(tensors)


def _through_operator(q: Tensor) -> bool:
    plain = type(q) is Tensor or isinstance(q, torch.nn.Parameter)
    # A mode that watches operators (selective checkpointing, counters) is to see one.
    return torch.compiler.is_compiling() or not plain or bool(torch._C._len_torch_dispatch_stack())


def _recorded(tensors: Sequence[Tensor]) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


# -- the registered operators; the decorators read the annotations, so these must be real types


@torch.library.custom_op("attn_engine::forward", mutates_args=())
def _forward_op(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    captured: list[torch.Tensor],
    scalars: list[float],
    key: int,
) -> list[torch.Tensor]:
    call = registered(key)
    numbers = call.numbers(scalars)
    call.checks.everything(q, k, v, captured, numbers)
    return run_forward(call, q, k, v, call.named(captured), numbers)


@_forward_op.register_fake
def _(q, k, v, captured, scalars, key):
    call = registered(key)
    known = all(isinstance(size, int) for x in (q, k, v) for size in x.shape)
    rank = 3 if call.packed else 4
    if known or any(
        x.ndim != rank for x in (q, k, v)
    ):  # sizes that are symbols are checked when the graph runs
        call.checks.shapes(q, k, v)
    rows = compute_dtype(call.compiled.program.element)
    logical = call.logical(q)
    rule, (batches, heads, q_len, _) = call.compiled.program.rule, logical.shape
    if call.compiled.program.sequences is not None and rule.pooled:
        raise UnsupportedOnBackend(
            backend="torch.compile",
            feature="pooled weights of sequences of their own lengths: their shape depends on the lengths",
            instead="Call the engine outside of the compiled function (torch.compiler.disable).",
        )
    saved = call.without_batch([q.new_empty((batches, heads, q_len), dtype=rows) for _ in rule.saved])
    counts = [(call.logical(k).shape[2] + p.block - 1) // p.block for p in rule.pooled]
    return [
        call.empty_output(q, v),
        *saved,
        *(q.new_empty((batches, heads, q_len, count), dtype=rows) for count in counts),
    ]


@torch.library.custom_op("attn_engine::backward", mutates_args=())
def _backward_op(
    d_out: torch.Tensor | None,
    tensors: list[torch.Tensor],
    captured: list[torch.Tensor],
    scalars: list[float],
    learned: str,
    d_rows: list[torch.Tensor],
    used: list[int],
    key: int,
) -> list[torch.Tensor]:
    names = tuple(learned.split()) if learned else ()
    call = registered(key)
    q, k, v, out, *saved = tensors
    call.checks.shapes(q, k, v)
    if d_out is not None:
        d_out = _like(d_out, out)
    arriving: list[Tensor | None] = [None] * len(saved)
    for i, x in zip(used, d_rows, strict=True):
        arriving[i] = _like(x, saved[i])
    for described, x in zip(call.compiled.program.captures, captured, strict=False):
        check_kind(described, x)
    return run_backward(call, d_out, tensors, call.named(captured), call.numbers(scalars), names, arriving)


def _like(x: Tensor, wanted: Tensor) -> Tensor:
    """x in the shape, dtype and place of the tensor whose gradient it is."""
    same = x.shape == wanted.shape and x.dtype is wanted.dtype and x.device == wanted.device
    return x if same else x.expand(wanted.shape).to(wanted)


@_backward_op.register_fake
def _(d_out, tensors, captured, scalars, learned, d_rows, used, key):
    call = registered(key)
    named = call.named(captured)
    wanted = learned.split() if learned else []
    same = [empty_ordered_like(x) for x in tensors[:3]]
    return [
        *same,
        *(torch.empty(named[n].shape, dtype=named[n].dtype, device=tensors[0].device) for n in wanted),
    ]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    q, k, v, captured, scalars, key = inputs
    ctx.key, ctx.scalars, ctx.rows = key, scalars, len(output) - 1
    ctx.call = registered(key)
    ctx.call.refuse_training((q, k, v, *captured))
    ctx.learned = ctx.call.learned(ctx.call.named(captured))
    ctx.save_for_backward(q, k, v, *output, *captured)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*ctx.call.fixed(output[1:]))


def _backward(ctx: Any, d_outputs: list[Tensor | None]) -> tuple[Any, ...]:
    stored = ctx.saved_tensors
    tensors, captured = list(stored[: 4 + ctx.rows]), list(stored[4 + ctx.rows :])
    d_out, *d_rows = d_outputs
    used = [i for i, x in enumerate(d_rows) if x is not None]
    dq, dk, dv, *found = torch.ops.attn_engine.backward(
        d_out,
        tensors,
        captured,
        ctx.scalars,
        " ".join(ctx.learned),
        [d_rows[i] for i in used],
        used,
        ctx.key,
    )
    by_name = dict(zip(ctx.learned, found, strict=True))
    names = ctx.call.captures
    unread = [None] * (len(captured) - len(names))
    return dq, dk, dv, [*(by_name.get(n) for n in names), *unread], None, None


def _second_backward(ctx: Any, *_: Any) -> Any:
    raise no_second_derivative()


_backward_op.register_autograd(_second_backward)
_forward_op.register_autograd(_backward, setup_context=_setup_context)

"""Derivatives of the backward pass, by the dense definition: O(Sq * Skv) memory, in float64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from attn_engine.errors import TransformNotSupported
from attn_engine.ir.ops import Number
from attn_engine.runtime.compiled import CompiledAttention
from attn_engine.runtime.reference import reference


class Differentiated(Protocol):
    """What a call means besides its tensors (`operator.Call`)."""

    @property
    def compiled(self) -> CompiledAttention: ...

    def logical(self, x: Tensor) -> Tensor: ...

    def named(self, captured: Sequence[Tensor]) -> dict[str, Tensor]: ...


def no_second_derivative() -> TransformNotSupported:
    return TransformNotSupported(
        transform="second derivatives (the gradient of a gradient)",
        instead="Use engine.reference, which is plain torch and can be differentiated any number of times.",
    )


def second_derivatives(
    call: Differentiated,
    numbers: Mapping[str, Number],
    learned: Sequence[str],
    rows: int,
    given: Sequence[Tensor | None],
    wanted: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """The gradients of sum(first * wanted) with respect to `given`; `first` is dq, dk, dv and those of `learned`.

    given: d_out, q, k, v, o, `rows` tensors of saved rows, the captured tensors, and the gradients of the rows where
    they were outputs. o and the saved rows are functions of the others and get none. The results can be differentiated
    again.
    """
    d_out, q, k, v, *rest = given
    if q is None or k is None or v is None:
        raise AssertionError("q, k and v are always kept")
    captured = call.named([x for x in rest[1 + rows :] if x is not None])
    d_rows = rest[1 + rows + len(captured) :]
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views of their own: what follows must not run on into the graphs that made the tensors.
        q, k, v = (_leaf(x) for x in (q, k, v))
        tensors = {name: _leaf(x) if name in learned else x for name, x in captured.items()}
        views = call.logical(q), call.logical(k), call.logical(v)
        out, row_values = reference(call.compiled.program, *views, tensors, numbers)
        outputs = [(call.logical(out), d_out), *zip(row_values.values(), d_rows, strict=False)]
        losses = [(x, None if w is None or not x.requires_grad else _leaf(w)) for x, w in outputs]
        used = [(x, w) for x, w in losses if w is not None]
        sources = [q, k, v, *(tensors[name] for name in learned)]
        total = torch.stack([(x * w.to(x.dtype)).nan_to_num(0.0, 0.0, 0.0).sum() for x, w in used]).sum()
        first = torch.autograd.grad(total, sources, create_graph=True, materialize_grads=True)
        second = [(x * w).sum() for x, w in zip(first, wanted, strict=True) if w is not None]
        ends = [*sources, *(w for _, w in used)]
        found = torch.autograd.grad(
            torch.stack(second).sum(), ends, create_graph=again, materialize_grads=True
        )
    of_losses = iter(found[len(sources) :])
    of_out, *of_rows = (None if w is None else next(of_losses) for _, w in losses)
    by_name = dict(zip(learned, found[3 : len(sources)], strict=True))
    unread = [None] * (1 + rows)
    return [of_out, *found[:3], *unread, *(by_name.get(name) for name in captured), *of_rows][: len(given)]


def _leaf(x: Tensor) -> Tensor:
    return x.view_as(x) if x.requires_grad else x.detach().requires_grad_()

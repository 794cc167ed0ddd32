"""Derivatives of the backward pass, by the dense definition: O(Sq * Skv) memory, in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from attn_engine.ir.ops import Number
from attn_engine.ir.program import Attention
from attn_engine.runtime.reference import reference

Given = list[Tensor | None]


def second_derivatives(
    program: Attention,
    logical: Callable[[Tensor], Tensor],
    numbers: Mapping[str, Number],
    inputs: tuple[Tensor, Tensor, Tensor],
    captured: Mapping[str, Tensor],
    learned: Sequence[str],
    d_out: Tensor | None,
    d_rows: Sequence[Tensor | None],
    wanted: Sequence[Tensor | None],
) -> tuple[Given, dict[str, Tensor | None], Tensor | None, Given]:
    """The gradients of sum(first * wanted), where `first` is dq, dk, dv and those of `learned`: with respect to q, k
    and v, to the captured tensors by name, to d_out and to d_rows. They can be differentiated again.
    """
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views of their own: what follows must not run on into the graphs that made the tensors.
        q, k, v = (_leaf(x) for x in inputs)
        tensors = {name: _leaf(x) if name in learned else x for name, x in captured.items()}
        out, rows = reference(program, logical(q), logical(k), logical(v), tensors, numbers)
        weighted = [(logical(out), d_out), *zip(rows.values(), d_rows, strict=False)]
        losses = [(x, _leaf(w.to(x.dtype))) for x, w in weighted if w is not None and x.requires_grad]
        sources = [q, k, v, *(tensors[name] for name in learned)]
        total = torch.stack([(x * w).nan_to_num(0.0, 0.0, 0.0).sum() for x, w in losses]).sum()
        first = torch.autograd.grad(total, sources, create_graph=True, materialize_grads=True)
        second = torch.stack(
            [(x * w).sum() for x, w in zip(first, wanted, strict=True) if w is not None]
        ).sum()
        ends = [*sources, *(w for _, w in losses)]
        found = torch.autograd.grad(second, ends, create_graph=again, materialize_grads=True)
    of_losses = iter(found[len(sources) :])
    given = [None if w is None or not x.requires_grad else next(of_losses).to(w.dtype) for x, w in weighted]
    by_name = {name: x.to(captured[name].dtype) for name, x in zip(learned, found[3:], strict=False)}
    rows_left: Given = [None] * (len(d_rows) - len(given) + 1)
    return list(found[:3]), {n: by_name.get(n) for n in captured}, given[0], [*given[1:], *rows_left]


def _leaf(x: Tensor) -> Tensor:
    return x.view_as(x) if x.requires_grad else x.detach().requires_grad_()

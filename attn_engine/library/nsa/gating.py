"""o = sum over branches of gate * O (equation 5), in one pass over each branch and its gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def gated(branches: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The sum over (gate, o) of gate[..., None] * o; gates have a number for each row of o."""
    gates, outs = zip(*branches, strict=True)
    return _Gated.apply(*gates, *outs)  # pyright: ignore


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        count = len(inputs) // 2
        gates, outs = inputs[:count], inputs[count:]
        ctx.save_for_backward(*inputs)
        total = outs[0] * gates[0].to(outs[0].dtype)[..., None]
        for gate, out in zip(gates[1:], outs[1:], strict=True):
            total.addcmul_(out, gate.to(out.dtype)[..., None])
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs: tuple[Tensor, ...] = ctx.saved_tensors
        count = len(inputs) // 2
        of_gates: list[Tensor | None] = []
        of_outs: list[Tensor | None] = []
        for i, (gate, out) in enumerate(zip(inputs[:count], inputs[count:], strict=True)):
            needs_gate, needs_out = ctx.needs_input_grad[i], ctx.needs_input_grad[count + i]
            rows = torch.linalg.vecdot(grad, out) if needs_gate else None
            of_gates.append(None if rows is None else rows.to(gate.dtype))
            of_outs.append(grad * gate.to(grad.dtype)[..., None] if needs_out else None)
        return (*of_gates, *of_outs)

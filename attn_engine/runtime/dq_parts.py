"""Where a one-kernel backward pass adds up a gradient: one part for each share, summed in order afterwards."""

from __future__ import annotations

import torch
from torch import Tensor

from attn_engine.ir.ops import Number
from attn_engine.runtime.large_outputs import in_large_pages


def parts_of(dq: Tensor, splits: int, dtype: torch.dtype, *, zeroed: bool = True) -> Tensor:
    """(splits, B, H, Sq, D) zeros: dq itself where it can hold the sum, else slices in dq's order of dimensions.

    zeroed: not where the kernel stores all of it.
    """
    if splits == 1 and dq.dtype is dtype:
        return (dq.zero_() if zeroed else dq).unsqueeze(0)
    order = sorted(range(4), key=lambda i: (-dq.stride(i), i))
    base = torch.empty((splits, *(dq.shape[i] for i in order)), dtype=dtype, device=dq.device)
    if base.device.type == "cpu":
        in_large_pages(base)
    if zeroed:
        base.zero_()
    back = [order.index(i) + 1 for i in range(4)]
    return base.permute(0, *back)


def sum_parts(dq: Tensor, parts: Tensor, scale: Number) -> None:
    """dq = scale times the sum of `parts`, added one after the other and without further memory."""
    splits = parts.shape[0]
    if splits == 1 and parts.dtype is dq.dtype:  # the kernel added to dq itself
        if scale != 1.0:
            dq.mul_(scale)
        return
    total = parts[0]
    for i in range(1, splits):
        total += parts[i]
    dq.copy_(total if scale == 1.0 else total.mul_(scale))

"""Rotary positions (RoFormer, arXiv:2104.09864): pairs of the first and the second half of the head dimension turn."""

from __future__ import annotations

import torch
from torch import Tensor

from attn_engine.library.nsa.sizes import refuse


class Rotary:
    """x at position t turned by t * base^(-2 i / dim) in its plane (i, i + dim / 2).

    >>> turned = Rotary(64)(torch.ones(2, 5, 4, 64), torch.arange(5))
    >>> turned.shape, bool((turned[:, 0] == 1).all())
    (torch.Size([2, 5, 4, 64]), True)
    """

    def __init__(self, dim: int, base: float = 10000.0) -> None:
        if dim % 2:
            refuse("dim", dim, "even", "Pairs of numbers are turned.")
        self.dim, self.base = dim, base

    def __call__(self, x: Tensor, positions: Tensor) -> Tensor:
        """x: (..., rows, heads, dim); positions: (rows,) or (..., rows)."""
        plane = torch.arange(self.dim // 2, device=x.device, dtype=torch.float32)
        angle = positions[..., None, None] * self.base ** (-2.0 * plane / self.dim)
        sin, cos = angle.sin().to(x.dtype), angle.cos().to(x.dtype)
        one, other = x.chunk(2, -1)
        return torch.cat((one * cos - other * sin, one * sin + other * cos), -1)

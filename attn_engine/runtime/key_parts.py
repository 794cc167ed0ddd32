"""dK and dV of a backward pass whose instances own queries: each has a part of its own, summed in order afterwards."""

from __future__ import annotations

import torch
from torch import Tensor

from attn_engine.codegen.lower.shares import DK_PARTS, DQ_SUMS, DV_PARTS
from attn_engine.ir.ops import Number
from attn_engine.runtime.dq_parts import parts_of, sum_parts


class KeyParts:
    """What the launch needs beside its inputs; `finish` fills dq, dk and dv (B, H, rows, D)."""

    def __init__(self, dq: Tensor, dk: Tensor, dv: Tensor, splits: int, compute: torch.dtype) -> None:
        self._gradients = {DQ_SUMS: dq, DK_PARTS: dk, DV_PARTS: dv}
        self._parts = {n: parts_of(x, 1 if x is dq else splits, compute) for n, x in self._gradients.items()}

    def tensors(self) -> dict[str, Tensor]:
        """By the kernel's names."""
        return {name: x.squeeze(0) if name == DQ_SUMS else x for name, x in self._parts.items()}

    def finish(self, scale: Number) -> None:
        """scale: of the scores; dQ is added up without it."""
        for name, x in self._gradients.items():
            sum_parts(x, self._parts[name], scale if name == DQ_SUMS else 1.0)

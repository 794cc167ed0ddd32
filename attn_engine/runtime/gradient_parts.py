"""Gradients of a one-kernel backward pass in parts: one for each share of the keys or queries, summed in order."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from attn_engine.codegen.lower.shares import DK_PARTS, DQ_PARTS, DQ_SUMS, DV_PARTS
from attn_engine.ir.ops import Number
from attn_engine.runtime.dq_parts import parts_of, sum_parts


class GradientParts:
    """What the launch needs beside its inputs; `finish` fills the gradients (B, H, rows, D)."""

    def __init__(
        self, wanted: Mapping[str, tuple[Tensor, int]], compute: torch.dtype, stored: bool = False
    ) -> None:
        """wanted: by the kernel's names, each gradient and in how many parts it is made. stored: the kernel stores
        every number of those of dK and dV; else it adds to zeros."""
        self._gradients = {name: x for name, (x, _) in wanted.items()}
        self._parts = {
            name: parts_of(x, count, compute, zeroed=not (stored and name in (DK_PARTS, DV_PARTS)))
            for name, (x, count) in wanted.items()
        }

    def tensors(self) -> dict[str, Tensor]:
        """By the kernel's names."""
        return {name: x.squeeze(0) if name == DQ_SUMS else x for name, x in self._parts.items()}

    def finish(self, scale: Number) -> None:
        """scale: of the scores; dQ is added up without it."""
        for name, x in self._gradients.items():
            sum_parts(x, self._parts[name], 1.0 if name in (DK_PARTS, DV_PARTS) else scale)


def gradient_parts(
    shares_queries: bool,
    gradients: tuple[Tensor, Tensor, Tensor],
    splits: int,
    compute: torch.dtype,
    stored: bool = True,
) -> GradientParts:
    """Of a launch whose instances own keys, or queries. gradients: dq, dk, dv. stored: every key belongs to a sequence
    of the call."""
    dq, dk, dv = gradients
    if not shares_queries:
        return GradientParts({DQ_PARTS: (dq, splits)}, compute)
    wanted = {DQ_SUMS: (dq, 1), DK_PARTS: (dk, splits), DV_PARTS: (dv, splits)}
    return GradientParts(wanted, compute, stored)

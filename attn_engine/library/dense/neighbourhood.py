"""Neighbourhood attention on lines, images and volumes (NATTEN, arXiv:2204.07143; dilated, arXiv:2209.15001)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from attn_engine.errors import WrongArgument
from attn_engine.frontend import MaskMod
from attn_engine.library.arguments import per_dimension, sizes


def neighbourhood(
    shape: Sequence[int] = (32, 32), kernel: int | Sequence[int] = 7, dilation: int | Sequence[int] = 1
) -> MaskMod:
    """Each query sees the `kernel` nearest keys along every dimension; at an edge the window moves inside.

    shape: of the grid, one to three dimensions; positions count its cells row by row. kernel, dilation: one number or
    one per dimension. With dilation d only cells of the same remainder mod d are neighbours.
    """
    grid = sizes("shape", shape, most=3)
    kernels, dilations = (
        per_dimension("kernel", kernel, len(grid)),
        per_dimension("dilation", dilation, len(grid)),
    )
    for extent, size, step in zip(grid, kernels, dilations, strict=True):
        if size * step > extent:
            expected = f"kernel * dilation of at most the {extent} cells of its dimension"
            raise WrongArgument(
                argument="kernel", got=kernel, expected=expected, instead="Take a smaller one."
            )
    strides = [math.prod(grid[i + 1 :]) for i in range(len(grid))]

    def neighbourhood_mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        visible: Any = None
        for extent, stride, size, step in zip(grid, strides, kernels, dilations, strict=True):
            query, key = q_idx // stride % extent, kv_idx // stride % extent
            near = _is_neighbour(query, key, extent, size, step)
            visible = near if visible is None else visible & near
        return visible

    return neighbourhood_mask


def _is_neighbour(query: Any, key: Any, extent: int, size: int, step: int) -> Any:
    """Whether two coordinates of a dimension are within one window of `size` cells, `step` apart."""
    if step == 1:
        first = torch.clamp(query - size // 2, 0, extent - size)
        return (first <= key) & (key < first + size)
    cells = (extent - query % step + step - 1) // step  # of this remainder
    first = torch.minimum((query // step - size // 2).clamp(min=0), cells - size)
    return (query % step == key % step) & (first <= key // step) & (key // step < first + size)

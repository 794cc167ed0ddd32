"""Sliding tile attention for video (STA, arXiv:2502.04507, section 3)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from attn_engine.errors import WrongArgument
from attn_engine.frontend import MaskMod
from attn_engine.library.arguments import sizes


def sliding_tile(
    shape: Sequence[int] = (16, 16, 16), tile: Sequence[int] = (4, 4, 4), window: Sequence[int] = (3, 3, 3)
) -> MaskMod:
    """Each query sees the whole tiles of a window of `window` tiles centred at its own, moved inside at the edges.

    shape: of the grid, up to three dimensions. tile: of one tile; it divides the shape. window: in tiles, odd.
    Positions count the cells of a tile before those of the next, so a tile is a run of prod(tile) positions.
    """
    grid, cells, windows = (
        sizes("shape", shape, most=3),
        sizes("tile", tile, most=3),
        sizes("window", window, most=3),
    )
    _check(grid, cells, windows)
    tiles = [extent // size for extent, size in zip(grid, cells, strict=True)]
    strides = [math.prod(tiles[i + 1 :]) for i in range(len(tiles))]
    in_tile = math.prod(cells)

    def sliding_tile_mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        visible: Any = None
        for count, stride, size in zip(tiles, strides, windows, strict=True):
            query, key = q_idx // in_tile // stride % count, kv_idx // in_tile // stride % count
            centre = torch.clamp(query, size // 2, count - 1 - size // 2)
            near = (key - centre <= size // 2) & (centre - key <= size // 2)
            visible = near if visible is None else visible & near
        return visible

    return sliding_tile_mask


def _check(grid: tuple[int, ...], cells: tuple[int, ...], windows: tuple[int, ...]) -> None:
    if not len(grid) == len(cells) == len(windows):
        expected = f"{len(grid)} sizes, as shape has"
        raise WrongArgument(
            argument="tile, window", got=(cells, windows), expected=expected, instead="Give one each."
        )
    for extent, size, window in zip(grid, cells, windows, strict=True):
        if extent % size:
            expected = f"a divisor of {extent} in that dimension"
            raise WrongArgument(
                argument="tile", got=cells, expected=expected, instead="Pad the grid, or take another."
            )
        if window % 2 == 0 or window > extent // size:
            expected = f"an odd number of at most {extent // size} tiles in that dimension"
            raise WrongArgument(
                argument="window", got=windows, expected=expected, instead="Take the next odd one."
            )

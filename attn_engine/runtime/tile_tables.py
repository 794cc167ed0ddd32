"""A kernel's tables: extremes of captured values over each tile, made by a few torch calls before the launch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from attn_engine.ir.expr import Var, variables
from attn_engine.ir.ops import DType, Number
from attn_engine.ir.tile import TileTable
from attn_engine.runtime.dense import DIMENSION, evaluate_dense

_COUNTED = {"batch": "batches", "head": "heads"}


def tile_tables(
    tables: Sequence[TileTable],
    captured: Mapping[str, Tensor],
    scalars: Mapping[str, Number],
    sizes: Mapping[str, int],
    compute: torch.dtype,
) -> dict[str, Tensor]:
    """Each table by its name: (batches and heads where it depends on them, tiles, 2), smallest and largest."""
    return {t.name: _table(t, captured, scalars, sizes, compute) for t in tables}


def _table(
    table: TileTable,
    captured: Mapping[str, Tensor],
    scalars: Mapping[str, Number],
    sizes: Mapping[str, int],
    compute: torch.dtype,
) -> Tensor:
    device = next(iter(captured.values())).device if captured else None
    rows = sizes[f"{table.axis}_len"]
    tiles = -(-rows // table.block)
    # Rows beyond the end repeat the last one: they add nothing to a tile.
    positions = torch.arange(tiles * table.block, device=device).clamp_(max=max(rows - 1, 0))
    read = variables(table.value)
    places = {f"{table.axis}_idx": positions}
    places |= {
        n: torch.arange(sizes[_COUNTED[n]], device=device) for n in _COUNTED if Var(n, DType.INT) in read
    }
    environment = {v: _along(v, places[v.name]) if v.name in places else scalars[v.name] for v in read}
    values = evaluate_dense(table.value, environment, captured, compute)
    by_tile = values.reshape(*(len(places[n]) for n in _COUNTED if n in places), tiles, table.block)
    if by_tile.dtype is torch.bool:
        return torch.stack((by_tile.all(-1), by_tile.any(-1)), -1)
    return torch.stack(torch.aminmax(by_tile, dim=-1), -1)


def _along(v: Var, values: Tensor) -> Tensor:
    """In the layout of dense evaluation."""
    shape = [1] * len(DIMENSION)
    shape[DIMENSION[v.axes[0] if v.axes else v.name]] = len(values)
    return values.reshape(shape)

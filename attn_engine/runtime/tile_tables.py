"""A kernel's tables: extremes of captured values over each tile, made by a few torch calls before the launch.

On the CPU a table is kept for as long as the tensors that it was made from live and stay unchanged. (On a GPU it is
made in every call: a kept one would belong to one stream, and a captured graph would not make it again.)
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from attn_engine.ir.expr import Expr, Load, Var, loads, variables
from attn_engine.ir.ops import DType, Number
from attn_engine.ir.tile import TileTable
from attn_engine.runtime.dense import DIMENSION, evaluate_dense, torch_kind
from attn_engine.runtime.versions import version_of

_COUNTED = {"batch": "batches", "head": "heads"}


def tile_tables(
    tables: Sequence[TileTable],
    captured: Mapping[str, Tensor],
    scalars: Mapping[str, Number],
    sizes: Mapping[str, int],
    compute: torch.dtype,
) -> dict[str, Tensor]:
    """Each table by its name: (batches and heads where it depends on them, tiles, 2), smallest and largest."""
    return {t.name: _kept_or_made(t, captured, scalars, sizes, compute) for t in tables}


# By what a table is made from; the tensors by identity, and weakly: an entry ends with any of them.
_kept: dict[Hashable, tuple[tuple[int, ...], tuple[weakref.ref[Tensor], ...], Tensor]] = {}
MOST_KEPT = 256


def _kept_or_made(
    table: TileTable,
    captured: Mapping[str, Tensor],
    scalars: Mapping[str, Number],
    sizes: Mapping[str, int],
    compute: torch.dtype,
) -> Tensor:
    tensors, numbers = _read(table.value)
    sources = [captured[name] for name in tensors]
    versions = [version_of(x) if x.device.type == "cpu" else None for x in sources]
    counted = tuple(v for v in versions if v is not None)
    if len(counted) < len(sources):
        return _table(table, captured, scalars, sizes, compute)
    shape = (sizes[f"{table.axis}_len"], sizes["batches"], sizes["heads"])
    values = tuple(scalars.get(name) for name in numbers)
    key = (table.value, table.block, compute, shape, values, *map(id, sources))
    found = _kept.get(key)
    if (
        found is not None
        and found[0] == counted
        and all(r() is x for r, x in zip(found[1], sources, strict=True))
    ):
        return found[2]
    made = _table(table, captured, scalars, sizes, compute)
    if len(_kept) >= MOST_KEPT:
        _kept.clear()
    _kept[key] = counted, tuple(weakref.ref(x, lambda _: _kept.pop(key, None)) for x in sources), made
    return made


@lru_cache(maxsize=256)
def _read(value: Expr) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The captured tensors and the variables that a value reads."""
    tensors = dict.fromkeys(load.tensor for load in loads(value))
    return tuple(tensors), tuple(v.name for v in variables(value))


@torch.no_grad()
def _table(
    table: TileTable,
    captured: Mapping[str, Tensor],
    scalars: Mapping[str, Number],
    sizes: Mapping[str, int],
    compute: torch.dtype,
) -> Tensor:
    rows = sizes[f"{table.axis}_len"]
    if (read := _read_in_place(table, captured, sizes)) is not None:
        return _extremes(read[..., :rows], table.block).to(torch_kind(table.value.dtype, compute))
    device = next(iter(captured.values())).device if captured else None
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


def _read_in_place(
    table: TileTable, captured: Mapping[str, Tensor], sizes: Mapping[str, int]
) -> Tensor | None:
    """The captured numbers themselves where the value is x[position], x[batch, position] and so on, all of each."""
    value, rows = table.value, sizes[f"{table.axis}_len"]
    if not isinstance(value, Load) or value.dtype is DType.BOOL or not rows:
        return None
    x, names = captured[value.tensor], [i.name for i in value.indices if isinstance(i, Var)]
    inside = [name for name in _COUNTED if name in names]
    if len(names) < len(value.indices) or names != [*inside, f"{table.axis}_idx"]:
        return None
    counts = tuple(sizes[_COUNTED[name]] for name in inside)
    return x if x.shape[:-1] == counts and x.shape[-1] >= rows else None


def _extremes(x: Tensor, block: int) -> Tensor:
    """Smallest and largest of each `block` along the last dimension, the last block as long as it is."""
    whole = x.shape[-1] // block * block
    parts = [x[..., :whole].unflatten(-1, (-1, block))] if whole else []
    parts += [x[..., None, whole:]] if whole < x.shape[-1] else []
    ends = [torch.stack(torch.aminmax(part, dim=-1), -1) for part in parts]
    return ends[0] if len(ends) == 1 else torch.cat(ends, -2)


def _along(v: Var, values: Tensor) -> Tensor:
    """In the layout of dense evaluation."""
    shape = [1] * len(DIMENSION)
    shape[DIMENSION[v.axes[0] if v.axes else v.name]] = len(values)
    return values.reshape(shape)

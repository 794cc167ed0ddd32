"""Values that are the first columns of their keys, in one memory: a tile of keys is loaded once and read twice.

    key = K[batch, kv_head, kv_idx, d_idx]
    value = the first columns of key

Latent attention has them: 512 of 576 columns. Where the columns are cut into powers of two (`columns.py`), a value is
the first pieces of its key, so that no backend ever has to take a part of a tile.
"""

from __future__ import annotations

from dataclasses import replace

from attn_engine.codegen.lower.columns import pieces, pieces_of_scales
from attn_engine.codegen.lower.values import DV_IDX, KEY, VALUE, load_tile
from attn_engine.ir.expr import Cast, Expr, FirstColumns, Load, transform
from attn_engine.ir.program import Attention
from attn_engine.ir.tile import If, Kernel, Let, Loop, Stmt, map_expressions


def share_tiles(program: Attention) -> bool:
    """Whether values are read from the tiles of their keys: their pieces of columns are the first ones of the keys."""
    cut = pieces if program.cache is None else pieces_of_scales
    keys, values = cut(program.dim_qk), cut(program.dim_v)
    return program.values_in_keys and keys[: len(values)] == values


def values_from_keys(kernel: Kernel) -> Kernel:
    """The kernel without V: each of its tiles is part of the tile of K that was loaded before it."""
    if all(p.name != "V" for p in kernel.params):
        return kernel
    found = Let(VALUE.name, FirstColumns(KEY, "dv"))
    body = _replaced(kernel.body, Let(VALUE.name, load_tile("V")), found)
    body = map_expressions(body, lambda e: transform(e, _rounded_as_keys))
    return replace(kernel, params=tuple(p for p in kernel.params if p.name != "V"), body=body)


def values_from_memory(kernel: Kernel) -> Kernel:
    """The same kernel with tiles of their own for the values, for backends that do not read a part of a tile."""
    (*rows, _) = load_tile("K").indices
    part = FirstColumns(KEY, "dv")
    load = Load("K", part.dtype, (*rows, DV_IDX))
    return replace(kernel, body=map_expressions(kernel.body, lambda e: load if e is part else e))


def _replaced(body: tuple[Stmt, ...], old: Let, new: Let) -> tuple[Stmt, ...]:
    done: list[Stmt] = []
    for s in body:
        if isinstance(s, Loop | If):
            s = replace(s, body=_replaced(s.body, old, new))
        done.append(new if s == old else s)
    return tuple(done)


def _rounded_as_keys(e: Expr) -> Expr | None:
    """The weights are rounded as the values are."""
    return Cast(e.x, "K") if isinstance(e, Cast) and e.like == "V" else None

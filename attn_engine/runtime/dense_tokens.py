"""Attention over lists of tokens by the dense definition, on gathered keys."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from attn_engine.ir.ops import Number
from attn_engine.ir.program import Attention
from attn_engine.runtime.reference import reference
from attn_engine.runtime.scaled import dequantised
from attn_engine.runtime.token_attention import Keys, Rows, tensors_of_piece
from attn_engine.runtime.token_lists import Piece, TokenLists


def dense_tokens(
    program: Attention,
    lists: TokenLists,
    q: Tensor,
    keys: Keys,
    captured: Mapping[str, Tensor],
    numbers: Mapping[str, Number],
    dtype: torch.dtype,
) -> tuple[Tensor, list[Tensor]]:
    """o (B, H, rows, D) and the row values (B, H, rows), in `dtype`; q is (B, H, rows, D).

    program: over ragged lists. Differentiable, and all that is gathered stays in memory.
    """
    by_heads: dict[int, list[list[Tensor]]] = {}
    for piece in lists.pieces(1):
        columns = [_rows(x, piece, scale, dtype) for x, scale in keys.parts()]
        key = torch.cat(columns[: len(keys.keys)], -1)
        value = columns[-1] if keys.values else key[..., : keys.dim_v]
        given = {**captured, **tensors_of_piece(program, lists, piece)}
        o, rows = reference(program, Rows(q).of(piece), key, value, given, numbers, dtype)
        found = [x.flatten(1, 2) for x in (o, *rows.values())]
        by_heads.setdefault(piece.kv_heads.start, []).append(found)
    if not by_heads:
        nothing = q[..., 0].to(dtype)  # of no rows
        values = nothing[..., None].expand(*q.shape[:3], program.dim_v)
        return values, [nothing] * len(program.rule.row_outputs)
    of_heads = [[torch.cat(x) for x in zip(*pieces, strict=True)] for pieces in by_heads.values()]
    both = [torch.cat(x, 1).unflatten(0, (q.shape[0], -1)) for x in zip(*of_heads, strict=True)]
    o, *rows = (x.transpose(1, 2) for x in both)
    return o, rows


def _rows(x: Tensor, piece: Piece, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """(n, kv heads, longest, D) of a tensor (N, H, rows, D)."""
    x = x if scale is None else dequantised(x, scale, dtype)
    flat = x[:, piece.kv_heads].transpose(1, 2).flatten(0, 1)
    flat = flat if len(flat) else flat.new_zeros((1, *flat.shape[1:]))
    return flat[piece.rows].transpose(1, 2)

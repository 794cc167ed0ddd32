"""Which blocks a query attends to (section 3.3.2, equations 8 to 12).

p[h, t, i] is the weight of compressed block i in the first branch. importance[g, t, j] sums it over the heads h of
group g, and over i times W[i, j] = |[i d, i d + l) and [j l', j l' + l')| / d. Of the blocks before the query's own,
c = t // l', those of most importance are taken, of equal ones the first; blocks 0, c and c - 1 always are. No
gradient passes.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from attn_engine.frontend import Constant, CustomIO, MaskMod, meta_tensor
from attn_engine.library.nsa.branches import OFFSET, complete_blocks
from attn_engine.library.nsa.sequences import Sequences
from attn_engine.library.nsa.sizes import Compression
from attn_engine.selection_engine import Overlap, SelectionEngine


@torch.no_grad()
def selected(
    q: Tensor,
    k_cmp: Tensor,
    lse: Tensor,
    sequences: Sequences,
    compression: Compression,
    selection_block: int,
    selected_blocks: int,
    scale: float,
    backend: str,
    forced: tuple[int, int] = (1, 2),
) -> Tensor:
    """int32 (batch, TQ, kv heads, n), or packed (rows, kv heads, n): blocks of each sequence, ascending, -1 behind.

    k_cmp, lse: of the compressed branch, (batch, blocks, kv heads, D) and (batch, heads, TQ), or packed. forced: how
    many blocks are taken always, of the first ones and of the last ones up to the query's own.
    """
    overlap = (compression.block, compression.stride, selection_block)
    kind = q.dtype, q.shape[-1], sequences.packed, sequences.offset is not None
    where = "auto" if backend.startswith("tilelang") else backend
    select = _engine(overlap, forced, *kind, scale, where)
    named: dict[str, Any] = sequences.of_blocks(compression)
    if sequences.cumulative is not None:
        starts = sequences.cumulative[0]
        named |= {"first": starts[:-1], "last": (starts[-1:] - 1).clamp(min=0)}
    if sequences.offset is not None:
        named[OFFSET] = sequences.offset
    return select(q, k_cmp, lse=lse, topk=selected_blocks, **named)


def always(selection_block: int, first: int = 1, last: int = 2) -> MaskMod:
    """Block 0, the query's own and the one before it; or more or fewer, not after the query's own."""
    size, initial, local = map(Constant, (selection_block, first, last))

    def first_or_near(b: Any, h: Any, q_idx: Any, block: Any) -> Any:
        own = q_idx // size
        return (block <= own) & ((block < initial) | (block > own - local))

    return first_or_near


@lru_cache(maxsize=64)
def _engine(
    overlap: tuple[int, int, int],
    first_and_last: tuple[int, int],
    dtype: torch.dtype,
    dim: int,
    packed: bool,
    moves: bool,
    scale: float,
    backend: str,
) -> SelectionEngine:
    complete, near = complete_blocks(*overlap[:2]), always(overlap[2], *first_and_last)

    def position(b: Any, q_idx: Any, custom: Any) -> Any:
        return q_idx + custom.input_tensors[OFFSET][b] if moves else q_idx

    def weight(score: Any, custom_fwd_inputs: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        inputs = custom_fwd_inputs.input_tensors
        if packed:
            row = torch.minimum(inputs["first"][b] + q_idx, inputs["last"][0])
            return torch.exp(score - inputs["lse"][h, row])
        return torch.exp(score - inputs["lse"][b, h, q_idx])

    def visible(b: Any, h: Any, q_idx: Any, kv_idx: Any, custom_fwd_inputs: Any) -> Any:
        return complete(b, h, position(b, q_idx, custom_fwd_inputs), kv_idx)

    def forced(b: Any, h: Any, q_idx: Any, kv_idx: Any, custom_fwd_inputs: Any) -> Any:
        return near(b, h, position(b, q_idx, custom_fwd_inputs), kv_idx)

    shapes: dict[str, tuple[str | int, ...]] = {"lse": ("batch", "heads", "seq_len")}
    if packed:
        shapes = {"lse": ("heads", "seq_len"), "first": ("batch",), "last": (1,)}
    if moves:
        shapes[OFFSET] = ("batch",)
    metas = [meta_tensor(None, None, None, dim, dtype=dtype)] * 2
    return SelectionEngine(
        metas,
        score_mod=weight,
        mask_mod=visible,
        custom_fwd_inputs=CustomIO(shapes),
        pool=Overlap(*overlap),
        forced_mod=forced,
        scale=scale,
        backend=backend,
    )

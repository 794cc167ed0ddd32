"""Lists of the blocks that a call gives, for both loops: a few torch operations, none of them per sequence or head.

Blocks of the lists are made of units (`runtime/block_sparse.py`): what is visible of a block that holds several units,
and is not visible as a whole, is kept as bits beside its entry.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attn_engine.codegen.lower.listed import blocks_param, starts_param


def list_tensors(table: Tensor, batches: int, heads: int) -> dict[str, Tensor]:
    """The lists of a table (1 or batches, 1 or heads, units of queries, units of keys) whose units are blocks."""
    found: dict[str, Tensor] = {}
    for loop, visible in (("kv", table), ("q", table.transpose(2, 3))):
        found |= _lists(loop, "full", visible, batches, heads)
    return found


def _lists(loop: str, kind: str, visible: Tensor, batches: int, heads: int) -> dict[str, Tensor]:
    """Where the list of each block begins, absolute, and the blocks of all lists; int32."""
    entries = visible.nonzero()[:, 3].to(torch.int32)
    counts = visible.sum(-1, dtype=torch.int32)
    ends = counts.flatten().cumsum(0, dtype=torch.int32).view(counts.shape)
    starts = torch.cat((ends[..., :1] - counts[..., :1], ends), -1)
    starts = starts.expand(batches, heads, starts.shape[2])
    return {starts_param(loop, kind): starts, blocks_param(loop, kind): entries}

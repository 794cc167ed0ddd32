"""Calls with few query rows: which heads share a tile of rows, and in how many splits the keys are read.

Both are chosen from the call's shapes alone, never from the number of threads: the same call always gives the same
bits. Neither compiles anything again for another length: kernels take group and number of splits as arguments.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import torch
from torch import Tensor

from attn_engine.codegen.schedule import Schedule
from attn_engine.ir.passes.mask_tiles import TRUE, classify_tiles
from attn_engine.ir.passes.merge_rule import MergeRule, derive_merge
from attn_engine.ir.passes.pack_heads import Packing, pack_heads, packable
from attn_engine.ir.program import Attention
from attn_engine.runtime.block_lists import listed_keys

# A split reads at least this many numbers of K and V (about 0.1 ms): less is not worth a merge.
LEAST_NUMBERS_PER_SPLIT = 2**19


def choose_packing(
    program: Attention, schedule: Schedule, q: Tensor, k: Tensor, rows: int | None = None
) -> Packing:
    """Pack the heads that share a kv head where one head's queries leave at least half of a tile's rows empty.

    rows: of the longest sequence, where q holds several.
    """
    group, q_len = q.shape[1] // max(k.shape[1], 1), q.shape[2] if rows is None else rows
    if group <= 1 or 2 * q_len > schedule.block_q or not packable(program.rule):
        return Packing.NONE
    if program.sequences is not None and program.sequences.listed:
        return Packing.NONE  # the tables name rows of one head
    if (listed := program.listed) and (listed.tested or program.sequences is not None):
        return Packing.NONE  # whoever made the lists has decided it
    if listed and (listed.heads != "kv_heads" or q_len > listed.q):
        return Packing.NONE  # rows of a tile share their lists
    packing = Packing.ONE_QUERY if q_len == 1 else Packing.QUERIES
    return Packing.NONE if _hides_tiles(program, packing) else packing


@lru_cache(maxsize=256)
def _hides_tiles(program: Attention, packing: Packing) -> bool:
    """Whether tiles that one head's mask would skip could not be told any more: rows of several heads ask for more."""
    if program.mask is None or program.listed is not None:
        return False
    alone = classify_tiles(program.mask.result, "kv")
    if alone is None or alone.may_hold is TRUE:
        return False
    packed = pack_heads(program, packing).mask
    together = None if packed is None else classify_tiles(packed.result, "kv")
    return together is None or together.may_hold is TRUE


def choose_splits(
    program: Attention,
    schedule: Schedule,
    q: Tensor,
    k: Tensor,
    lists: Mapping[str, Tensor] | None = None,
    kv_len: int | None = None,
) -> int:
    """Splits of the keys: 1 where the query tiles are work enough for every thread that there may be.

    lists: those of a program with listed blocks, by name. kv_len: of the longest sequence, where k holds several.
    """
    batches, heads, q_len, _ = q.shape
    tiles = batches * heads * -(-q_len // schedule.block_q)
    if program.rule.pooled or tiles == 0 or tiles >= schedule.split_tasks:
        return 1
    keys = k.shape[2] if kv_len is None else kv_len
    keys = keys if program.listed is None else listed_keys(program.listed, lists or {}, keys)
    longest = keys * (program.dim_qk + program.dim_v) // LEAST_NUMBERS_PER_SPLIT
    splits = min(-(-schedule.split_tasks // tiles), longest)
    return splits if splits > 1 and isinstance(derive_merge(program.rule), MergeRule) else 1


class PackedHeads:
    """q and out (B, H, Sq, D) as (B, Hkv, Sq * group, D), row = q * group + g; copies where no view can be."""

    def __init__(self, q: Tensor, k: Tensor, out: Tensor) -> None:
        self.kv_heads = k.shape[1]
        self.group = q.shape[1] // self.kv_heads
        self._wanted = self._by_query(out)
        self.q = self._by_query(q).flatten(2, 3)
        batches, kv_heads, q_len, group, dim_v = self._wanted.shape
        in_place = q_len == 1 or self._wanted.stride(2) == group * self._wanted.stride(3)
        shape = (batches, kv_heads, q_len * group, dim_v)
        self.out = (
            self._wanted.view(shape) if in_place else torch.empty(shape, dtype=out.dtype, device=out.device)
        )

    def _by_query(self, x: Tensor) -> Tensor:
        """(B, Hkv, Sq, group, D), without a copy."""
        batches, _, q_len, dim = x.shape
        return x.view(batches, self.kv_heads, self.group, q_len, dim).transpose(2, 3)

    def finish(self, saved: list[Tensor]) -> list[Tensor]:
        """Bring the output to where it was wanted; the saved row values as (B, H, Sq)."""
        if self.out.data_ptr() != self._wanted.data_ptr():
            self._wanted.copy_(self.out.view(self._wanted.shape))
        batches, kv_heads, q_len, group, _ = self._wanted.shape
        return [
            x.view(batches, kv_heads, q_len, group).transpose(2, 3).reshape(batches, kv_heads * group, q_len)
            for x in saved
        ]

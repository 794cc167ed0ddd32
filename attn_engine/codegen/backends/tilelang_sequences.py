"""Kernels over sequences in TileLang: a tensor keeps all of its rows, and what is read of it begins at a sequence's
first row and ends at its last. Of a cache, each position is read from the row of its page."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from attn_engine.codegen.lower.sequences import TILE_LIST, narrowed_tensors
from attn_engine.ir.tile import Kernel, Narrow, Param, walk

# Numbers that say which sequence a block works on. Each is a variable: TileLang 0.1.15 writes what a name stands for
# wherever it is read, and proves bounds of quotients of table entries for minutes.
NUMBERS = frozenset("batch place tiles_of_head tile_start head kv_head q_first q_len kv_first kv_len".split())
_ROWS = {"q_len": "q_rows", "kv_len": "kv_rows"}
_LONGEST = {"q_len": "longest_q", "kv_len": "longest_kv"}
_IN_PAGES = {"kv_len": "page_rows"}
PAGES = "pages"  # the first dimension of a cache
# What the rows of a sequence end at, by the name of the dimension that they lie along.
LENGTHS = {name: length for names in (_ROWS, _LONGEST, _IN_PAGES) for length, name in names.items()}


@lru_cache(maxsize=1024)
def sized(kernel: Kernel) -> Kernel:
    """The kernel with dimensions as they are at a launch: all rows of a tensor that holds several sequences, those of
    the longest in others. `q_len` and `kv_len` are then lengths of one sequence."""
    if not narrowed_tensors(kernel):
        return kernel
    return replace(kernel, params=tuple(_sized(p, narrowed_tensors(kernel)) for p in kernel.params))


def first_rows(kernel: Kernel) -> dict[str, Narrow]:
    """Where the rows of each narrowed tensor begin."""
    return {s.tensor: s for s in walk(kernel.body) if isinstance(s, Narrow)}


def _sized(p: Param, narrowed: dict[str, int]) -> Param:
    if p.name == TILE_LIST:  # one entry for all heads, while the launch counts tiles of each
        return replace(p, shape=("listed_tiles",))
    names = _IN_PAGES if p.shape[0] == PAGES else _ROWS if p.name in narrowed else _LONGEST
    return replace(p, shape=tuple(names.get(size, size) for size in p.shape))

"""A call that brings block lists: its program, and the lists as tensors of the call."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor

from attn_engine.ir.program import ListedBlocks
from attn_engine.masks.lists import BlockLists
from attn_engine.runtime.block_lists import list_tensors, listed_blocks
from attn_engine.runtime.compiled import sizes_of

Laid = tuple[ListedBlocks, dict[str, Tensor]]

MOST_REMEMBERED = 16
# The lists are kept with what was made of them: while they are here, no others have their identity.
_remembered: OrderedDict[tuple[int, ...], tuple[BlockLists, Laid]] = OrderedDict()


def lists_of_call(lists: BlockLists, q: Tensor, k: Tensor) -> Laid:
    """The blocks that kernels are made for and the tensors that they read; q and k are (batch, head, row, dimension).

    The same lists give the same tensors again, so that later checks need not look into them.
    """
    sizes = sizes_of(q, k)
    if torch.compiler.is_compiling():
        return _laid(lists, sizes)
    key = (id(lists), *sizes.values())
    found = _remembered.get(key)
    if found is None:
        found = _remembered[key] = lists, _laid(lists, sizes)
        while len(_remembered) > MOST_REMEMBERED:
            _remembered.popitem(last=False)
    return found[1]


def _laid(lists: BlockLists, sizes: dict[str, int]) -> Laid:
    listed = listed_blocks(lists, sizes["heads"], sizes["kv_heads"])
    return listed, list_tensors(lists, listed, sizes)


def blocks_of(lists: BlockLists) -> ListedBlocks:
    """The blocks to show before a call says how many heads there are."""
    return listed_blocks(lists, 0, 0)

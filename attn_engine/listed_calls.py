"""A call that brings block lists: its program, and the lists as tensors of the call."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from attn_engine.ir.program import ListedBlocks
from attn_engine.masks.lists import BlockLists
from attn_engine.runtime.block_lists import list_tensors, listed_blocks


@dataclass(frozen=True, slots=True)
class Listed:
    """The blocks that kernels are made for, and the tensors that they read, by name."""

    blocks: ListedBlocks
    tensors: dict[str, Tensor]


MOST_REMEMBERED = 16
# The lists are kept with what was made of them: while they are here, no others have their identity.
_remembered: OrderedDict[tuple[int, ...], tuple[BlockLists, Listed]] = OrderedDict()


def lists_of_call(lists: BlockLists, sizes: Mapping[str, int]) -> Listed:
    """What a call of these sizes runs on with these lists.

    The same lists give the same tensors again, so that later checks need not look into them.
    """
    if torch.compiler.is_compiling():
        return _listed(lists, sizes)
    key = (id(lists), *sizes.values())
    found = _remembered.get(key)
    if found is None:
        found = _remembered[key] = lists, _listed(lists, sizes)
        while len(_remembered) > MOST_REMEMBERED:
            _remembered.popitem(last=False)
    return found[1]


def _listed(lists: BlockLists, sizes: Mapping[str, int]) -> Listed:
    listed = listed_blocks(lists, sizes["heads"], sizes["kv_heads"])
    return Listed(listed, list_tensors(lists, listed, sizes))


def blocks_of(lists: BlockLists) -> ListedBlocks:
    """The blocks to show before a call says how many heads there are."""
    return listed_blocks(lists, 0, 0)

"""Trees of drafted tokens, verified at once (SpecInfer, arXiv:2305.09781, section 4.2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from attn_engine.errors import WrongArgument
from attn_engine.frontend import MaskMod
from attn_engine.library.arguments import at_least


def tree(parents: Sequence[int] | torch.Tensor, context: int = 0) -> MaskMod:
    """A node sees the `context` keys before the tree, its ancestors and itself.

    parents: of each node, -1 for a root; a parent comes before its children. Queries are the nodes, keys the context
    and then the nodes. Ancestors are intervals of a depth-first walk: a node's descendants are numbered after it.
    """
    at_least("context", context, 0)
    entered, left = _walk([int(p) for p in parents])

    def tree_mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        node = torch.clamp(kv_idx - context, min=0)
        is_ancestor = (entered[node] <= entered[q_idx]) & (entered[q_idx] < left[node])
        return (kv_idx < context) | is_ancestor

    return tree_mask


def _walk(parents: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """When a depth-first walk enters each node, and the number of nodes entered when it leaves it."""
    if not parents:
        raise WrongArgument(
            argument="parents", got=parents, expected="one node or more", instead="Give a root, [-1]."
        )
    sizes = [1] * len(parents)
    for node in range(len(parents) - 1, -1, -1):
        parent = parents[node]
        if not -1 <= parent < node:
            expected = f"for node {node} a parent before it, or -1"
            raise WrongArgument(
                argument="parents", got=parent, expected=expected, instead="Number parents first."
            )
        if parent >= 0:
            sizes[parent] += sizes[node]
    entered, free = [0] * len(parents), {-1: 0}
    for node, parent in enumerate(parents):
        entered[node] = free[parent]
        free[parent] += sizes[node]
        free[node] = entered[node] + 1
    times = torch.tensor(entered, dtype=torch.int32)
    return times, times + torch.tensor(sizes, dtype=torch.int32)

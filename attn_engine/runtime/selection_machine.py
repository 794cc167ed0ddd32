"""Selections by generated kernels: from the tensors of a call to launches.

States of tokens are scratch memory of bounded size: where there are many tokens, launches follow each other.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attn_engine.ir.ops import Number
from attn_engine.ir.selection import Selection
from attn_engine.runtime.compiled import sizes_of_call
from attn_engine.runtime.sequences import fill_other_rows, tables_in


@dataclass(frozen=True, slots=True)
class LaunchPlan:
    """How the tokens of a call are cut: tokens of a program, programs of a launch, shares of the keys, states."""

    tile_tokens: int
    tiles: int
    launched: int
    splits: int
    shape: tuple[int, ...]

    def states(self, device: torch.device) -> Tensor:
        return torch.empty(self.shape, dtype=torch.int32, device=device)


@dataclass(eq=False)
class SelectionMachine:
    """The kernels of one program on one kind of machine."""

    program: Selection

    def plan(self, sizes: dict[str, int], topk: int) -> LaunchPlan:
        """How the tokens of a call are cut. Results do not depend on it."""
        raise NotImplementedError

    def launch(
        self, plan: LaunchPlan, given: dict[str, Tensor], numbers: dict[str, Number], sizes: dict[str, int]
    ) -> None:
        """Offer the keys to the tokens of the tiles "first_tile" and on, "tile_count" of them, and settle these."""
        raise NotImplementedError

    def __call__(
        self, q: Tensor, k: Tensor, tensors: dict[str, Tensor], scalars: dict[str, Number], topk: int
    ) -> Tensor:
        """int32 (B, kv heads, rows, topk) of q (B, H, rows, D) and k (B, Hkv, keys, D), or a cache in pages."""
        sequences = self.program.sequences
        kv_heads = k.shape[1]
        result = torch.empty((q.shape[0], q.shape[2], kv_heads, topk), dtype=torch.int32, device=q.device)
        result = result.transpose(1, 2)
        tables = None if sequences is None else tables_in(tensors)
        sizes = sizes_of_call(q, k, tables)
        if tables is not None:
            fill_other_rows(tables, "q", {"indices": result}, {"indices": -1})
        tokens = sizes["q_len"]
        if not result.numel() or not tokens:
            return result
        plan = self.plan(sizes, topk)
        given = {**tensors, **self._views(q, k, result, kv_heads, sizes["batches"])}
        given["candidates"] = plan.states(q.device)
        sizes = {**sizes, "q_len": q.shape[1] // kv_heads, "splits": plan.splits}
        numbers = {**scalars, "topk": topk, "tokens": tokens, "tile_tokens": plan.tile_tokens}
        numbers["splits"] = plan.splits
        for first in range(0, plan.tiles, plan.launched):
            count = min(plan.launched, plan.tiles - first)
            numbers |= {"tile_count": count, "first_tile": first}
            self.launch(plan, given, numbers, {**sizes, "tile_count": count})
        return result

    def _views(self, q: Tensor, k: Tensor, result: Tensor, kv_heads: int, batches: int) -> dict[str, Tensor]:
        """The tensors as kernels index them: rows that all sequences share are seen by each of them."""
        sequences = self.program.sequences
        by_token = q.transpose(1, 2).unflatten(2, (kv_heads, q.shape[1] // kv_heads))
        found = {"Q": by_token, "K": k, "indices": result}
        if sequences is not None and sequences.packed:
            shared = ("Q", "indices") if sequences.page else ("Q", "K", "indices")
            found |= {n: found[n].expand(batches, *found[n].shape[1:]) for n in shared}
        return found

"""Native sparse attention in float64 from the formulas of its paper, a sequence at a time: nothing here knows the
engine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Phi = Callable[[Tensor], Tensor]  # (l, heads, D) to (heads, D)


@dataclass(frozen=True)
class Formula:
    """l, d: of compressed blocks; m: of selected blocks (l'); n: how many; w: the window."""

    l: int = 8
    d: int = 4
    m: int = 16
    n: int = 4
    w: int = 10

    @property
    def options(self) -> dict[str, Any]:
        return {
            "compression_block": self.l,
            "compression_stride": self.d,
            "selection_block": self.m,
            "selected_blocks": self.n,
            "window": self.w,
        }

    def compressed(self, x: Tensor, phi: Phi) -> Tensor:
        """(blocks, heads, D) of x (T, heads, D)."""
        rows = [phi(x[i : i + self.l]) for i in range(0, x.shape[0] - self.l + 1, self.d)]
        return torch.stack(rows) if rows else x[:0]

    def complete(self, positions: Tensor, blocks: int) -> Tensor:
        """bool (TQ, blocks): whether a block's last token is not after the query."""
        last = torch.arange(blocks) * self.d + self.l - 1
        return last[None] <= positions[:, None]

    def overlap(self, blocks: int, length: int) -> Tensor:
        """W (blocks, selection blocks): tokens in common, in strides, counted one by one."""
        found = torch.zeros(blocks, -(-length // self.m), dtype=torch.float64)
        for i in range(blocks):
            for token in range(i * self.d, i * self.d + self.l):
                found[i, token // self.m] += 1 / self.d
        return found

    def importance(self, weights: Tensor, kv_heads: int, length: int) -> Tensor:
        """(kv heads, TQ, selection blocks) of weights (heads, TQ, blocks)."""
        by_head = weights @ self.overlap(weights.shape[-1], length)
        return by_head.unflatten(0, (kv_heads, -1)).sum(1)

    def forced(self, position: int) -> set[int]:
        own = position // self.m
        return {j for j in (0, own - 1, own) if j >= 0}


def positions_of(q: Tensor, k: Tensor) -> Tensor:
    """The positions of the last TQ tokens."""
    return torch.arange(k.shape[0] - q.shape[0], k.shape[0])


def attention(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """O (TQ, heads, Dv) and P (heads, TQ, keys); keep: (heads or 1, TQ, keys). A row that keeps nothing is 0."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    score = torch.einsum("thd,uhd->htu", q, k) * scale
    highest = (
        torch.where(keep, score, -torch.inf).amax(-1, keepdim=True) if k.shape[0] else score.sum(-1, True)
    )
    highest = torch.where(highest.isfinite(), highest, 0.0).detach()
    weights = torch.where(keep, torch.exp(torch.where(keep, score - highest, 0.0)), 0.0)
    total = weights.sum(-1, keepdim=True)
    weights = weights / torch.where(total > 0, total, 1.0)
    return torch.einsum("htu,uhd->thd", weights, v), weights


def chosen_tokens(indices: Tensor, length: int, positions: Tensor, size: int) -> Tensor:
    """bool (kv heads, TQ, T): tokens up to the query's in the blocks that indices (TQ, kv heads, n) name."""
    block = torch.arange(length) // size
    inside = (indices.transpose(0, 1)[..., None] == block).any(-2)
    return inside & (torch.arange(length)[None] <= positions[:, None])


def branches(
    q: Tensor, pairs: Sequence[tuple[Tensor, Tensor]], indices: Tensor, formula: Formula, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """O_cmp, O_slc, O_win of one sequence; pairs: those of the first branch are rows of blocks."""
    (k_cmp, v_cmp), (k_slc, v_slc), (k_win, v_win) = pairs
    at, length = positions_of(q, k_slc), k_slc.shape[0]
    group = q.shape[1] // k_slc.shape[1]
    o_cmp, _ = attention(q, k_cmp, v_cmp, formula.complete(at, k_cmp.shape[0])[None], scale)
    of_heads = chosen_tokens(indices, length, at, formula.m).repeat_interleave(group, 0)
    o_slc, _ = attention(q, k_slc, v_slc, of_heads, scale)
    token = torch.arange(length)[None]
    near = (token <= at[:, None]) & (token > at[:, None] - formula.w)
    o_win, _ = attention(q, k_win, v_win, near[None], scale)
    return o_cmp, o_slc, o_win


def importances(q: Tensor, k_cmp: Tensor, length: int, formula: Formula, scale: float) -> Tensor:
    """(kv heads, TQ, selection blocks), for the last TQ of `length` tokens."""
    at = torch.arange(length - q.shape[0], length)
    _, weights = attention(q, k_cmp, k_cmp, formula.complete(at, k_cmp.shape[0])[None], scale)
    return formula.importance(weights, k_cmp.shape[1], length)


def check_selection(
    found: Tensor, importance: Tensor, first: int, formula: Formula, margin: float = 1e-5
) -> int:
    """Whether found (TQ, kv heads, n) is what is most important, (kv heads, TQ, blocks), for the tokens from `first`
    on.

    Sets are compared where the last that is taken and the first that is not are further apart than the margin, sorted
    importances where they are not. Returns how many sets were compared exactly and left something out.
    """
    heads, queries, _ = importance.shape
    decided = 0
    for t in range(queries):
        position = first + t
        for g in range(heads):
            row = found[t, g].tolist()
            taken = [j for j in row if j >= 0]
            assert taken == sorted(set(taken)) and row == taken + [-1] * (found.shape[-1] - len(taken))
            forced = formula.forced(position)
            others = [j for j in range(position // formula.m) if j not in forced]
            room = min(formula.n - len(forced), len(others))
            assert forced <= set(taken) and set(taken) <= forced | set(others)
            assert len(taken) == len(forced) + room
            by_rank = sorted(others, key=lambda j: (-float(importance[g, t, j]), j))
            values = [float(importance[g, t, j]) for j in by_rank]
            free = set(taken) - forced
            if len(values) > room > 0 and values[room - 1] - values[room] > margin:
                assert free == set(by_rank[:room])
                decided += 1
            mine = sorted((float(importance[g, t, j]) for j in free), reverse=True)
            assert all(abs(a - b) <= margin for a, b in zip(mine, values[:room], strict=True))
    return decided

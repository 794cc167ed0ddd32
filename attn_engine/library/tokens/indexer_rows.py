"""The indexer's loss and its gradients, some queries at a time: over all keys in sight, or over chosen ones.

With z_j = index_scale * index_q_j . index_k and dI = softmax(I) - p over the keys in sight of a query:

    d_weights_j = sum_u dI relu(z_j)            d_index_q_j = index_scale * sum_u dI weights_j [z_j > 0] index_k
    d_index_k   = index_scale * sum_j dI weights_j [z_j > 0] index_q_j, added up query after query

Pieces depend on sizes alone; from one to the next nothing is kept but sums.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from attn_engine.runtime.gathered_rows import GatheredRows
from attn_engine.runtime.token_attention import Rows, SummedRows
from attn_engine.runtime.token_lists import TokenLists

ROOM = 2**22  # numbers of the scores of a piece


@dataclass(eq=False)
class Indexer:
    """index_q (B, S, HI, DI), index_k (B, L, 1, DI), weights (B, S, HI), and their gradients in the compute type, which
    fill up."""

    index_q: Tensor
    index_k: Tensor
    weights: Tensor
    scale: float

    def __post_init__(self) -> None:
        self.compute = torch.float64 if self.index_q.dtype is torch.float64 else torch.float32
        self.d_query = self.index_q.new_zeros(self.index_q.shape, dtype=self.compute)
        self.d_weights = self.weights.new_zeros(self.weights.shape, dtype=self.compute)
        self.d_key = SummedRows(self.index_k.transpose(1, 2), self.compute)

    def gradients(self) -> tuple[Tensor, Tensor, Tensor]:
        """In the order and the types of the tensors."""
        d_key = self.d_key.result().transpose(1, 2)
        return self.d_query.to(self.index_q.dtype), d_key, self.d_weights.to(self.weights.dtype)


class Targets(Protocol):
    """The target distribution of every query."""

    def losses(self, indexer: Indexer, factors: Tensor | None) -> Tensor:
        """(B, S). factors (B, S): the gradients of their sum, each times its factor, are added to the indexer's."""
        ...

    def seen(self) -> Tensor:
        """bool (B, S): queries that see a key."""
        ...


def divergence(target: Tensor, scores: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    """KL(target || softmax(scores)) over the last dimension, and its gradient for the scores."""
    log_q = _hidden(scores, visible).log_softmax(-1)
    log_q = torch.where(visible, log_q, 0.0)
    loss = (torch.xlogy(target, target) - target * log_q).sum(-1)
    return loss, torch.where(visible, log_q.exp(), 0.0) - target


def _hidden(scores: Tensor, visible: Tensor) -> Tensor:
    return scores.masked_fill(~visible, float("-inf"))


def _softmax(scores: Tensor, visible: Tensor) -> Tensor:
    return torch.where(visible, _hidden(scores, visible).softmax(-1), 0.0)


@dataclass(frozen=True, slots=True, eq=False)
class RowsInSight:
    """Query i sees the keys up to L - S + i. q (B, S, H, D), k (B, L, Hkv, D)."""

    q: Tensor
    k: Tensor
    scale: float

    def seen(self) -> Tensor:
        (batches, rows), keys = self.q.shape[:2], self.k.shape[1]
        last = torch.arange(rows, device=self.q.device) + keys - rows
        return (last >= 0).expand(batches, rows)

    def losses(self, indexer: Indexer, factors: Tensor | None) -> Tensor:
        losses = self.q.new_zeros(self.q.shape[:2], dtype=indexer.compute)
        for b, first, last, keys in self._pieces():
            own = slice(first, last)
            position = torch.arange(first, last, device=self.q.device) + self.k.shape[1] - self.q.shape[1]
            visible = torch.arange(keys, device=self.q.device) <= position[:, None]
            target = self._target(b, own, keys, visible, indexer.compute)
            query, weights = (x[b, own].to(indexer.compute) for x in (indexer.index_q, indexer.weights))
            key = indexer.index_k[b, :keys, 0].to(indexer.compute)
            scores = torch.zeros_like(target)
            for j in range(query.shape[1]):
                scores += weights[:, j, None] * (indexer.scale * (query[:, j] @ key.T)).relu_()
            losses[b, own], d_scores = divergence(target, scores, visible)
            if factors is not None:
                d_scores *= factors[b, own, None]
                self._add_gradients(indexer, b, own, (query, key, weights), d_scores)
        return losses

    def _pieces(self) -> Iterator[tuple[int, int, int, int]]:
        """Batch, first and last query, and how many keys there are up to the last one in sight."""
        (batches, rows), keys = self.q.shape[:2], self.k.shape[1]
        step = max(1, ROOM // max(1, keys))
        for b in range(batches):
            for first in range(max(0, rows - keys), rows, step):
                last = min(first + step, rows)
                yield b, first, last, last + keys - rows

    def _target(self, b: int, own: slice, keys: int, visible: Tensor, compute: torch.dtype) -> Tensor:
        heads, kv_heads = self.q.shape[2], self.k.shape[2]
        target = self.q.new_zeros(visible.shape, dtype=compute)
        for kv_head in range(kv_heads):
            key = self.k[b, :keys, kv_head].to(compute)
            for head in range(kv_head * heads // kv_heads, (kv_head + 1) * heads // kv_heads):
                target += _softmax(self.scale * (self.q[b, own, head].to(compute) @ key.T), visible)
        return target / heads

    @staticmethod
    def _add_gradients(
        indexer: Indexer, b: int, own: slice, tensors: tuple[Tensor, Tensor, Tensor], d_scores: Tensor
    ) -> None:
        query, key, weights = tensors
        d_key = torch.zeros_like(key)
        for j in range(query.shape[1]):
            z = indexer.scale * (query[:, j] @ key.T)
            indexer.d_weights[b, own, j] = (d_scores * z.relu()).sum(1)
            d_z = torch.where(z > 0, d_scores * weights[:, j, None] * indexer.scale, 0.0)
            indexer.d_query[b, own, j] = d_z @ key
            d_key += d_z.T @ query[:, j]
        indexer.d_key.add_range(b, d_key)


@dataclass(frozen=True, slots=True, eq=False)
class ChosenRows:
    """Every query has a list of keys. q (B, H, S, D), k (B, Hkv, L, D)."""

    q: Tensor
    k: Tensor
    lists: TokenLists
    scale: float

    def seen(self) -> Tensor:
        found = [piece.counts > 0 for piece in self.lists.pieces(1)]
        return torch.cat(found).view(self.q.shape[0], self.q.shape[2])

    def losses(self, indexer: Indexer, factors: Tensor | None) -> Tensor:
        compute, heads = indexer.compute, self.q.shape[1]
        of_tokens = [x.flatten(0, 1) for x in (indexer.index_q, indexer.weights)]
        d_query, d_weights = indexer.d_query.flatten(0, 1), indexer.d_weights.flatten(0, 1)
        losses = self.q.new_zeros(self.lists.queries, dtype=compute)
        keys, index_keys = GatheredRows((self.k,)), GatheredRows((indexer.index_k.transpose(1, 2),))
        numbers = keys.columns + index_keys.columns + heads + of_tokens[1].shape[1]
        for piece in self.lists.pieces(numbers):
            visible, own = piece.inside, piece.tokens
            scores = self.scale * (
                Rows(self.q).of(piece).to(compute) @ keys.read(piece).to(compute).transpose(2, 3)
            )
            target = _softmax(scores.flatten(1, 2), visible[:, None]).sum(1) / heads
            query, weights = (x[own].to(compute) for x in of_tokens)
            key = _at(index_keys.read(piece)[:, 0].to(compute), visible)
            z = indexer.scale * (query @ key.transpose(1, 2))
            losses[own], d_scores = divergence(target, (weights[..., None] * z.relu()).sum(1), visible)
            if factors is None:
                continue
            d_scores *= factors.flatten()[own, None]
            d_weights[own] = (d_scores[:, None] * z.relu()).sum(2)
            d_z = torch.where(z > 0, d_scores[:, None] * weights[..., None] * indexer.scale, 0.0)
            d_query[own] = d_z @ key
            d_key = d_z.transpose(1, 2) @ query
            indexer.d_key.add(slice(0, 1), piece.rows[visible], d_key[visible][:, None])
        keys.release()
        index_keys.release()
        return losses.view(self.q.shape[0], self.q.shape[2])


def _at(x: Tensor, visible: Tensor) -> Tensor:
    """0 in rows (n, keys, ...) that are no entry of a list: anything may lie there."""
    return torch.where(visible[..., None], x, 0.0)

"""Selections in torch: importances of some rows at a time, and the best candidates of each row.

The definition, in float64, and the backend "torch", in float32, are the same few lines. Memory is bounded by the scores
of MOST_SCORES pairs and of one row; nothing is kept of a row but its indices.

What the best are: first the forced candidates, then those that a pair is visible of, by importance, and of equals the
lower index. An importance of -inf or NaN makes no candidate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from attn_engine.ir.expr import Expr, Var
from attn_engine.ir.ops import DType, Number
from attn_engine.ir.program import BATCH, HEAD, KV_IDX, Q_IDX, SCORE
from attn_engine.ir.selection import Overlap, Selection
from attn_engine.runtime.compiled import sizes_of_call
from attn_engine.runtime.dense import DIMENSION, evaluate_dense
from attn_engine.runtime.paged import key_rows
from attn_engine.runtime.sequence_rows import PaddedRows
from attn_engine.runtime.sequences import sequences_of_call, tables_in

MOST_SCORES = 2**23
Environment = dict[Var, Tensor | Number]


@dataclass(frozen=True, slots=True)
class Rows:
    """What is known of the candidates of some rows: all (batches, kv heads, rows, candidates).

    importance: -inf where there is no candidate. forced: bool, or None where nothing is.
    """

    importance: Tensor
    forced: Tensor | None


@dataclass(frozen=True, slots=True)
class DenseSelection:
    """A selection on the tensors of one call.

    q: (B, H, rows, D), k: (B, Hkv, keys, D) or a cache in pages. tensors: captured ones, and tables of sequences.
    """

    program: Selection
    q: Tensor
    k: Tensor
    tensors: Mapping[str, Tensor]
    scalars: Mapping[str, Number]
    dtype: torch.dtype

    def indices(self, topk: int) -> Tensor:
        """int32 (B, kv heads, rows, topk), ascending, -1 behind."""
        return self._by_rows(topk, -1, torch.int32, lambda rows: best(rows, topk))

    def importances(self) -> Tensor:
        """(B, kv heads, rows, candidates), -inf where there is no candidate."""
        count = self.program.candidates(self._length("kv"))
        return self._by_rows(count, -math.inf, self.dtype, lambda rows: rows.importance)

    def _length(self, axis: str) -> int:
        x = self.q if axis == "q" else self.k
        return x.shape[2] if self.program.sequences is None else tables_in(self.tensors).longest[axis]

    def _by_rows(
        self, width: int, empty: float, dtype: torch.dtype, made: Callable[[Rows], Tensor]
    ) -> Tensor:
        """What is made of all rows, some at a time; `empty` in rows of no sequence."""
        q, k, inside, of_q = self._padded()
        shape = (q.shape[0], k.shape[1], q.shape[2], width)
        found = torch.full(shape, empty, dtype=dtype, device=q.device)
        for batch, rows in _parts(q, k):
            one = None if inside is None else inside[batch, :, rows]
            found[batch, :, rows] = made(self._rows(q[batch, :, rows], k[batch], batch, rows, one))
        if of_q is None:
            return found
        return of_q.restored(found, (self.q.shape[0], k.shape[1], self.q.shape[2], width), empty)

    def _padded(self) -> tuple[Tensor, Tensor, Tensor | None, PaddedRows | None]:
        """q, k, which pairs are there at all, and how rows lie; sequences as a batch of the longest length."""
        sequences = self.program.sequences
        if sequences is None:
            return self.q, self.k, None, None
        tables = tables_in(self.tensors)
        of_q = PaddedRows(sequences, tables, "q", self.q.device)
        of_kv = key_rows(sequences, tables, self.tensors, self.q.device)
        there = of_q.valid[:, None, :, None] & of_kv.valid[:, None, None, :]
        return of_q.padded(self.q), of_kv.padded(self.k), there, of_q

    def _rows(self, q: Tensor, k: Tensor, batch: slice, rows: slice, inside: Tensor | None) -> Rows:
        kv_heads, keys = k.shape[1:3]
        group = q.shape[1] // kv_heads
        heads = k.to(self.dtype).repeat_interleave(group, 1)
        score = (q.to(self.dtype) @ heads.transpose(2, 3) * self.scalars["scale"])[..., None, None]
        known = self._environment(score, batch, rows)
        visible = torch.ones((), dtype=torch.bool, device=q.device).expand(score.shape[:4])
        if self.program.mask is not None:
            visible = visible & self._of(self.program.mask.result, known)
        if inside is not None:
            visible = visible & inside
        if self.program.pairs.score is not None:
            value = self._of(self.program.pairs.score.result, {**known, SCORE: score}).expand_as(visible)
        else:
            value = score[..., 0, 0]
        value = torch.where(visible, value, 0.0)
        by_group = (q.shape[0], kv_heads, group, *value.shape[2:])
        importance, there = value.reshape(by_group).sum(2), visible.reshape(by_group).any(2)
        there = there & (importance > -math.inf)
        importance = torch.where(there, importance, 0.0)
        if self.program.pool is not None:
            importance, there = pooled(self.program.pool, importance, there)
        importance = torch.where(there, importance, -math.inf)
        return Rows(importance, self._forced(score, batch, rows, kv_heads, keys, inside))

    def _forced(
        self, score: Tensor, batch: slice, rows: slice, kv_heads: int, keys: int, inside: Tensor | None
    ) -> Tensor | None:
        program = self.program
        if program.forced is None:
            return None
        shape = (score.shape[0], kv_heads, score.shape[2], program.candidates(keys))
        known = self._environment(score.new_empty((1, 1, 1, 1, 1, 1)).expand(*shape, 1, 1), batch, rows)
        forced = self._of(program.forced.result, known).expand(shape)
        if inside is None or program.sequences is None:
            return forced
        # Sequences have candidates of their own: as many as their own keys make.
        lengths = tables_in(self.tensors).lengths["kv"][batch].to(score.device)
        own = torch.tensor([program.candidates(int(n)) for n in lengths], device=score.device)
        return forced & (torch.arange(shape[3], device=score.device) < own[:, None, None, None])

    def _of(self, e: Expr, known: Environment) -> Tensor:
        found = evaluate_dense(e, known, self.tensors, self.dtype)
        return found.reshape(found.shape[:4]) if found.ndim else found

    def _environment(self, score: Tensor, batch: slice, rows: slice) -> Environment:
        first = {"batch": batch.start, "q": rows.start}

        def along(axis: str) -> Tensor:
            at = DIMENSION[axis]
            found = torch.arange(score.shape[at], device=score.device) + first.get(axis, 0)
            return found.view([-1 if i == at else 1 for i in range(6)])

        tables = sequences_of_call(self.program.pairs, self.tensors)
        sizes = sizes_of_call(self.q, self.k, tables)
        return {
            **{Var(name, DType.INT): size for name, size in sizes.items()},
            Var("scale", DType.FLOAT): self.scalars["scale"],
            **{v: self.scalars[v.name] for v in self.program.scalars},
            **{BATCH: along("batch"), HEAD: along("head"), Q_IDX: along("q"), KV_IDX: along("kv")},
        }


def _parts(q: Tensor, k: Tensor) -> Iterator[tuple[slice, slice]]:
    """Batches and rows whose scores are not too many at once."""
    batches, heads, rows, _ = q.shape
    row = max(1, heads * k.shape[2])
    together = max(1, min(batches, MOST_SCORES // row))
    step = max(1, MOST_SCORES // (row * together))
    for b in range(0, batches, together):
        for first in range(0, rows, step):
            yield slice(b, min(b + together, batches)), slice(first, min(first + step, rows))


def pooled(pool: Overlap, importance: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
    """Importances (..., windows) as those of blocks, and which blocks have a window in sight."""
    windows = importance.shape[-1]
    count = pool.blocks(windows)
    result = importance.new_zeros((*importance.shape[:-1], count))
    found = torch.zeros_like(result, dtype=torch.bool)
    first = torch.arange(count, device=importance.device) * pool.step
    for offset, weight in pool.taps.items():
        window = first + offset
        inside = (window >= 0) & (window < windows)
        blocks, window = inside.nonzero().squeeze(-1), window[inside]
        result[..., blocks] += weight * importance[..., window]
        found[..., blocks] |= there[..., window]
    return result, found


def best(rows: Rows, topk: int) -> Tensor:
    """int32 (..., topk): the candidates that are taken of each row, ascending, -1 behind."""
    value, count = rows.importance, rows.importance.shape[-1]
    taken = torch.zeros_like(value, dtype=torch.bool)
    if rows.forced is not None:
        taken = rows.forced & (rows.forced.cumsum(-1) <= topk)
        value = value.masked_fill(rows.forced, -math.inf)
    left = topk - taken.sum(-1, keepdim=True)
    most = min(topk, count)
    if most:
        highest = value.topk(most).values
        bar = highest.gather(-1, (left - 1).clamp(0, most - 1))
        above = (value > bar) & (left > 0)
        equal = (value == bar) & (value > -math.inf)
        taken = taken | above | (equal & (equal.cumsum(-1) <= left - above.sum(-1, keepdim=True)))
    places = torch.arange(count, device=value.device).expand(taken.shape)
    order = torch.where(taken, places, count).sort(-1).values[..., :most]
    found = torch.full((*value.shape[:-1], topk), -1, dtype=torch.int32, device=value.device)
    found[..., :most] = torch.where(order < count, order, -1).to(torch.int32)
    return found

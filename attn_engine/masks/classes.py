"""The class of every block: not seen, seen in part, seen whole. Blocks that intervals leave open are looked into.

Blocks are listed row by row (`Listed`), never as a grid of all of them; where a mask's conditions are not ranges, the
grid is walked over in chunks of rows. A block that is open is first looked at in its corners, which tells nearly
always, then at more positions, and evaluated whole where that does not tell either: at most MOST_AT_ONCE at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from attn_engine.ir.expr import Expr
from attn_engine.masks.program import Analysis
from attn_engine.masks.ranges import Array, Range, find_ranges
from attn_engine.masks.values import Blocks, reductions

MOST_AT_ONCE = 2**18  # pairs of blocks, or of positions
SAMPLES = 7  # per axis


@dataclass(frozen=True, slots=True)
class Listed:
    """Pairs of blocks in order: how many each row (batch, head, q block) has, and the kv block of each."""

    counts: Array  # int64 (rows,)
    columns: Array  # int32 (pairs,)

    @staticmethod
    def of(rows: Array, columns: Array, count: int) -> Listed:
        """From the row of each pair; the pairs are in order."""
        return Listed(np.bincount(rows, minlength=count), columns)

    @property
    def rows(self) -> Array:
        """The row of each pair."""
        return np.repeat(np.arange(len(self.counts), dtype=np.int32), self.counts)

    def kept(self, which: Array) -> Listed:
        """The pairs where `which` is True."""
        if which.all():
            return self
        return Listed.of(self.rows[which], self.columns[which], len(self.counts))

    def merged(self, other: Listed) -> Listed:
        """The pairs of both; no pair is in both."""
        if not len(other.columns) or not len(self.columns):
            return self if len(self.columns) else other
        rows = np.concatenate((self.rows, other.rows))
        columns = np.concatenate((self.columns, other.columns))
        order = np.lexsort((columns, rows))
        return Listed(self.counts + other.counts, columns[order])

    def turned(self, groups: int, width: int) -> Listed:
        """The same pairs from the other side: rows (batch, head, column), for so many batches x heads and columns."""
        height = len(self.counts) // groups
        rows = self.rows
        small = len(self.counts) * width < 2**31
        key = self.columns if small else self.columns.astype(np.int64)
        if groups > 1:
            key = key + rows // height * width
        counts = np.bincount(key, minlength=groups * width)
        key = key * height
        key += rows if groups == 1 else rows % height
        key.sort()
        key %= height
        return Listed(counts, key if small else key.astype(np.int32))


@dataclass(frozen=True, slots=True)
class Classes:
    """full: every pair of positions is visible. partial: some are, or all are and the block sticks out beyond an end.

    open: what intervals leave undecided; empty once resolved.
    """

    full: Listed
    partial: Listed
    open: Listed


@dataclass(frozen=True, slots=True)
class BlockRanges:
    """The closed form: a block may hold visible pairs within one of `may` only, and within one of `must` it holds no
    other. Outside of `may` nothing is visible."""

    may: list[Range]
    must: list[Range]


def block_ranges(analysis: Analysis, blocks: Blocks) -> BlockRanges | None:
    """The closed form of a mask at one moment; None where it is not a few ranges per row."""
    if analysis.may is None or analysis.must is None:
        return None
    found = find_ranges((analysis.may, analysis.must), blocks)
    return None if found is None else BlockRanges(*found)


def classes_from_ranges(ranges: BlockRanges, blocks: Blocks) -> Classes:
    """Every row is cut at the ends of all ranges; between two cuts all blocks have one class."""
    n, rows = blocks.count["kv"], (blocks.batch, blocks.heads, blocks.count["q"])
    bounds = [x for pair in (*ranges.may, *ranges.must) for x in pair]
    cuts = np.empty((*rows, len(bounds) + 3), dtype=np.int64)
    for i, x in enumerate((*bounds, 0, n, n - 1 if blocks.ragged("kv") else n)):
        cuts[..., i] = x
    points = np.sort(cuts.reshape(-1, cuts.shape[-1]).clip(0, n), -1)
    first, end = points[:, :-1], points[:, 1:]
    flat = cuts.reshape(-1, cuts.shape[-1])
    middle = 2 * len(ranges.may)
    seen, whole = _covered(first, flat[:, :middle]), _covered(first, flat[:, middle : len(bounds)])
    stuck_out = _stick_out(blocks, first, np.arange(len(first))[:, None])
    length = end - first
    partial = whole & stuck_out
    return Classes(
        _spelled_out(first, length * (whole & ~stuck_out)),
        _spelled_out(first, length * partial) if stuck_out.any() else _nothing(len(first)),
        _spelled_out(first, length * (seen & ~whole)),
    )


def _covered(x: Array, bounds: Array) -> Array:
    """Whether x lies in one of the ranges: their first and end in turns."""
    found = np.zeros(x.shape, dtype=bool)
    for i in range(0, bounds.shape[1], 2):
        found |= (x >= bounds[:, i : i + 1]) & (x < bounds[:, i + 1 : i + 2])
    return found


def _stick_out(blocks: Blocks, column: Array, row: Array) -> Array:
    """Whether a block lies across the end of an axis."""
    found = np.zeros((), dtype=bool)
    if blocks.ragged("kv"):
        found = found | (column == blocks.count["kv"] - 1)
    if blocks.ragged("q"):
        found = found | (row % blocks.count["q"] == blocks.count["q"] - 1)
    return found


def _nothing(rows: int) -> Listed:
    return Listed(np.zeros(rows, dtype=np.int64), np.empty(0, dtype=np.int32))


def _spelled_out(first: Array, length: Array) -> Listed:
    """Runs of blocks, (rows, runs), one after the other."""
    flat = length.reshape(-1)
    shift = (first.reshape(-1) - (flat.cumsum() - flat)).astype(np.int32)
    columns = np.repeat(shift, flat)
    columns += np.arange(len(columns), dtype=np.int32)
    return Listed(length.sum(-1), columns)


def classes_from_grid(analysis: Analysis, blocks: Blocks) -> Classes:
    """Every pair of blocks is asked, a chunk of rows of one batch and head at a time."""
    rows_at_once = max(1, MOST_AT_ONCE // blocks.count["kv"])
    chunks: list[tuple[Listed, Listed, Listed]] = []
    for b in range(blocks.batch):
        for h in range(blocks.heads):
            for first in range(0, blocks.count["q"], rows_at_once):
                chunks.append(_chunk(analysis, blocks, b, h, slice(first, first + rows_at_once)))
    joined = (
        Listed(np.concatenate([x.counts for x in part]), np.concatenate([x.columns for x in part]))
        for part in zip(*chunks, strict=True)
    )
    return Classes(*joined)


def _chunk(analysis: Analysis, blocks: Blocks, b: int, h: int, rows: slice) -> tuple[Listed, Listed, Listed]:
    conditions = (analysis.classes.may_hold, analysis.classes.must_hold)
    places: dict[str, Tensor | int] = {"batch": b, "head": h}
    for axis, part in (("q", rows), ("kv", slice(None))):
        places[f"{axis}_start"] = _as(axis, blocks.starts(axis)[part])
        places[f"{axis}_last"] = _as(axis, blocks.lasts(axis)[part])
    ends = {}
    for node in reductions(conditions):
        x = blocks.extreme(node)
        ends[node] = _as(
            node.axis,
            x[min(b, len(x) - 1), min(h, x.shape[1] - 1)][rows if node.axis == "q" else slice(None)],
        )
    columns = np.arange(blocks.count["kv"], dtype=np.int32)
    row = np.arange(blocks.count["q"])[rows, None]
    grid = (len(row), len(columns))
    found = [x.expand(grid).cpu().numpy() for x in blocks.evaluate_with(conditions, places, ends)]
    may, must = found
    stuck_out = _stick_out(blocks, columns, row)
    columns = np.broadcast_to(columns, grid)
    chosen = (must & ~stuck_out, must & stuck_out, may & ~must)
    full, partial, undecided = (Listed(x.sum(-1), columns[x]) for x in chosen)
    return full, partial, undecided


def _as(axis: str, x: Tensor) -> Tensor:
    return x[:, None] if axis == "q" else x[None, :]


def resolved(mask: Expr, classes: Classes, blocks: Blocks) -> Classes:
    """The same with no block open: each is looked into, at as few positions as tell."""
    pairs = classes.open
    count = len(pairs.columns)
    if not count:
        return classes
    look = _Look(mask, blocks, pairs)
    some, every = np.zeros(count, dtype=bool), np.ones(count, dtype=bool)
    look.at(None, 2, some, every)  # the corners
    for along in (SAMPLES, 0):  # scattered positions; all
        which = np.flatnonzero(every | ~some)
        if len(which):
            look.at(which, along, some, every)
    full = every & ~_stick_out(blocks, pairs.columns, pairs.rows)
    return Classes(
        classes.full.merged(pairs.kept(full)) if full.any() else classes.full,
        classes.partial.merged(pairs.kept(some & ~full)),
        _nothing(len(pairs.counts)),
    )


class _Look:
    """Evaluates the mask at positions of listed blocks."""

    def __init__(self, mask: Expr, blocks: Blocks, pairs: Listed) -> None:
        self.mask, self.blocks = mask, blocks
        self.device = blocks.moment.device
        rows = torch.from_numpy(pairs.rows).to(self.device, torch.int64)
        q_blocks = blocks.count["q"]
        columns = torch.from_numpy(pairs.columns).to(self.device, torch.int64)
        self.block = {"q": rows % q_blocks, "kv": columns}
        group = rows // q_blocks
        self.batch, self.head = group // blocks.heads, group % blocks.heads

    def at(self, which: Array | None, along: int, some: Array, every: Array) -> None:
        """Note in `some` and `every` what is seen at `along` positions per axis (0: at all) of the blocks `which`."""
        offsets = {axis: self._offsets(axis, along) for axis in ("q", "kv")}
        step = max(1, MOST_AT_ONCE // (len(offsets["q"]) * len(offsets["kv"])))
        whole = len(some) if which is None else len(which)
        for first in range(0, whole, step):
            part = slice(first, first + step) if which is None else which[first : first + step]
            seen = self._seen(
                part if isinstance(part, slice) else torch.from_numpy(part).to(self.device), offsets
            )
            flat = seen.flatten(1)
            some[part] |= flat.any(-1).cpu().numpy()
            every[part] &= flat.all(-1).cpu().numpy()

    def _offsets(self, axis: str, along: int) -> Tensor:
        size, device = self.blocks.size[axis], self.device
        if along == 0 or size <= along:
            return torch.arange(size, device=device)
        if along == 2:
            return torch.tensor([0, size - 1], device=device)
        return torch.arange(along, device=device) * 37 % size

    def _seen(self, part: slice | Tensor, offsets: dict[str, Tensor]) -> Tensor:
        """(blocks, positions of q, positions of kv); a position beyond the end is the last one again."""
        blocks = self.blocks
        places: dict[str, Tensor | int] = {
            "batch": self.batch[part, None, None],
            "head": self.head[part, None, None],
        }
        for axis in ("q", "kv"):
            positions = self.block[axis][part, None] * blocks.size[axis] + offsets[axis]
            positions.clamp_(max=blocks.length[axis] - 1)
            places[f"{axis}_idx"] = positions[:, :, None] if axis == "q" else positions[:, None, :]
        (seen,) = blocks.evaluate_with((self.mask,), places, {})
        count = len(places["batch"])  # pyright: ignore[reportArgumentType]
        return seen.expand(count, len(offsets["q"]), len(offsets["kv"]))

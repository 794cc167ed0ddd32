"""The class of every block: not seen, seen in part, seen whole. Blocks that intervals leave open are looked into.

Blocks are listed row by row (`Listed`), never as a grid of all of them; where a mask's conditions are not ranges, the
grid is walked over in chunks of rows. A block that is open is first looked at in its corners, which tells nearly
always, then at more positions, and evaluated whole where that does not tell either: at most MOST_AT_ONCE at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attn_engine.ir.expr import Expr
from attn_engine.masks.program import Analysis
from attn_engine.masks.ranges import Range, find_ranges
from attn_engine.masks.values import Blocks, reductions

MOST_AT_ONCE = 2**18  # pairs of blocks, or of positions
SAMPLES = 7  # per axis


@dataclass(frozen=True, slots=True)
class Listed:
    """Pairs of blocks in order: how many each row (batch, head, q block) has, and the kv block of each."""

    counts: Tensor  # int64 (rows,)
    columns: Tensor  # int32 (pairs,)

    @staticmethod
    def of(rows: Tensor, columns: Tensor, count: int) -> Listed:
        """From the row of each pair; the pairs are in order."""
        return Listed(torch.bincount(rows, minlength=count), columns.to(torch.int32))

    @property
    def rows(self) -> Tensor:
        """The row of each pair."""
        places = torch.arange(len(self.counts), dtype=torch.int32, device=self.counts.device)
        return torch.repeat_interleave(places, self.counts, output_size=len(self.columns))

    def kept(self, which: Tensor) -> Listed:
        """The pairs where `which` is True."""
        if not len(self.columns):
            return self
        return Listed.of(self.rows[which], self.columns[which], len(self.counts))

    def merged(self, other: Listed) -> Listed:
        """The pairs of both; no pair is in both."""
        if not len(other.columns) or not len(self.columns):
            return self if len(self.columns) else other
        rows = torch.cat((self.rows, other.rows))
        columns = torch.cat((self.columns, other.columns))
        order = torch.argsort(rows.to(torch.int64) * (int(columns.max()) + 1) + columns)
        return Listed(self.counts + other.counts, columns[order])


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

    def everywhere(x: Tensor | int) -> Tensor:
        x = torch.as_tensor(x, device=blocks.moment.device)
        return x.expand(rows).reshape(-1)

    may = [(everywhere(a), everywhere(b)) for a, b in ranges.may]
    must = [(everywhere(a), everywhere(b)) for a, b in ranges.must]
    cuts = [x for bounds in (*may, *must) for x in bounds]
    cuts += [everywhere(c) for c in (0, n, n - 1 if blocks.ragged("kv") else n)]
    points = torch.stack(cuts, -1).clamp_(0, n).sort(-1).values
    first, end = points[:, :-1], points[:, 1:]
    seen, whole = _covered(first, may), _covered(first, must)
    stuck_out = _stick_out(blocks, first, torch.arange(len(first), device=first.device)[:, None])
    length = end - first
    return Classes(
        _spelled_out(first, length * (whole & ~stuck_out)),
        _spelled_out(first, length * (whole & stuck_out)),
        _spelled_out(first, length * (seen & ~whole)),
    )


def _covered(x: Tensor, ranges: list[Range]) -> Tensor:
    found = torch.zeros_like(x, dtype=torch.bool)
    for first, end in ranges:
        found |= (x >= first[:, None]) & (x < end[:, None])
    return found


def _stick_out(blocks: Blocks, column: Tensor, row: Tensor) -> Tensor:
    """Whether a block lies across the end of an axis."""
    found = torch.zeros((), dtype=torch.bool, device=column.device)
    if blocks.ragged("kv"):
        found = found | (column == blocks.count["kv"] - 1)
    if blocks.ragged("q"):
        found = found | (row % blocks.count["q"] == blocks.count["q"] - 1)
    return found


def _spelled_out(first: Tensor, length: Tensor) -> Listed:
    """Runs of blocks, (rows, runs), one after the other."""
    counts = length.sum(-1)
    flat = length.reshape(-1)
    total = int(counts.sum())
    shift = (first.reshape(-1) - (flat.cumsum(0) - flat)).to(torch.int32)
    columns = torch.repeat_interleave(shift, flat, output_size=total)
    columns += torch.arange(total, dtype=torch.int32, device=first.device)
    return Listed(counts, columns)


def classes_from_grid(analysis: Analysis, blocks: Blocks) -> Classes:
    """Every pair of blocks is asked, a chunk of rows of one batch and head at a time."""
    rows_at_once = max(1, MOST_AT_ONCE // blocks.count["kv"])
    chunks: list[tuple[Listed, Listed, Listed]] = []
    for b in range(blocks.batch):
        for h in range(blocks.heads):
            for first in range(0, blocks.count["q"], rows_at_once):
                chunks.append(_chunk(analysis, blocks, b, h, slice(first, first + rows_at_once)))
    joined = (
        Listed(torch.cat([x.counts for x in part]), torch.cat([x.columns for x in part]))
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
    may, must = blocks.evaluate_with(conditions, places, ends)
    columns = torch.arange(blocks.count["kv"], dtype=torch.int32, device=blocks.moment.device)
    row = torch.arange(blocks.count["q"], device=columns.device)[rows, None]
    grid = (len(row), len(columns))
    may, must, stuck_out = (x.expand(grid) for x in (may, must, _stick_out(blocks, columns, row)))
    columns = columns.expand(grid)
    chosen = (must & ~stuck_out, must & stuck_out, may & ~must)
    full, partial, undecided = (Listed(x.sum(-1), columns.masked_select(x)) for x in chosen)
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
    some = torch.zeros(count, dtype=torch.bool, device=pairs.columns.device)
    every = torch.ones_like(some)
    for along in (2, SAMPLES, 0):  # corners; scattered positions; all
        which = torch.nonzero(every | ~some).reshape(-1) if along != 2 else None
        if which is not None and not len(which):
            break
        look.at(which, along, some, every)
    stuck_out = _stick_out(blocks, pairs.columns, pairs.rows)
    return Classes(
        classes.full.merged(pairs.kept(every & ~stuck_out)),
        classes.partial.merged(pairs.kept(some & ~(every & ~stuck_out))),
        Listed(torch.zeros_like(pairs.counts), pairs.columns[:0]),
    )


class _Look:
    """Evaluates the mask at positions of listed blocks."""

    def __init__(self, mask: Expr, blocks: Blocks, pairs: Listed) -> None:
        self.mask, self.blocks = mask, blocks
        rows = pairs.rows.to(torch.int64)
        q_blocks = blocks.count["q"]
        self.block = {"q": rows % q_blocks, "kv": pairs.columns.to(torch.int64)}
        group = rows // q_blocks
        self.batch, self.head = group // blocks.heads, group % blocks.heads

    def at(self, which: Tensor | None, along: int, some: Tensor, every: Tensor) -> None:
        """Note in `some` and `every` what is seen at `along` positions per axis (0: at all) of the blocks `which`."""
        offsets = {axis: self._offsets(axis, along) for axis in ("q", "kv")}
        step = max(1, MOST_AT_ONCE // (len(offsets["q"]) * len(offsets["kv"])))
        whole = len(some) if which is None else len(which)
        for first in range(0, whole, step):
            part = slice(first, first + step) if which is None else which[first : first + step]
            seen = self._seen(part, offsets)
            some[part] |= seen.any(-1).any(-1)
            every[part] &= seen.all(-1).all(-1)

    def _offsets(self, axis: str, along: int) -> Tensor:
        size, device = self.blocks.size[axis], self.mask_device
        if along == 0 or size <= along:
            return torch.arange(size, device=device)
        if along == 2:
            return torch.tensor([0, size - 1], device=device)
        return torch.arange(along, device=device) * 37 % size

    @property
    def mask_device(self) -> torch.device:
        return self.blocks.moment.device

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

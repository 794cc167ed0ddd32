"""How units that a call gives become blocks of lists: which rows share a list, and how many units a block holds.

Rows of a tile share the list that it walks over. Where the rows of a unit are few (a query token of a few heads),
several units make a block: its list is their union, and bits say which of them see an entry. Larger blocks make fuller
tiles and longer unions; which is less work is counted in the call's own units.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from attn_engine.codegen.schedule import SMALLEST_BLOCK
from attn_engine.ir.program import ListedBlocks
from attn_engine.runtime.block_sparse import Units

FEW = 16  # rows that one block holds together, whatever their units: they are one tile
ENOUGH_ROWS = 32  # a unit of so many rows makes full tiles by itself
MOST_UNITS = 32  # of queries in a block
HALF_TILES = 1.05  # measured: rows in tiles of 16 against rows in tiles of 32
KEYS_OF_SHORT_TILES = 32  # fewer are one register: a backward pass then takes 16 rows at once
SHORT_TILES = 1.5  # measured: rows in tiles of 8
AS_GOOD = 1.02  # larger blocks for so much more work: they have fewer entries


class Unions(Protocol):
    """Units that a call gives (`UnitTable`, `ChosenUnits`)."""

    def unions(self, smallest: int, most: int) -> tuple[list[int], list[int]]: ...


@dataclass(frozen=True, slots=True)
class BlockShape:
    """q_units, kv_units: of a block. rows: of a unit of queries, with the heads of `group` side by side. every: one
    block holds every query."""

    q_units: int
    kv_units: int
    rows: int
    block_kv: int
    group: int
    every: bool

    def listed(self, heads: str) -> ListedBlocks:
        """What is compiled in; heads: of the lists."""
        one = self.q_units == self.kv_units == 1
        parts = (0, 0) if one else (self.q_units, self.kv_units)
        q = 0 if self.every else self.rows * self.q_units
        kv = self.block_kv * self.kv_units
        rows = 0 if one else self.rows
        return ListedBlocks(q, kv, heads, tested=True, parts=parts, part_rows=rows, group=self.group)


def shape_of_blocks(
    given: Unions, units: Units, q_len: int, group: int, smallest: int = SMALLEST_BLOCK
) -> BlockShape:
    """The shape for these units; group: query heads that may lie side by side. smallest: rows that a tile needs."""
    group = group if units.block_q < ENOUGH_ROWS else 1
    rows = units.block_q * group
    kv_units = max(1, SMALLEST_BLOCK // units.block_kv)
    if q_len * group <= FEW:
        return BlockShape(max(1, units.q_units), kv_units, rows, units.block_kv, group, every=True)
    if units.block_kv * kv_units < KEYS_OF_SHORT_TILES:
        smallest = max(smallest, SMALLEST_BLOCK)
    q_units = _units_of_least_work(given, rows, smallest) if rows < ENOUGH_ROWS else 1
    return BlockShape(q_units, kv_units, rows, units.block_kv, group, every=False)


def _units_of_least_work(given: Unions, rows: int, smallest: int) -> int:
    """How many units of so many rows share a list; one look at the table's contents on the host."""
    fewest = 1
    while rows * fewest % smallest:
        fewest *= 2
    sizes, entries = given.unions(fewest, MOST_UNITS)
    best, least = sizes[0], _work(entries[0], sizes[0] * rows)
    for size, count in zip(sizes[1:], entries[1:], strict=True):
        work = _work(count, size * rows)
        if work <= AS_GOOD * least:
            best, least = size, min(least, work)
    return best


def _work(entries: int, rows: int) -> float:
    """Rows times blocks of keys that tiles go over; a tile that is not full takes a little longer for each."""
    slower = SHORT_TILES if rows % SMALLEST_BLOCK else 1.0 if rows % ENOUGH_ROWS == 0 else HALF_TILES
    return entries * rows * slower

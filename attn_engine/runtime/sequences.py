"""Sequences of their own lengths as tensors of a call: tables for the kernels, made a few torch calls at a time.

A program with `sequences` reads two tensors beside its captured ones, "q_spans" and "kv_spans": int32 (n, 2), the first
row of every sequence and how many rows it has. All else follows from them and is kept for as long as they live: one
look at their contents on the host, no loop over sequences, nothing of size rows x rows.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from attn_engine.codegen.lower.sequences import (
    AXES,
    LONGEST_KV,
    LONGEST_Q,
    ORDER,
    TILE_COUNT,
    TILE_LIST,
    TILE_RANGES,
    narrowed_tensors,
    places_param,
    spans_param,
)
from attn_engine.ir.ops import Number
from attn_engine.ir.program import Attention
from attn_engine.ir.tile import Kernel, TileGrid
from attn_engine.runtime.launch_plan import Layout, Numbers, Prepared

SPAN_NAMES = tuple(spans_param(axis) for axis in AXES)
PLACE_NAMES = tuple(places_param(axis) for axis in AXES)


@dataclass(eq=False)
class SequenceTables:
    """What a call's sequences are, and the tables of the kernels that run over them.

    firsts, lengths: by axis, int64 on the CPU. device: where tables go.
    """

    firsts: Mapping[str, Tensor]
    lengths: Mapping[str, Tensor]
    device: torch.device
    _grouped: dict[tuple[int, int], tuple[Tensor, Tensor]] = field(
        default_factory=dict[tuple[int, int], tuple[Tensor, Tensor]]
    )
    _lists: dict[tuple[str, int], dict[str, Tensor]] = field(
        default_factory=dict[tuple[str, int], dict[str, Tensor]]
    )

    @cached_property
    def count(self) -> int:
        return len(self.lengths["q"])

    @cached_property
    def longest(self) -> dict[str, int]:
        return {axis: int(x.max()) if len(x) else 0 for axis, x in self.lengths.items()}

    @cached_property
    def rows(self) -> dict[str, int]:
        """All rows of all sequences."""
        return {axis: int(x.sum()) for axis, x in self.lengths.items()}

    @cached_property
    def _heaviest_first(self) -> Tensor:
        work = self.lengths["q"] * self.lengths["kv"]
        return work.argsort(descending=True, stable=True)

    @cached_property
    def order(self) -> Tensor:
        """The sequences, those with the most pairs first: int32 (n,)."""
        return self._heaviest_first.to(torch.int32).to(self.device)

    def sizes(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """A call's sizes in terms of its sequences: lengths are those of the longest ones."""
        longest = {f"{axis}_len": self.longest[axis] for axis in AXES}
        return {**sizes, **longest, "batches": self.count}

    def tile_tables(self, axis: str, block: int) -> dict[str, Tensor]:
        """tile_list, int32 (tiles,): the sequence of every tile, heavy sequences first; tile_ranges, int32 (n, 2): the
        first tile of every sequence in that list, and how many it has."""
        if (axis, block) not in self._lists:
            order = self._heaviest_first
            counts = -(-self.lengths[axis] // block)
            ordered = counts[order]
            first = torch.empty_like(counts)
            first[order] = ordered.cumsum(0) - ordered
            found = {
                TILE_LIST: order.repeat_interleave(ordered),
                TILE_RANGES: torch.stack((first, counts), 1),
            }
            self._lists[axis, block] = {n: x.to(torch.int32).to(self.device) for n, x in found.items()}
        return self._lists[axis, block]

    def tile_count(self, grid: TileGrid, sizes: Mapping[str, int]) -> int:
        """How many programs there are along the axis "tile"."""
        if grid.heads is None:
            return -(-self.longest[grid.axis] // grid.block)
        return len(self.tile_tables(grid.axis, grid.block)[TILE_LIST]) * sizes[grid.heads]


# By the identity of the spans, weakly: an entry ends with either of them.
_kept: dict[tuple[int, int], tuple[tuple[weakref.ref[Tensor], ...], tuple[int, ...], SequenceTables]] = {}


def tables_in(tensors: Mapping[str, Tensor]) -> SequenceTables:
    """The tables of the spans among a call's tensors."""
    spans = [tensors[name] for name in SPAN_NAMES]
    key = (id(spans[0]), id(spans[1]))
    versions = tuple(-1 if x.is_inference() else x._version for x in spans)
    found = _kept.get(key)
    if (
        found is not None
        and found[1] == versions
        and all(r() is x for r, x in zip(found[0], spans, strict=True))
    ):
        return found[2]
    tables = tables_of(*spans)
    _kept[key] = tuple(weakref.ref(x, lambda _: _kept.pop(key, None)) for x in spans), versions, tables
    return tables


def tables_of(q_spans: Tensor, kv_spans: Tensor) -> SequenceTables:
    """Tables made anew, after one look at the contents of each."""
    seen = [x.detach().to("cpu", torch.int64) for x in (q_spans, kv_spans)]
    firsts, lengths = ({a: x[:, i] for a, x in zip(AXES, seen, strict=True)} for i in (0, 1))
    return SequenceTables(firsts, lengths, q_spans.device)


def fill_other_rows(
    tables: SequenceTables, axis: str, tensors: Mapping[str, Tensor], values: Mapping[str, Number]
) -> None:
    """Set the rows (B, H, rows, ...) of no sequence, which no kernel visits: 0, or what `values` says by name; a value
    that a row without keys does not have is stored as -inf."""
    for name, x in tensors.items():
        if tables.rows[axis] < x.shape[0] * x.shape[2]:
            value = values.get(name, 0.0)
            x.fill_(-math.inf if math.isnan(value) else value)


def grouped(
    tensors: Mapping[str, Tensor], tables: SequenceTables, group: int
) -> tuple[dict[str, Tensor], SequenceTables]:
    """The tensors and the tables of a call where every query is `group` rows, one for each head that shares keys."""
    q_spans, kv_spans = (tensors[name] for name in SPAN_NAMES)
    key = (group, id(kv_spans))
    if key not in tables._grouped:
        tables._grouped.clear()
        tables._grouped[key] = q_spans * group, kv_spans
    made = {**tensors, **dict(zip(SPAN_NAMES, tables._grouped[key], strict=True))}
    return made, tables_in(made)


def sequences_of_call(program: Attention, tensors: Mapping[str, Tensor]) -> SequenceTables | None:
    """The tables of a call whose program has sequences."""
    return None if program.sequences is None else tables_in(tensors)


class OverSequences:
    """A compiled kernel over sequences: launches find its tables, the count of its tiles, and the tensors whose batch
    is the number of a sequence."""

    def __init__(self, kernel: Kernel, compiled: Launchable) -> None:
        self._compiled = compiled
        self._tiles = kernel.tiles
        self._batches = narrowed_tensors(kernel)
        self._reads_order = any(p.name == ORDER for p in kernel.params)

    def launch(
        self, tensors: Mapping[str, Tensor], scalars: Mapping[str, Number], sizes: Mapping[str, int]
    ) -> None:
        tables = tables_in(tensors)
        if tables.count == 0:
            return
        given = dict(tensors)
        for name, dimension in self._batches.items():
            given[name] = _for_each(given[name], dimension, tables.count)
        sizes = tables.sizes(sizes)
        own, numbers = self._of_tables(tables, sizes)
        sizes |= {n: x for n, x in numbers.items() if n == TILE_COUNT.name}
        self._compiled.launch(given | own, {**scalars, **numbers}, sizes)

    def _of_tables(
        self, tables: SequenceTables, sizes: Mapping[str, int]
    ) -> tuple[dict[str, Tensor], dict[str, int]]:
        """What the kernel reads of the tables, and the numbers that follow from them."""
        own = dict[str, Tensor]()
        numbers = {LONGEST_Q.name: tables.longest["q"], LONGEST_KV.name: tables.longest["kv"]}
        if self._tiles is not None:
            numbers[TILE_COUNT.name] = tables.tile_count(self._tiles, sizes)
            if self._tiles.heads is not None:
                own |= tables.tile_tables(self._tiles.axis, self._tiles.block)
        if self._reads_order:
            own[ORDER] = tables.order
        return own, numbers

    def prepare(
        self, layouts: Mapping[str, Layout], sizes: Mapping[str, int], tensors: Mapping[str, Tensor]
    ) -> OverTheseSequences | None:
        """The kernel for calls over sequences like these, of which there is one for each batch; None where the backend
        prepares nothing."""
        prepare = getattr(self._compiled, "prepare", None)
        if prepare is None:
            return None
        tables = tables_in(tensors)
        own, numbers = self._of_tables(tables, sizes)
        layouts = {**layouts, **{name: Layout.of(x) for name, x in own.items()}}
        spans = {name: tensors[name] for name in SPAN_NAMES}
        counts = {n: x for n, x in numbers.items() if n == TILE_COUNT.name}
        return OverTheseSequences(prepare(layouts, {**sizes, **counts}), {**spans, **own}, numbers)


class OverTheseSequences:
    """A prepared kernel, and the tensors and numbers that all its calls share: those of their sequences."""

    def __init__(self, kernel: Prepared, own: Mapping[str, Tensor], numbers: Numbers) -> None:
        self._kernel, self._own, self._numbers = kernel, own, numbers
        self._addresses = {name: x.data_ptr() for name, x in own.items()}

    def launch(self, addresses: Mapping[str, int], numbers: Numbers) -> None:
        self._kernel.launch({**addresses, **self._addresses}, {**numbers, **self._numbers})


class Launchable(Protocol):
    """A compiled kernel (`compiled.Launchable`)."""

    def launch(
        self, tensors: Mapping[str, Tensor], scalars: Mapping[str, Number], sizes: Mapping[str, int]
    ) -> None: ...


def _for_each(x: Tensor, dimension: int, count: int) -> Tensor:
    """Rows that all sequences share, as seen by each of them; without a copy."""
    if x.shape[dimension] != 1 or count == 1:
        return x
    return x.expand(*x.shape[:dimension], count, *x.shape[dimension + 1 :])

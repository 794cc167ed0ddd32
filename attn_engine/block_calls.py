"""A call that gives blocks as a mask or as indices: from its arguments to the lists that kernels walk over."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attn_engine.codegen.lower.capture import Route, capture_gradients
from attn_engine.codegen.lower.paged import BLOCK_TABLE
from attn_engine.codegen.schedule import SMALLEST_BLOCK, SMALLEST_ROWS
from attn_engine.errors import UnsupportedOnBackend
from attn_engine.ir.ops import Number
from attn_engine.ir.passes.pack_heads import Packing, pack_heads, packable
from attn_engine.ir.program import Attention, ListedBlocks
from attn_engine.runtime.backends import backend_for
from attn_engine.runtime.block_sparse import BlockSparse, Extent, Units, WrongBlockSparse, taken
from attn_engine.runtime.call_checks import refuse_transforms
from attn_engine.runtime.compiled import sizes_of
from attn_engine.runtime.given_entries import ChosenUnits
from attn_engine.runtime.given_lists import LOOPS, UnitTable
from attn_engine.runtime.given_shapes import shape_of_blocks
from attn_engine.runtime.native_lists import UnitLists, units_of_indices, units_of_mask, usable
from attn_engine.runtime.operator import apply, stays_direct
from attn_engine.runtime.packed_rows import PackedRows, packed_spans
from attn_engine.runtime.sequences import SPAN_NAMES, sequences_of_call
from attn_engine.runtime.versions import version_of

if TYPE_CHECKING:
    from attn_engine.engine import AttentionEngine
    from attn_engine.traced_program import TracedProgram


@dataclass(frozen=True, slots=True, eq=False)
class GivenLists:
    """What a program with these blocks has compiled in, and its lists by the kernels' names."""

    blocks: ListedBlocks
    tensors: dict[str, Tensor]


def blocks_given(engine: AttentionEngine, named: dict[str, Any], block_mask: Any) -> BlockSparse | None:
    """Takes the arguments that give blocks out of a call's; None where there are none."""
    given = taken(named, engine._checks.custom_shapes)
    if given is not None and (block_mask is not None or engine._block_mask is not None):
        what, instead = "an argument beside block_mask", "Give the blocks in one way."
        raise WrongBlockSparse(
            argument=given.name, what=what, got="given", expected="left out", instead=instead
        )
    return given


def attend(
    engine: AttentionEngine,
    given: BlockSparse,
    inputs: tuple[Tensor, Tensor, Tensor],
    custom: tuple[Tensor, ...],
    named: dict[str, Any],
    with_rows: bool,
) -> tuple[Tensor, Any]:
    """o and the row values of a call that gives blocks."""
    if torch.compiler.is_compiling():
        raise UnsupportedOnBackend(
            backend="torch.compile",
            feature="blocks given by a call, whose lists depend on what is in them",
            instead="Call the engine outside of the compiled graph: torch.compiler.disable(engine)(q, k, v, ...).",
        )
    q, k, v = inputs
    refuse_transforms((q, k, v, *custom, *named.values()))
    traced, captured, numbers, _ = engine._bind(q, k, v, custom, named)
    refuse_transforms(captured.values())
    return BlocksOfCall(engine, given).attend(traced, inputs, captured, numbers, with_rows)


@dataclass(frozen=True, slots=True, eq=False)
class BlocksOfCall:
    """A call that gives blocks, when everything else about it is known."""

    engine: AttentionEngine
    given: BlockSparse

    def attend(
        self,
        traced: TracedProgram,
        inputs: tuple[Tensor, Tensor, Tensor],
        captured: Mapping[str, Tensor],
        numbers: Mapping[str, Number],
        with_rows: bool,
    ) -> tuple[Tensor, Any]:
        """o and the row values."""
        engine, (q, k, v) = self.engine, inputs
        extent = extent_of(traced.program, captured, engine._logical(q), engine._logical(k))
        group = packed_group(traced.program, captured, extent)
        # What no gradient needs is not made: lists by block of keys.
        loops = LOOPS[:1] if stays_direct((q, k, v, *captured.values())) else LOOPS
        on_cpu = backend_for(engine.backend, q.device.type) == "cpu"
        smallest = SMALLEST_ROWS if on_cpu else SMALLEST_BLOCK
        lists = lists_of_call(self.given, extent, group, q.device, loops, smallest)
        call, key = engine._call(traced.with_lists(lists.blocks), q.device.type)
        rows = PackedRows(engine.layout, lists.blocks.group)
        tensors = _in_order(captured, lists, traced.program)
        o, found = apply(call, key, rows.pack(q), k, v, tensors, numbers, None, with_rows)
        return rows.unpack(o), [rows.unpack_rows(x) for x in found]

    def visible(self, program: Attention, captured: Mapping[str, Tensor], q: Tensor, k: Tensor) -> Tensor:
        """bool (batches, H, Sq, Skv) of the longest sequences; q and k are (B, H, rows, D)."""
        return self.given.dense(extent_of(program, captured, q, k), q.device)


def packed_group(program: Attention, captured: Mapping[str, Tensor], extent: Extent) -> int:
    """How many query heads may lie side by side in a tile of rows: those of a kv head, or 1.

    Not where the normaliser asks for the head or the position, nor where a captured gradient would have to be added up
    pair by pair for it.
    """
    group = extent.heads // extent.kv_heads
    if group == 1:
        return 1
    learned = tuple(c.name for c in program.differentiable_captures if captured[c.name].requires_grad)
    return group if _may_pack(program, group, learned) else 1


@lru_cache(maxsize=256)
def _may_pack(program: Attention, group: int, learned: tuple[str, ...]) -> bool:
    if not packable(program.rule):
        return False
    packed = pack_heads(program, Packing.QUERIES, group)
    return all(c.route is not Route.PAIR for c in capture_gradients(packed, learned))


def extent_of(program: Attention, captured: Mapping[str, Tensor], q: Tensor, k: Tensor) -> Extent:
    """What blocks of a call have to cover; q and k are (B, H, rows, D)."""
    sizes = sizes_of(q, k)
    tables = sequences_of_call(program, captured)
    if tables is None:
        lengths = sizes["q_len"], sizes["kv_len"]
        return Extent(sizes["batches"], sizes["heads"], sizes["kv_heads"], *lengths, *lengths, exact=True)
    q_len, kv_len = tables.longest["q"], tables.longest["kv"]
    sequences = program.sequences
    assert sequences is not None
    q_rows, kv_rows = (q_len, kv_len) if sequences.packed else (sizes["q_len"], sizes["kv_len"])
    if sequences.page:
        kv_rows = captured[BLOCK_TABLE].shape[1] * sequences.page
    rows = q_rows, kv_rows
    return Extent(tables.count, sizes["heads"], sizes["kv_heads"], q_len, kv_len, *rows, exact=False)


def _in_order(captured: Mapping[str, Tensor], lists: GivenLists, program: Attention) -> dict[str, Tensor]:
    """Captured tensors, lists, rows of sequences: the order in which operators take them."""
    of_functions = {c.name: captured[c.name] for c in program.captures}
    found = {**of_functions, **lists.tensors, **captured}
    if program.sequences is not None:
        found[Q_SPANS] = packed_spans(found[Q_SPANS], lists.blocks.group)
    return found


Q_SPANS = SPAN_NAMES[0]
MOST_KEPT = 32
# By the identity of the tensors, weakly: an entry ends with any of them.
_kept: OrderedDict[
    tuple[object, ...], tuple[tuple[weakref.ref[Tensor], ...], tuple[int | None, ...], GivenLists]
] = OrderedDict()


def lists_of_call(
    given: BlockSparse,
    extent: Extent,
    group: int,
    device: torch.device,
    loops: tuple[str, ...] = LOOPS,
    smallest: int = SMALLEST_BLOCK,
) -> GivenLists:
    """The lists of a call of this extent; those of the same tensors, unchanged, are remembered.

    smallest: rows that a tile of queries needs.
    """
    sources = given.sources
    versions = tuple(version_of(x) if isinstance(x, Tensor) else None for x in sources)
    key = (given.name, str(given.size), extent, group, loops, smallest, *map(id, sources))
    found = _kept.get(key)
    same = found is not None and found[1] == versions and None not in versions
    if found is not None and same and all(r() is x for r, x in zip(found[0], sources, strict=True)):
        _kept.move_to_end(key)
        return found[2]
    made = _made(given, extent, group, device, loops, smallest)
    _kept[key] = tuple(weakref.ref(x, lambda _: _kept.pop(key, None)) for x in sources), versions, made
    while len(_kept) > MOST_KEPT:
        _kept.popitem(last=False)
    return made


@torch.no_grad()
def _made(
    given: BlockSparse,
    extent: Extent,
    group: int,
    device: torch.device,
    loops: tuple[str, ...],
    smallest: int,
) -> GivenLists:
    units = given.units(extent, device)
    shared = given.main.shape[1] in (1, extent.kv_heads)
    heads = extent.kv_heads if shared else extent.heads
    chosen = _units_chosen(given, units, extent, heads, native=device.type == "cpu" and usable())
    shape = shape_of_blocks(chosen, units, extent.q_len, group if shared else 1, smallest)
    cut = chosen.cut(shape.q_units, shape.kv_units)
    return GivenLists(shape.listed("kv_heads" if shared else "heads"), cut.tensors(loops))


def _units_chosen(
    given: BlockSparse, units: Units, extent: Extent, heads: int, *, native: bool
) -> UnitLists | UnitTable | ChosenUnits:
    """native: by compiled code, which makes the same lists as the operations of torch."""
    batches = extent.batches
    if given.mask is not None:
        mask = given.table(units, extent)
        return units_of_mask(mask, batches, heads) if native else UnitTable(mask, batches, heads)
    if not native:
        return ChosenUnits(given.selected(units, extent), units.kv_units, batches, heads)
    assert given.indices is not None
    rows, counts = given.indices[:, :, : units.q_units], given.checked_counts(units)
    chosen, largest = units_of_indices(rows, counts, units.kv_units, batches, heads)
    given.check_largest(largest, units, extent)
    return chosen

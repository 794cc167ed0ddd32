"""Loops over blocks that a call gives and that know nothing of the mask: lists meet what the mask leaves of a block.

The bounds and runs of `ranges.py` stand as they are; a loop over the entries of a list stands around them, and each run
visits the tiles of one block that lie within it:

    for entry from full_begin to full_end:
        kv_block = kv_full_blocks[entry]
        for kv_start from max(kv_block * 64, kv_begin) to min(kv_block * 64 + 64, kv_full_end) by tiles of kv: no mask
        for kv_start from max(kv_block * 64, kv_full_end) to min(kv_block * 64 + 64, kv_end) by tiles of kv: masked

A block of which some parts alone are visible has bits beside its entry (docs/adr/0026).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from attn_engine.codegen.lower.listed import ENTRY, blocks_param, list_bounds, seen_param
from attn_engine.codegen.lower.ranges import Run
from attn_engine.codegen.lower.score import InParts, Masked
from attn_engine.codegen.lower.values import INT
from attn_engine.ir.expr import Const, Expr, Load, Var, call
from attn_engine.ir.ops import Op
from attn_engine.ir.program import KV_IDX, Q_IDX, Attention, ListedBlocks
from attn_engine.ir.tile import Let, Loop, Stmt

SEEN = Var("seen", INT)
PART = Var("part", INT, ("q",))
BITS = 32


@dataclass(frozen=True, slots=True)
class GivenRun:
    """The tiles of the blocks in entries begin to end of a list, as far as `runs` visit them.

    block: positions of each; 0: one holds all. tile: positions of a tile. word: the bits of its entry where they are
    one word; there: whether a pair is in a part that is visible, None where all are.
    """

    title: str
    step: str
    blocks: str
    begin: Expr
    end: Expr
    block: int
    tile: int
    runs: tuple[Run, ...]
    word: Expr | None = None
    there: Expr | None = None

    def loop(self, axis: str, step: Callable[[Masked], list[Stmt]]) -> Loop:
        """The loop over the entries; `step` makes what is done to a tile."""
        block = Var(f"{axis}_block", INT)
        first = block * self.block
        body: list[Stmt] = [Let(block.name, Load(self.blocks, INT, (ENTRY,)))]
        body += [] if self.word is None else [Let(SEEN.name, self.word)]

        def on_tile(masked: Masked) -> list[Stmt]:
            return step(masked if self.there is None else InParts(self.there))

        for run in self.runs:
            if self.block:
                lo, hi = call(Op.MAX, first, run.lo), call(Op.MIN, first + self.block, run.hi)
                run = replace(run, lo=lo, hi=hi)
            tiles = run.loop(axis, on_tile)
            if self.block == self.tile:
                next_block = Load(self.blocks, INT, (call(Op.MIN, ENTRY + 1, self.end - 1),))
                tiles = replace(tiles, following=next_block * self.block)
            body.append(tiles)
        return Loop(ENTRY.name, self.begin, self.end, None, tuple(body))


def given_runs(
    program: Attention,
    listed: ListedBlocks,
    loop: str,
    tile: int,
    within: tuple[Run, ...],
    *,
    one_split: bool,
) -> tuple[list[Stmt], tuple[GivenRun, ...]]:
    """Bounds of the lists as Lets, then the runs over their entries; within: those of the mask."""
    bounds, ends = list_bounds(program, listed, loop, one_split=one_split)
    block = listed.block(loop)
    whole = GivenRun(
        f"given {loop} blocks", "step", blocks_param(loop, "full"), *ends["full"], block, tile, within
    )
    if "partial" not in listed.kinds:
        return bounds, (whole,)
    if loop == "kv" and listed.parts[0] > 1:
        bounds.append(Let(PART.name, _part_of_query(listed)))
    # Every tile of such a block is masked, whatever the mask makes of it.
    first, last = within[0], within[-1]
    every = replace(first, title="", step="partial_step", hi=last.hi, masked=True, branch=True)
    word, there = _bits(listed, loop)
    blocks, title = blocks_param(loop, "partial"), f"given {loop} blocks of which parts are visible"
    return bounds, (
        GivenRun(title, "step", blocks, *ends["partial"], block, tile, (every,), word, there),
        whole,
    )


def _bits(listed: ListedBlocks, loop: str) -> tuple[Expr | None, Expr]:
    """The word of an entry where there is one alone, and the bit of a pair."""
    of_queries, of_keys = listed.parts
    place: Expr = Const(0)
    if of_queries > 1:
        place = (PART if loop == "kv" else _part_of_query(listed)) * of_keys
    if of_keys > 1:
        place = place + KV_IDX // (listed.kv // of_keys) % of_keys
    words, tensor = listed.words, seen_param(loop)
    if words == 1:
        return Load(tensor, INT, (ENTRY,)), call(Op.BIT, SEEN, place)
    word = Load(tensor, INT, (ENTRY * words + place // BITS,))
    return None, call(Op.BIT, word, place % BITS)


def _part_of_query(listed: ListedBlocks) -> Expr:
    """Which part of its block a query is in."""
    part = Q_IDX // listed.part_rows
    return part % listed.parts[0] if listed.q else part

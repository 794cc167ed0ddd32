"""Loops over blocks that a call gives and that know nothing of the mask: lists meet what the mask leaves of a block.

The bounds and runs of `ranges.py` stand as they are; a loop over the entries of a list stands around them, and each run
visits the tiles of one block that lie within it:

    for entry from full_begin to full_end:
        kv_block = kv_full_blocks[entry]
        for kv_start from max(kv_block * 64, kv_begin) to min(kv_block * 64 + 64, kv_full_end) by tiles of kv: no mask
        for kv_start from max(kv_block * 64, kv_full_end) to min(kv_block * 64 + 64, kv_end) by tiles of kv: masked
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from attn_engine.codegen.lower.listed import ENTRY, blocks_param, list_bounds
from attn_engine.codegen.lower.ranges import Run
from attn_engine.codegen.lower.score import Masked
from attn_engine.codegen.lower.values import INT
from attn_engine.ir.expr import Expr, Load, Var, call
from attn_engine.ir.ops import Op
from attn_engine.ir.program import Attention, ListedBlocks
from attn_engine.ir.tile import Let, Loop, Stmt


@dataclass(frozen=True, slots=True)
class GivenRun:
    """The tiles of the blocks in entries begin to end of a list, as far as `runs` visit them.

    block: positions of each.
    """

    title: str
    step: str
    blocks: str
    begin: Expr
    end: Expr
    block: int
    runs: tuple[Run, ...]

    def loop(self, axis: str, step: Callable[[Masked], list[Stmt]]) -> Loop:
        """The loop over the entries; `step` makes what is done to a tile."""
        block = Var(f"{axis}_block", INT)
        first = block * self.block
        body: list[Stmt] = [Let(block.name, Load(self.blocks, INT, (ENTRY,)))]
        for run in self.runs:
            lo, hi = call(Op.MAX, first, run.lo), call(Op.MIN, first + self.block, run.hi)
            body.append(replace(run, lo=lo, hi=hi).loop(axis, step))
        return Loop(ENTRY.name, self.begin, self.end, None, tuple(body))


def given_runs(
    program: Attention,
    listed: ListedBlocks,
    loop: str,
    within: tuple[Run, ...],
    *,
    one_split: bool,
) -> tuple[list[Stmt], tuple[GivenRun, ...]]:
    """Bounds of the lists as Lets, then the runs over their entries; within: those of the mask."""
    bounds, ends = list_bounds(program, listed, loop, one_split=one_split)

    def run(kind: str, title: str, runs: tuple[Run, ...]) -> GivenRun:
        return GivenRun(title, "step", blocks_param(loop, kind), *ends[kind], listed.block(loop), runs)

    return bounds, (run("full", f"given {loop} blocks", within),)

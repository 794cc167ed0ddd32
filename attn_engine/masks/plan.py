"""The plan of a mask: closed-form ranges where there are some, exact block lists whenever they are asked for.

A plan is of one moment. `MaskSource` keeps the latest one and makes another when something that the mask reads has
changed since: a captured number, a captured tensor (another one, or the same one after an in-place change).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from attn_engine.frontend import MaskMod
from attn_engine.ir.expr import Const
from attn_engine.masks.classes import (
    BlockRanges,
    Listed,
    block_ranges,
    classes_from_grid,
    classes_from_ranges,
    resolved,
)
from attn_engine.masks.lists import BlockLists, Csr, Side
from attn_engine.masks.program import MaskProgram, Moment, mask_program
from attn_engine.masks.rows import csr_of, transposed
from attn_engine.masks.values import Blocks


@dataclass(eq=False)
class BlockPlan:
    """Where a mask at one moment lets queries look, block by block.

    separate_full: False puts wholly visible blocks among the partial ones, as in torch.
    """

    program: MaskProgram
    moment: Moment
    block_size: tuple[int, int]
    separate_full: bool = True

    def __post_init__(self) -> None:
        block_q, block_kv = self.block_size
        self.blocks = Blocks(self.moment, {"q": block_q, "kv": block_kv})

    @cached_property
    def ranges(self) -> BlockRanges | None:
        """The closed form: ranges of kv blocks per q block; None where the mask is none of a few ranges per row."""
        return block_ranges(self.program.analysis, self.blocks)

    @property
    def kind(self) -> str:
        """ "nothing" (all is visible), "ranges" (a closed form) or "lists"."""
        result = self.program.mask.result
        if isinstance(result, Const) and result.value:
            return "nothing"
        return "lists" if self.ranges is None else "ranges"

    @cached_property
    def lists(self) -> BlockLists:
        """The exact lists of both sides."""
        blocks, analysis = self.blocks, self.program.analysis
        ranges = self.ranges
        known = classes_from_grid(analysis, blocks) if ranges is None else classes_from_ranges(ranges, blocks)
        classes = resolved(self.program.mask.result, known, blocks)
        full, partial = classes.full, classes.partial
        if not self.separate_full:
            full, partial = Listed(torch.zeros_like(full.counts), full.columns[:0]), full.merged(partial)
        rows = (blocks.batch, blocks.heads, blocks.count["q"])
        by_q = Side(csr_of(partial, rows), csr_of(full, rows))
        return both_sides(self.block_size, (blocks.length["q"], blocks.length["kv"]), by_q)


def both_sides(block_size: tuple[int, int], lengths: tuple[int, int], by_q: Side) -> BlockLists:
    """The lists whose query side is given."""
    columns = -(-lengths[1] // block_size[1])

    def turned(csr: Csr) -> Csr:
        return transposed(csr, columns)

    by_kv = Side(turned(by_q.partial), turned(by_q.full))
    return BlockLists(*block_size, *lengths, by_q, by_kv)


@dataclass(eq=False)
class MaskSource:
    """A mask_mod and the sizes that it is planned for; `plan()` is that of now."""

    mask_mod: MaskMod
    batch: int
    heads: int
    lengths: tuple[int, int]
    device: torch.device
    block_size: tuple[int, int]
    separate_full: bool = True
    _plan: BlockPlan | None = None

    def plan(self) -> BlockPlan:
        """The plan of now. Raises a typed error where the mask cannot be traced or reads what it may not."""
        found = self._plan
        program = mask_program(self.mask_mod)
        moment = program.moment(self.batch, self.heads, *self.lengths, self.device)
        if found is not None and found.program.mask == program.mask and moment.same(found.moment):
            return found
        with torch.no_grad():
            program.check(moment)
        self._plan = BlockPlan(program, moment, self.block_size, self.separate_full)
        return self._plan

"""Which tiles a program's loop visits: those that its mask plan says, those of listed blocks, or those of both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from attn_engine.codegen.lower.given_blocks import given_runs
from attn_engine.codegen.lower.listed import listed_runs
from attn_engine.codegen.lower.ranges import phases
from attn_engine.codegen.lower.score import Masked
from attn_engine.codegen.lower.tile_classes import TileTests
from attn_engine.codegen.schedule import Edges
from attn_engine.ir.expr import Expr
from attn_engine.ir.passes.mask_range import plan_mask
from attn_engine.ir.program import Attention
from attn_engine.ir.tile import Loop, Stmt


class TileRun(Protocol):
    """A loop over tiles that a program visits."""

    @property
    def title(self) -> str: ...

    def loop(self, axis: str, step: Callable[[Masked], list[Stmt]]) -> Loop: ...


@dataclass(frozen=True, slots=True)
class Visited:
    """Bounds as Lets, then the runs over them."""

    bounds: tuple[Stmt, ...]
    runs: tuple[TileRun, ...]


def phases_of(
    program: Attention,
    loop: str,
    tiles: dict[str, int],
    edges: Edges,
    tests: TileTests | None = None,
    *,
    own_rows_count: bool = False,
    one_split: bool = False,
    within: tuple[Expr, Expr] | None = None,
) -> Visited:
    """The runs of a program's loop over `loop`. Parameters as in `phases`."""
    listed = program.listed
    if listed is not None and not listed.tested:
        assert within is None, "lists that know of the mask are not cut in shares of queries"
        bounds, runs = listed_runs(
            program, listed, loop, tiles, edges, own_rows_count=own_rows_count, one_split=one_split
        )
        return Visited(tuple(bounds), runs)
    plan = plan_mask(program.mask.result if program.mask else None, loop)
    if listed is None:
        found = phases(
            plan, tiles, edges, tests, own_rows_count=own_rows_count, one_split=one_split, within=within
        )
        return Visited(found.bounds, found.runs)
    seen = phases(plan, tiles, edges, tests, own_rows_count=own_rows_count, within=within)
    bounds, given = given_runs(program, listed, loop, tiles[loop], seen.runs, one_split=one_split)
    return Visited((*seen.bounds, *bounds), given)

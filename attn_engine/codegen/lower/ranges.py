"""The loop over one program's tiles: named bounds from the mask plan, and runs of tiles with or without the mask.

Every bound is a multiple of the loop's tile, so a backend may count tiles instead of elements.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from attn_engine.codegen.lower.listed import WHOLE
from attn_engine.codegen.lower.score import Masked
from attn_engine.codegen.lower.tile_classes import TileTests, last_row
from attn_engine.codegen.lower.values import INT, SPLIT, SPLITS, scalar
from attn_engine.codegen.schedule import Edges
from attn_engine.ir.expr import Const, Expr, Var, call, variables, where
from attn_engine.ir.ops import Op
from attn_engine.ir.passes.mask_range import OTHER, MaskPlan, NoneKnown
from attn_engine.ir.passes.simplify import simplify
from attn_engine.ir.tile import If, Let, Loop, Stmt


@dataclass(frozen=True, slots=True)
class Run:
    """Loop tiles from lo to hi. masked: always, never, or under this condition on the tile.

    tests: asked of each tile first. branch: tiles are only skipped; those that are whole take the masked step too.
    """

    title: str
    step: str
    lo: Expr
    hi: Expr
    masked: bool | Expr
    tests: TileTests | None = None
    branch: bool = False

    def loop(self, axis: str, step: Callable[[Masked], list[Stmt]]) -> Loop:
        """The loop over the tiles; `step` makes what is done to one, masked always, never or under a condition."""
        body = step(self.masked) if self.tests is None else self._tested(self.tests, step)
        return Loop(f"{axis}_start", self.lo, self.hi, axis, tuple(body), self.step)

    def _tested(self, tests: TileTests, step: Callable[[Masked], list[Stmt]]) -> list[Stmt]:
        always = isinstance(tests.may_hold, Const)
        if self.branch or isinstance(tests.whole, Const):
            # One step for all: on a GPU a second branch inside the first one costs registers (dK/dV would spill).
            masked = tuple(step(True))
            return [*tests.inner, *(masked if always else [If(tests.may_hold, masked, "partial_step")])]
        seen: tuple[Stmt, ...] = (
            Let(WHOLE.name, tests.whole),
            If(WHOLE, tuple(step(False)), "full_step"),
            If(~WHOLE, tuple(step(True)), "partial_step"),
        )
        return [*tests.inner, *(seen if always else [If(tests.may_hold, seen)])]


@dataclass(frozen=True, slots=True)
class Phases:
    bounds: tuple[Stmt, ...]
    runs: tuple[Run, ...]


def phases(
    plan: MaskPlan,
    tiles: dict[str, int],
    edges: Edges,
    tests: TileTests | None = None,
    *,
    own_rows_count: bool = False,
    one_split: bool = False,
    within: tuple[Expr, Expr] | None = None,
) -> Phases:
    """Bounds as Lets, then the runs over them. The ragged last tile of the loop is never a full one.

    own_rows_count: rows past the end of the program's own tile would count too (they are summed over, not just not
    stored), so where the own tile is ragged, no tile is a full one.
    one_split: the program has one of several shares of what its tile can see.
    within: the positions that the loop keeps to, multiples of its tile; None: all.
    """
    loop, axis = plan.loop, OTHER[plan.loop]
    n, length = tiles[loop], scalar(f"{loop}_len")
    begin, end = (Var(f"{loop}_{v}", INT) for v in ("begin", "end"))
    hull_lo, hull_hi = plan.hull.lo, plan.hull.hi
    bounds: list[Stmt] = []
    own = () if tests is None else tests.own
    if _mentions_last(plan) and all(isinstance(s, Let) and s.name != f"{axis}_last" for s in own):
        bounds.append(Let(f"{axis}_last", last_row(axis, tiles)))
    bounds += own
    first = Const(0) if hull_lo is None else call(Op.MAX, floor_to(hull_lo, n), 0)
    stop = length if hull_hi is None else call(Op.MIN, hull_hi, length)
    stop = ceil_to(stop, n)
    if within is not None:
        first, stop = call(Op.MAX, first, within[0]), call(Op.MIN, stop, within[1])
    bounds += [_let(f"{loop}_begin", first), _let(f"{loop}_end", call(Op.MAX, stop, begin))]
    if one_split:
        bounds += split_bounds(n, begin, end, (end - begin) // n, loop)
        begin, end = scalar("split_begin"), scalar("split_end")
    if tests is not None:
        title = f"{loop} tiles in sight: none, some or all of the pairs visible"
        run = Run(title, "step", begin, end, True, tests, edges is Edges.BRANCH)
        return Phases(tuple(bounds), (run,))
    if isinstance(plan.full, NoneKnown):
        run = Run(f"{loop} tiles that may hold visible pairs, masked", "partial_step", begin, end, True)
        return Phases(tuple(bounds), (run,))
    full_begin, full_end = (Var(f"{loop}_full_{v}", INT) for v in ("begin", "end"))
    lo, hi = plan.full.lo, plan.full.hi
    if lo is not None:
        bounds.append(_let(f"{loop}_full_begin", call(Op.MIN, call(Op.MAX, ceil_to(lo, n), begin), end)))
    else:
        full_begin = begin
    last_full = length if hi is None else call(Op.MIN, hi, length)
    if own_rows_count:
        last_full = where(scalar(f"{axis}_start") + tiles[axis] <= scalar(f"{axis}_len"), last_full, 0)
    # Clamped to the end as well: an empty full interval may lie beyond it.
    bounds.append(
        _let(f"{loop}_full_end", call(Op.MAX, call(Op.MIN, floor_to(last_full, n), end), full_begin))
    )
    runs = (
        _branch(loop, begin, full_begin, full_end, end)
        if edges is Edges.BRANCH
        else _split(loop, begin, full_begin, full_end, end)
    )
    return Phases(tuple(bounds), runs)


def split_bounds(
    n: int, begin: Expr, end: Expr, tiles: Expr, axis: str = "kv", *, last_first: bool = False
) -> list[Stmt]:
    """Contiguous shares, one per split, of the tiles of n rows from `begin` to `end`; the first split has the first,
    or the last."""
    share = scalar("tiles_per_split")
    place = SPLITS - 1 - SPLIT if last_first else SPLIT
    return [
        Let(f"{axis}_tiles", tiles),
        Let("tiles_per_split", (scalar(f"{axis}_tiles") + SPLITS - 1) // SPLITS),
        _let("split_begin", begin + place * share * n),
        _let("split_end", call(Op.MIN, scalar("split_begin") + share * n, end)),
    ]


def _branch(loop: str, begin: Expr, full_begin: Expr, full_end: Expr, end: Expr) -> tuple[Run, ...]:
    here = scalar(f"{loop}_start")
    in_part = here >= full_end if full_begin is begin else (here < full_begin) | (here >= full_end)
    return (Run(f"{loop} tiles in sight, masked where seen in part", "step", begin, end, in_part),)


def _split(loop: str, begin: Expr, full_begin: Expr, full_end: Expr, end: Expr) -> tuple[Run, ...]:
    left = Run(f"{loop} tiles seen in part: left edge", "partial_step", begin, full_begin, True)
    full = Run(f"{loop} tiles seen in full: no mask", "full_step", full_begin, full_end, False)
    right = Run(f"{loop} tiles seen in part: right edge", "partial_step", full_end, end, True)
    return (full, right) if full_begin is begin else (left, full, right)


def _mentions_last(plan: MaskPlan) -> bool:
    ends = [plan.hull.lo, plan.hull.hi]
    ends += [] if isinstance(plan.full, NoneKnown) else [plan.full.lo, plan.full.hi]
    return any(v.name.endswith("_last") for e in ends if e is not None for v in variables(e))


def _let(name: str, value: Expr) -> Let:
    return Let(name, simplify(value))


def floor_to(x: Expr, n: int) -> Expr:
    """x rounded down to a multiple of n, also for negative x."""
    return x // n * n


def ceil_to(x: Expr, n: int) -> Expr:
    return floor_to(x + (n - 1), n)


def masking(when: Masked, lets: list[Stmt]) -> list[Stmt]:
    """The mask's lets always, never or under a condition on the tile."""
    return [If(when, tuple(lets))] if isinstance(when, Expr) else list(lets) if when else []

"""Loops of a tile program as counted steps: tiles are counted, and a loop around a loop over tiles becomes one loop.

A machine that copies tiles ahead of the products does so within one loop. Heads of a group times their tiles, or listed
blocks times their tiles, are therefore one run of steps wherever the number of tiles is the same for all.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from attn_engine.codegen.lower.values import scalar
from attn_engine.ir.expr import Call, Const, Expr, Load, Var, call, variables
from attn_engine.ir.ops import Op
from attn_engine.ir.passes.simplify import simplify
from attn_engine.ir.tile import If, Let, Loop, Section, Stmt, walk

STEP = scalar("step")


@dataclass(frozen=True, slots=True)
class CountedLoop:
    """before; for var from first to stop: body. over_tiles: whether a trip is about one tile. once: whether there is a
    trip at least."""

    before: tuple[Let, ...]
    var: str
    first: Expr
    stop: Expr
    body: tuple[Stmt, ...]
    over_tiles: bool
    once: bool = False


def counted(s: Loop, blocks: dict[str, int]) -> CountedLoop:
    """The loop with trips counted, one by one, from the loop's own bounds. blocks: rows of a tile of each axis.

    A loop that masks its tiles runs one trip where it has none to do, in which everything is masked: what was copied
    before the loop is waited for in its first trip.
    """
    if s.axis is not None:
        n, var = blocks[s.axis], f"{s.axis}_tile"
        start = Let(s.var, scalar(var) * n)
        first, stop = tiles(s.lo, n), tiles(s.hi, n)
        stop = simplify(call(Op.MAX, stop, first + 1)) if masks(s) else stop
        return CountedLoop((), var, first, stop, (start, *s.body), over_tiles=True, once=masks(s))
    return _joined(s, blocks) or CountedLoop((), s.var, s.lo, s.hi, s.body, over_tiles=False)


def masks(loop: Loop) -> bool:
    """Whether the body masks a tile of which nothing is visible, also one past the end of the axis."""
    return bool(loop.title) and not loop.title.endswith(("full_step", "tile"))


def tiles(bound: Expr, n: int) -> Expr:
    """A bound, which is a multiple of n, in tiles of n.

    >>> from attn_engine.ir.expr import Const
    >>> tiles(Const(128), 64)
    Const(value=2)
    """
    return simplify(bound // n) if not isinstance(bound, Const) else Const(int(bound.value) // n)


def _joined(outer: Loop, blocks: dict[str, int]) -> CountedLoop | None:
    """A loop around one loop over tiles as a single loop; None where they cannot be one."""
    *between, inner = (s for s in outer.body if not isinstance(s, Section))
    if not (isinstance(inner, Loop) and inner.axis is not None and _only_loop(inner)):
        return None
    n = blocks[inner.axis]
    lets = [s for s in between if isinstance(s, Let) and (not s.value.axes or isinstance(s.value, Load))]
    if len(lets) < len(between):
        return None  # it starts a sum for each trip
    before, inside = _apart(lets, outer.var)
    trips, end = _fixed_trips(inner, n)
    hoisted, once = list[Let](), False
    if trips is None:
        changing = {outer.var, *(let.name for let in inside)}
        if changing & {v.name for e in (inner.lo, inner.hi) for v in variables(e)}:
            return None
        trips = simplify(tiles(inner.hi, n) - tiles(inner.lo, n))
        count = Let(f"{inner.axis}_steps", call(Op.MAX, trips, 1) if masks(inner) else trips)
        hoisted, trips, once = [*before, count], count.var, masks(inner)
    else:
        inside = lets
    body = inner.body if end is None else (If(scalar(inner.var) < end, inner.body),)
    return replace(_one_loop(outer, inner, trips, n, tuple(hoisted), inside, body), once=once)


def _one_loop(
    outer: Loop,
    inner: Loop,
    trips: Expr,
    n: int,
    before: tuple[Let, ...],
    inside: list[Let],
    body: tuple[Stmt, ...],
) -> CountedLoop:
    if trips is Const(1):
        own: list[Stmt] = [*inside, Let(inner.var, inner.lo)]
        return CountedLoop(before, outer.var, outer.lo, outer.hi, (*own, *body), over_tiles=True)
    first = Let(outer.var, simplify(outer.lo + STEP // trips))
    start = Let(inner.var, simplify(inner.lo + STEP % trips * n))
    times = outer.hi - outer.lo
    match outer.hi:
        case Call(Op.ADD, (lo, length)) if lo is outer.lo:
            times = length
        case _:
            pass
    count = simplify(times * trips)
    return CountedLoop(before, STEP.name, Const(0), count, (first, *inside, start, *body), over_tiles=True)


def _only_loop(loop: Loop) -> bool:
    return not any(isinstance(s, Loop) for s in walk(loop.body))


def _apart(lets: list[Let], var: str) -> tuple[list[Let], list[Let]]:
    """Those that are the same in every trip of the loop over `var`, and the others."""
    changing, same, other = {var}, list[Let](), list[Let]()
    for let in lets:
        depends = any(v.name in changing for v in variables(let.value))
        (other if depends else same).append(let)
        changing |= {let.name} if depends else set()
    return same, other


def _fixed_trips(loop: Loop, n: int) -> tuple[Expr | None, Expr | None]:
    """How many tiles there are where that is a number, and where they end early."""
    match loop.hi:
        case Call(Op.ADD, (lo, Const(length))) if lo is loop.lo:
            return Const(int(length) // n), None
        case Call(Op.MIN, (Call(Op.ADD, (lo, Const(length))), Var() as end)) if lo is loop.lo:
            return Const(int(length) // n), end
        case _:
            return None, None

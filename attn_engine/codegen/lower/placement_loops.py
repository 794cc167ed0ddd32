"""Loops of a tile program as counted steps: tiles are counted, and a loop around a loop over tiles becomes one loop.

A machine that copies tiles ahead of the products does so within one loop. Heads of a group times their tiles, or listed
blocks times their tiles, are therefore one run of steps wherever the number of tiles is the same for all.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from attn_engine.codegen.lower.values import scalar
from attn_engine.ir.expr import Call, Const, Expr, Full, Load, Var, call, variables
from attn_engine.ir.ops import Op
from attn_engine.ir.passes.simplify import simplify
from attn_engine.ir.tile import If, Let, Loop, Section, Stmt, StoreTile, walk

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


def counted(s: Loop, blocks: dict[str, int], entry: frozenset[str] = frozenset()) -> CountedLoop:
    """The loop with trips counted, one by one, from the loop's own bounds. blocks: rows of a tile of each axis.

    A loop that masks its tiles runs one trip where it has none to do, in which everything is masked: what was copied
    before the loop is waited for in its first trip. entry: names that an entry of a list gives. Where the mask's bounds
    end before the entry's block begins, its first tile lies in another block and may be visible: no trip then.
    """
    if s.axis is not None:
        n, var = blocks[s.axis], f"{s.axis}_tile"
        start = Let(s.var, scalar(var) * n)
        first, stop = tiles(s.lo, n), tiles(s.hi, n)
        once = masks(s) and not any(v.name in entry for v in variables(s.lo))
        stop = simplify(call(Op.MAX, stop, first + 1)) if once else stop
        return CountedLoop((), var, first, stop, (start, *s.body), over_tiles=True, once=once)
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
    parts = _around_one_loop(outer)
    if parts is None:
        return None
    lets, starts, inner, ends = parts
    n = blocks[inner.axis or ""]
    before, inside = _apart(lets, outer.var)
    trips, end = _fixed_trips(inner, n)
    if trips is not None:
        body = inner.body if end is None else (If(scalar(inner.var) < end, inner.body),)
        return None if starts or ends else _one_loop(outer, inner, trips, n, Around(tuple(lets)), body)
    changing = {outer.var, *(let.name for let in inside)}
    if changing & {v.name for e in (inner.lo, inner.hi) for v in variables(e)}:
        return None
    if (starts or ends) and not masks(inner):
        return None  # there may be no trip in which to start or to end a sum
    trips = simplify(tiles(inner.hi, n) - tiles(inner.lo, n))
    count = Let(f"{inner.axis}_steps", call(Op.MAX, trips, 1) if masks(inner) else trips)
    around = Around(tuple(inside), tuple(starts), tuple(ends))
    one = _one_loop(outer, inner, count.var, n, around, inner.body)
    return replace(one, before=(*before, count), once=masks(inner))


@dataclass(frozen=True, slots=True)
class Around:
    """Statements of the outer loop: in every trip, before the inner loop's first one, after its last one."""

    always: tuple[Stmt, ...]
    starts: tuple[Stmt, ...] = ()
    ends: tuple[Stmt, ...] = ()


def _around_one_loop(outer: Loop) -> tuple[list[Let], list[Stmt], Loop, list[Stmt]] | None:
    """(Lets of numbers and loads, sums that start, the only loop, what is stored after it), where that is all."""
    body = [s for s in outer.body if not isinstance(s, Section)]
    loops = [i for i, s in enumerate(body) if isinstance(s, Loop)]
    if len(loops) != 1:
        return None
    inner, pre, ends = body[loops[0]], body[: loops[0]], body[loops[0] + 1 :]
    assert isinstance(inner, Loop)
    if inner.axis is None or not _only_loop(inner) or not all(isinstance(s, StoreTile) for s in ends):
        return None
    starts = [s for s in pre if isinstance(s, Let) and isinstance(s.value, Full)]
    lets = [
        s
        for s in pre
        if isinstance(s, Let) and s not in starts and (not s.value.axes or isinstance(s.value, Load))
    ]
    return (lets, [*starts], inner, [*ends]) if len(lets) + len(starts) == len(pre) else None


def _one_loop(
    outer: Loop, inner: Loop, trips: Expr, n: int, around: Around, body: tuple[Stmt, ...]
) -> CountedLoop:
    times = outer.hi - outer.lo
    match outer.hi:
        case Call(Op.ADD, (lo, length)) if lo is outer.lo:
            times = length
        case _:
            pass
    if trips is Const(1):
        own: tuple[Stmt, ...] = (*around.always, Let(inner.var, inner.lo))
        return CountedLoop((), outer.var, outer.lo, outer.hi, (*own, *body), over_tiles=True)
    trip = STEP % trips
    first = Let(outer.var, simplify(outer.lo + STEP // trips))
    start = Let(inner.var, simplify(inner.lo + trip * n))
    starts = [If(trip.equals(0), around.starts)] if around.starts else []
    ends = [If(trip.equals(trips - 1), around.ends)] if around.ends else []
    steps = (first, *around.always, start, *starts, *body, *ends)
    return CountedLoop((), STEP.name, Const(0), simplify(times * trips), steps, over_tiles=True)


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

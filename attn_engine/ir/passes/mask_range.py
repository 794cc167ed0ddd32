"""Mask analysis: which part of the loop axis a program's tile meets, and which part it meets entirely.

Forward and dQ loop over "kv" for one tile of "q"; dK/dV loop over "q" for one tile of "kv": the same analysis with the
roles swapped. A mask is a formula over comparisons that are linear in both indices; everything else (captured tensors
indexed by position, products of indices) is unknown and only bounds nothing. The answer is always sound: `hull` misses
no visible pair, and a loop tile inside `full` holds visible pairs only.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from attn_engine.ir.expr import Call, Const, Expr, Var, call, substitute, where
from attn_engine.ir.ops import DType, Op
from attn_engine.ir.passes.simplify import simplify, sum_of
from attn_engine.ir.printer import format_expr
from attn_engine.ir.program import GROUP

ZERO, ONE = Const(0), Const(1)
OTHER = {"q": "kv", "kv": "q"}


@dataclass(frozen=True, slots=True)
class Interval:
    """Half-open [lo, hi) of the loop axis, in terms of the tile's ends; None: unbounded on that side.

    whole: it is the whole axis or empty, so either side alone says which.
    """

    lo: Expr | None = None
    hi: Expr | None = None
    whole: bool = False


@dataclass(frozen=True, slots=True)
class NoneKnown:
    """No loop tile is known to be visible entirely. (Not the same as an unbounded side.)"""


@dataclass(frozen=True, slots=True)
class MaskPlan:
    """Where a tile looks along the loop axis, and why.

    hull: outside it nothing is visible. full: inside it everything is. The ends of the tile are the variables
    "<axis>_start" and "<axis>_last" of the other axis; the loop axis' length is "<loop>_len".
    """

    loop: str
    hull: Interval
    full: Interval | NoneKnown
    reasons: tuple[str, ...] = field(default=(), compare=False)
    decided: bool = True  # every part of the mask was understood
    gaps: bool = False  # the hull spans tiles between two alternatives that neither of them sees

    @property
    def bounded(self) -> bool:
        """Whether whole tiles can be skipped."""
        return self.hull != Interval()

    @property
    def everything(self) -> bool:
        return self.hull == Interval() and self.full == Interval()


@dataclass(frozen=True, slots=True)
class _Linear:
    """sum of factor * f(tile_idx) + loop * ((loop_idx + shift) // unit) + rest.

    tile: pairs of f, which never decreases along the tile, and its factor, never 0. unit: a positive number.
    """

    tile: tuple[tuple[Expr, int], ...]
    loop: int
    rest: Expr
    unit: Expr
    shift: Expr

    def plus(self, other: _Linear, sign: int) -> _Linear | None:
        """self + sign * other; None where the loop index occurs in two different quotients."""
        ours, theirs = (self.unit, self.shift), (other.unit, other.shift)
        if self.loop and other.loop and ours != theirs:
            return None
        unit, shift = ours if self.loop else theirs
        factors = dict(self.tile)
        for f, factor in other.tile:
            factors[f] = factors.get(f, 0) + sign * factor
        tile = tuple((f, factor) for f, factor in factors.items() if factor)
        rest = simplify(call(Op.ADD if sign > 0 else Op.SUB, self.rest, other.rest))
        loop = self.loop + sign * other.loop
        return _Linear(tile, loop, rest, unit if loop else ONE, shift if loop else ZERO)

    def times(self, c: int) -> _Linear:
        tile = tuple((f, factor * c) for f, factor in self.tile if c)
        return replace(self, tile=tile, loop=self.loop * c, rest=simplify(self.rest * c))


@dataclass(frozen=True, slots=True)
class _Seen:
    hull: Interval
    full: Interval | NoneKnown
    reasons: tuple[str, ...]
    decided: bool = True
    gaps: bool = False


def plan_mask(mask: Expr | None, loop: str) -> MaskPlan:
    """The plan for a program that owns one tile of the other axis and loops over `loop` ("q" or "kv")."""
    if mask is None:
        return MaskPlan(loop, Interval(), Interval(), ("no mask",))
    seen = _Analysis(loop).formula(simplify(mask), negated=False)
    return MaskPlan(loop, seen.hull, seen.full, seen.reasons, seen.decided, seen.gaps)


class _Analysis:
    def __init__(self, loop: str) -> None:
        self.loop = loop
        self.tile = OTHER[loop]
        self.position = Var(f"{self.tile}_idx", DType.INT, (self.tile,))
        self.start = Var(f"{self.tile}_start", DType.INT)
        self.last = Var(f"{self.tile}_last", DType.INT)
        self.length = Var(f"{loop}_len", DType.INT)

    def formula(self, e: Expr, *, negated: bool) -> _Seen:
        match e:
            case Const(bool() as value):
                return self.everything() if value is not negated else self.nothing()
            case Call(Op.NOT, (x,)):
                return self.formula(x, negated=not negated)
            case Call(Op.AND | Op.OR as op, (a, b)):
                x, y = self.formula(a, negated=negated), self.formula(b, negated=negated)
                return self.both(x, y) if (op is Op.AND) is not negated else self.either(x, y)
            case Call(Op.LE, (a, b)):  # a <= b: b - a >= 0; its negation: a - b - 1 >= 0
                return (
                    self.at_least_zero(e, a, b, strict=True)
                    if negated
                    else self.at_least_zero(e, b, a, strict=False)
                )
            case Call(Op.LT, (a, b)):
                return (
                    self.at_least_zero(e, a, b, strict=False)
                    if negated
                    else self.at_least_zero(e, b, a, strict=True)
                )
            case Call(Op.EQ | Op.NE as op, (a, b)) if (op is Op.EQ) is not negated and a.dtype is DType.INT:
                return self.both(
                    self.at_least_zero(e, a, b, strict=False), self.at_least_zero(e, b, a, strict=False)
                )
            case _ if not e.axes:
                return self.condition(
                    ~e if negated else e, ~e if negated else e, "does not depend on the position"
                )
            case _:
                return self.unknown(f"unknown: {format_expr(e)}")

    def everything(self) -> _Seen:
        return _Seen(Interval(), Interval(), ())

    def unknown(self, reason: str) -> _Seen:
        return _Seen(Interval(), NoneKnown(), (reason,), decided=False)

    def nothing(self) -> _Seen:
        return _Seen(Interval(None, Const(0)), Interval(None, Const(0)), ("nothing is visible",))

    def condition(self, some: Expr, every: Expr, reason: str) -> _Seen:
        """The whole loop axis where a scalar condition holds, nothing where not."""

        def whole_if(c: Expr) -> Interval:
            return Interval(where(c, 0, self.length), where(c, self.length, 0), whole=True)

        return _Seen(whole_if(some), whole_if(every), (reason,))

    def at_least_zero(self, atom: Expr, a: Expr, b: Expr, *, strict: bool) -> _Seen:
        """a - b >= 0, or >= 1 where strict."""
        x, y = self.linear(a), self.linear(b)
        if x is None or y is None:
            return self.unknown(f"not linear in the positions: {format_expr(atom)}")
        slack = x.plus(y, -1)
        if slack is None:
            return self.unknown(f"the {self.loop} position divided twice: {format_expr(atom)}")
        slack = replace(slack, rest=simplify(slack.rest - (1 if strict else 0)))
        if slack.loop == 0:
            lowest, highest = self.at(slack, lowest=True), self.at(slack, lowest=False)
            return self.condition(
                highest >= 0, lowest >= 0, f"{format_expr(atom)}: bounds the {self.tile} tile"
            )
        return self.bound(slack, f"{format_expr(atom)}: linear")

    def bound(self, slack: _Linear, reason: str) -> _Seen:
        """slack >= 0 as a bound on the loop index; over the tile it is extreme at one of the tile's ends."""
        lowest, highest = self.at(slack, lowest=True), self.at(slack, lowest=False)

        def index(quotient: Expr) -> Expr:
            """The first loop index with that quotient."""
            return quotient if slack.unit is ONE else simplify(quotient * slack.unit - slack.shift)

        if slack.loop > 0:  # quotient >= ceil(-(tile + rest) / loop)
            lo, full_lo = (index(simplify(-_floor_divide(x, slack.loop))) for x in (highest, lowest))
            return _Seen(Interval(lo, None), Interval(full_lo, None), (reason,))
        hi, full_hi = (index(simplify(_floor_divide(x, -slack.loop) + 1)) for x in (highest, lowest))
        return _Seen(Interval(None, hi), Interval(None, full_hi), (reason,))

    def at(self, slack: _Linear, *, lowest: bool) -> Expr:
        """The extreme of the tile's part and the rest over the tile."""
        total: Expr = ZERO
        for f, factor in slack.tile:
            end = substitute(f, {self.position: self.start if (factor > 0) == lowest else self.last})
            total = sum_of(total, end if factor == 1 else -end if factor == -1 else end * factor)
        return simplify(sum_of(total, slack.rest))

    def both(self, x: _Seen, y: _Seen) -> _Seen:
        full = (
            NoneKnown()
            if isinstance(x.full, NoneKnown) or isinstance(y.full, NoneKnown)
            else _meet(x.full, y.full)
        )
        decided, gaps = x.decided and y.decided, x.gaps or y.gaps
        return _Seen(_meet(x.hull, y.hull), full, x.reasons + y.reasons, decided, gaps)

    def either(self, x: _Seen, y: _Seen) -> _Seen:
        full = _either_full(x.full, y.full)
        decided, gaps = x.decided and y.decided, x.gaps or y.gaps or _leave_a_gap(x.hull, y.hull)
        return _Seen(_hull(x.hull, y.hull), full, x.reasons + y.reasons, decided, gaps)

    def linear(self, e: Expr) -> _Linear | None:
        """e as a linear form, or None."""
        if e.dtype is not DType.INT:
            return None
        if not e.axes:
            return _Linear((), 0, e, ONE, ZERO)
        match e:
            case Var() if e is self.position:
                return _Linear(((e, 1),), 0, ZERO, ONE, ZERO)
            case Var(name) if name == f"{self.loop}_idx":
                return _Linear((), 1, ZERO, ONE, ZERO)
            case Call(Op.ADD | Op.SUB as op, (a, b)):
                x, y = self.linear(a), self.linear(b)
                return None if x is None or y is None else x.plus(y, 1 if op is Op.ADD else -1)
            case Call(Op.NEG, (a,)):
                return self.scaled(a, -1)
            case Call(Op.MUL, (a, Const(int() as c))) | Call(Op.MUL, (Const(int() as c), a)):
                return self.scaled(a, c)
            case Call(Op.FLOORDIV, (a, b)) if _positive(b):
                return self.quotient(a, b)
            case _:
                return None

    def scaled(self, e: Expr, c: int) -> _Linear | None:
        x = self.linear(e)
        return None if x is None else x.times(c)

    def quotient(self, a: Expr, b: Expr) -> _Linear | None:
        """a // b: still never decreasing (or never increasing) along the tile, or a step function of the loop."""
        x = self.linear(a)
        if x is None:
            return None
        # Built anew from the form: a's own text may still name an index that cancelled.
        if not x.loop and not x.tile:
            return _Linear((), 0, simplify(x.rest // b), ONE, ZERO)
        if not x.loop and all(factor > 0 for _, factor in x.tile):
            return _Linear(((_along_tile(x) // b, 1),), 0, ZERO, ONE, ZERO)
        if not x.loop and all(factor < 0 for _, factor in x.tile):
            return _Linear(((-(_along_tile(x) // b), -1),), 0, ZERO, ONE, ZERO)
        if x.loop == 1 and not x.tile and x.unit is ONE:
            return _Linear((), 1, ZERO, b, x.rest)
        return None


def _along_tile(x: _Linear) -> Expr:
    """A form without the loop index as an expression."""
    total: Expr = ZERO
    for f, factor in x.tile:
        total = sum_of(total, f * factor)
    return simplify(sum_of(total, x.rest))


def _positive(e: Expr) -> bool:
    return e is GROUP or (isinstance(e, Const) and e.value > 0)


def _floor_divide(x: Expr, n: int) -> Expr:
    return x if n == 1 else x // n


def _meet(x: Interval, y: Interval) -> Interval:
    return Interval(_pick(Op.MAX, x.lo, y.lo), _pick(Op.MIN, x.hi, y.hi))


def _hull(x: Interval, y: Interval) -> Interval:
    lo = None if x.lo is None or y.lo is None else call(Op.MIN, x.lo, y.lo)
    hi = None if x.hi is None or y.hi is None else call(Op.MAX, x.hi, y.hi)
    return Interval(lo, hi)


def _leave_a_gap(x: Interval, y: Interval) -> bool:
    """Whether two intervals may lie apart: not where both are unbounded on one side, or one is all or nothing."""
    joined = (x.lo is None and y.lo is None) or (x.hi is None and y.hi is None)
    return not (joined or x.whole or y.whole or x == Interval() or y == Interval())


def _either_full(x: Interval | NoneKnown, y: Interval | NoneKnown) -> Interval | NoneKnown:
    """Part of the union: all of it where both start or both end without bound, else one of the two."""
    if isinstance(x, NoneKnown) or isinstance(y, NoneKnown):
        return y if isinstance(x, NoneKnown) else x
    x, y = _one_sided(x, y), _one_sided(y, x)
    if (x.lo is None and y.lo is None) or (x.hi is None and y.hi is None):
        return _hull(x, y)
    return x


def _one_sided(x: Interval, other: Interval) -> Interval:
    """A whole-or-empty interval written with the side on which the other one is bounded."""
    if not x.whole:
        return x
    return Interval(None, x.hi) if other.lo is None else Interval(x.lo, None)


def _pick(op: Op, a: Expr | None, b: Expr | None) -> Expr | None:
    if a is None or b is None:
        return b if a is None else a
    return a if a is b else call(op, a, b)

"""What a mask says about a whole tile: no pair visible, every pair visible, or neither known.

`plan_mask` bounds the loop for masks that are linear in both positions. This pass is for the others: it evaluates the
mask on intervals. A position lies between the ends of its tile; a value that varies along one axis only lies between
its smallest and its largest value there, which are reductions over the tile; a comparison of two intervals is True,
False or undecided. The answer is sound: `may_hold` is False for no tile with a visible pair, `must_hold` True for no
tile with a hidden one.

    pattern[q_idx // 64, kv_idx // 64]     one element of the table, where both tiles lie within one block of it
    document[q_idx] == document[kv_idx]
    may_hold   min_q document <= max_kv document & min_kv document <= max_q document      the intervals overlap
    must_hold  max_q document <= min_kv document & max_kv document <= min_q document      all four ends are equal
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

from attn_engine.ir.expr import Call, Const, Expr, Load, Reduce, Var, call, loads, postorder, where
from attn_engine.ir.ops import DType, Op
from attn_engine.ir.passes.bounds import conjuncts
from attn_engine.ir.passes.mask_range import plan_mask
from attn_engine.ir.passes.simplify import simplify

TRUE, FALSE = Const(True), Const(False)


@dataclass(frozen=True, slots=True)
class TileClass:
    """Two conditions on a pair of tiles, in "<axis>_start" and "<axis>_last" of both axes and in `Reduce` nodes.

    may_hold: False where no pair of the two tiles is visible. must_hold: True where every pair is. What the closed form
    of `plan_mask` already leaves out, may_hold need not tell.
    """

    may_hold: Expr
    must_hold: Expr

    @property
    def reductions(self) -> tuple[Reduce, ...]:
        """The extremes over one tile that the conditions read, each once."""
        nodes = postorder(self.may_hold, self.must_hold)
        return tuple(n for n in nodes if isinstance(n, Reduce))

    @property
    def tensors(self) -> tuple[str, ...]:
        """The captured tensors that the conditions read."""
        return tuple(dict.fromkeys(x.tensor for r in (self.may_hold, self.must_hold) for x in loads(r)))


def classify_tiles(mask: Expr | None, loop: str) -> TileClass | None:
    """The class of a tile met in a loop over `loop`; None where it would tell no more than `plan_mask` does."""
    if mask is None or _bounds_say_all(mask, loop):
        return None
    analysis = _Analysis(loop)
    mask = simplify(mask)
    must = analysis.truth(mask).must
    # What the loop's bounds already ensure is not asked of every tile.
    rest = [part for part in conjuncts(mask) if not _bounds_say_all(part, loop)]
    may = reduce(_and, (analysis.truth(part).may for part in rest), TRUE)
    if not analysis.informed or (may is TRUE and must is FALSE):
        return None
    return TileClass(may, must)


def _bounds_say_all(mask: Expr, loop: str) -> bool:
    """Whether the loop's bounds leave out every tile that intervals could leave out."""
    plan = plan_mask(mask, loop)
    return plan.decided and not plan.gaps


def tile_truth(mask: Expr) -> TileClass:
    """The class of a pair of tiles as far as intervals tell, linear bounds included: no part is left out."""
    truth = _Analysis("kv").truth(simplify(mask))
    return TileClass(truth.may, truth.must)


@dataclass(frozen=True, slots=True)
class _Truth:
    """may: False means that no pair holds; must: True means that all do."""

    may: Expr
    must: Expr


@dataclass(frozen=True, slots=True)
class _Interval:
    """lo <= value <= hi over a pair of tiles.

    attained: both ends are values at some pair, so that arithmetic on them overflows only where the mask's own does.
    """

    lo: Expr
    hi: Expr
    attained: bool = True


_UNDECIDED = _Truth(TRUE, FALSE)


class _Analysis:
    def __init__(self, loop: str) -> None:
        self.loop = loop
        self.informed = False  # whether anything is known that `plan_mask` does not know
        self._truths: dict[Expr, _Truth] = {}

    def truth(self, e: Expr) -> _Truth:
        """Three-valued: (False, False) never, (True, True) always, (True, False) undecided."""
        if e not in self._truths:
            self._truths[e] = self._truth(e)
        return self._truths[e]

    def _truth(self, e: Expr) -> _Truth:
        match e:
            case _ if not e.axes:
                return _Truth(e, e)
            case _ if _varies_in_data(e) and _is_exact(e):
                self.informed = True
                return _Truth(Reduce("max", e, e.axes[0]), Reduce("min", e, e.axes[0]))
            case Load() if e.dtype is DType.BOOL:
                return self.element(e)
            case Call(Op.NOT, (x,)):
                return _negated(self.truth(x))
            case Call(Op.AND, (a, b)):
                return _both(self.truth(a), self.truth(b))
            case Call(Op.OR, (a, b)):
                self.informed = self.informed or plan_mask(e, self.loop).gaps
                return _either(self.truth(a), self.truth(b))
            case Call(Op.WHERE, (c, a, b)):
                chosen, self.informed = self.truth(c), True
                return _either(_both(chosen, self.truth(a)), _both(_negated(chosen), self.truth(b)))
            case Call(Op.EQ | Op.NE as op, (a, b)) if a.dtype is b.dtype is DType.BOOL:
                x, y, self.informed = self.truth(a), self.truth(b), True
                same = _either(_both(x, y), _both(_negated(x), _negated(y)))
                return same if op is Op.EQ else _negated(same)
            case Call(Op.LE | Op.LT | Op.EQ | Op.NE):
                return self.comparison(e)
            case _:
                return _UNDECIDED

    def element(self, e: Load) -> _Truth:
        """A table of blocks says all about two tiles that lie in one block: they read one element of it."""
        indices = [self.interval(i) for i in e.indices]
        ends = [x for x in indices if x is not None and x.attained]
        if len(ends) < len(indices) or any(_least_span(i) for i in e.indices):
            return _UNDECIDED
        self.informed = True
        one = reduce(_and, (call(Op.EQ, x.lo, x.hi) for x in ends if x.lo is not x.hi), TRUE)
        read = Load(e.tensor, e.kind, tuple(x.lo for x in ends))
        return _Truth(_or(_not(one), read), _and(one, read))

    def comparison(self, e: Call) -> _Truth:
        x, y = (self.interval(a) for a in e.args)
        # A number of another kind is converted first, and the conversion may round.
        if x is None or y is None or e.args[0].dtype is not e.args[1].dtype:
            return _UNDECIDED
        self.informed = self.informed or not plan_mask(e, self.loop).decided
        match e.op:
            case Op.LE:
                return _Truth(_at_most(x.lo, y.hi), call(Op.LE, x.hi, y.lo))
            case Op.LT:
                return _Truth(_below(x.lo, y.hi), call(Op.LT, x.hi, y.lo))
            case _:
                overlap = _and(_at_most(x.lo, y.hi), _at_most(y.lo, x.hi))
                equal = _Truth(overlap, _and(call(Op.LE, x.hi, y.lo), call(Op.LE, y.hi, x.lo)))
                return equal if e.op is Op.EQ else _negated(equal)

    def interval(self, e: Expr) -> _Interval | None:
        """The values of a number over the tiles, or None."""
        if e.dtype is not DType.INT and not (e.dtype is DType.FLOAT and isinstance(e, Load)):
            return None  # float arithmetic rounds
        if not e.axes:
            return _Interval(e, e)
        if len(e.axes) == 1 and (found := self.along_one_axis(e)) is not None:
            return found
        match e:
            case Call(Op.ADD | Op.SUB | Op.MUL | Op.MIN | Op.MAX as op, (a, b)):
                x, y = self.interval(a), self.interval(b)
                apart = not set(a.axes) & set(b.axes)  # then each combination of ends occurs at some pair
                return None if x is None or y is None else _combined(op, x, y, apart)
            case Call(Op.NEG | Op.ABS as op, (a,)):
                x = self.interval(a)
                return None if x is None or not x.attained else _unary(op, x)
            case Call(Op.FLOORDIV, (a, Const(int() as n))) if n > 0 and (x := self.interval(a)):
                return _Interval(_divided(x.lo, n), _divided(x.hi, n), x.attained)
            case Call(Op.MOD, (a, Const(int() as n))) if n > 0:
                return self.remainder(a, n)
            case Call(Op.WHERE, (_, a, b)) if a.dtype is b.dtype:
                x, y = self.interval(a), self.interval(b)
                return None if x is None or y is None else _hull(x, y)
            case _:
                return None

    def remainder(self, a: Expr, n: int) -> _Interval:
        """a % n: anything below n, or a's own ends where a tile stays within one period."""
        x = None if _least_span(a) >= n else self.interval(a)
        if x is None:
            return _Interval(Const(0), Const(n - 1), attained=False)
        within = call(Op.EQ, _divided(x.lo, n), _divided(x.hi, n))
        ends = where(within, simplify(x.lo % n), 0), where(within, simplify(x.hi % n), n - 1)
        return _Interval(*ends, attained=False)

    def along_one_axis(self, e: Expr) -> _Interval | None:
        """Closed form where the value is linear in the position, else its extremes over the tile."""
        (axis,) = e.axes
        match e:
            case Call(Op.FLOORDIV, (a, Const(int() as n))) if n > 0 and (ends := _linear_ends(a)):
                return _Interval(_divided(ends[0], n), _divided(ends[1], n))
            case _ if ends := _linear_ends(e):
                return _Interval(*ends)
            case _ if _is_exact(e) and axis in ("q", "kv"):
                return _Interval(Reduce("min", e, axis), Reduce("max", e, axis))
            case _:
                return None


def _varies_in_data(e: Expr) -> bool:
    """Whether a value runs along one axis and reads a tensor there: its extremes over a tile say all about it."""
    return len(e.axes) == 1 and any(x.axes for x in loads(e))


def _is_exact(e: Expr) -> bool:
    """Whether every machine computes the same value: no float arithmetic, only loads of floats."""
    return all(n.dtype in (DType.INT, DType.BOOL) or not isinstance(n, Call) for n in postorder(e))


def _linear_ends(e: Expr) -> tuple[Expr, Expr] | None:
    """The lowest and highest value of factor * position + scalar over a tile."""
    if e.dtype is not DType.INT:
        return None
    if not e.axes:
        return e, e
    match e:
        case Var(name) if name == f"{e.axes[0]}_idx":
            return Var(f"{e.axes[0]}_start", DType.INT), Var(f"{e.axes[0]}_last", DType.INT)
        case Call(Op.ADD | Op.SUB as op, (a, b)) if not (a.axes and b.axes):
            x, y = _linear_ends(a), _linear_ends(b)
            if x is None or y is None:
                return None
            low, high = (0, 1) if op is Op.ADD else (1, 0)
            return simplify(call(op, x[0], y[low])), simplify(call(op, x[1], y[high]))
        case Call(Op.MUL, (a, Const(int() as c))) | Call(Op.MUL, (Const(int() as c), a)):
            x = _linear_ends(a)
            if x is None:
                return None
            low, high = (x[0], x[1]) if c >= 0 else (x[1], x[0])
            return simplify(low * c), simplify(high * c)
        case Call(Op.NEG, (a,)):
            x = _linear_ends(a)
            return None if x is None else (simplify(-x[1]), simplify(-x[0]))
        case _:
            return None


SHORTEST_TILE = 16


def _least_span(e: Expr) -> int:
    """By how much a value differs within two tiles of SHORTEST_TILE positions at least; 0 where that is not known."""
    match e:
        case Var() if e.axes:
            return SHORTEST_TILE - 1
        case Call(Op.ADD | Op.SUB, (a, b)) if not set(a.axes) & set(b.axes):
            return _least_span(a) + _least_span(b)
        case Call(Op.NEG, (a,)):
            return _least_span(a)
        case Call(Op.MUL, (a, Const(int() as c))) | Call(Op.MUL, (Const(int() as c), a)):
            return _least_span(a) * abs(c)
        case Call(Op.FLOORDIV, (a, Const(int() as n))) if n > 0:
            return _least_span(a) // n
        case _:
            return 0


def _divided(x: Expr, n: int) -> Expr:
    return simplify(x // n)


def _combined(op: Op, x: _Interval, y: _Interval, apart: bool) -> _Interval | None:
    attained = x.attained and y.attained and apart
    if op in (Op.MIN, Op.MAX):
        return _Interval(simplify(call(op, x.lo, y.lo)), simplify(call(op, x.hi, y.hi)), attained)
    if not attained:
        return None
    match op:
        case Op.ADD:
            return _Interval(simplify(x.lo + y.lo), simplify(x.hi + y.hi))
        case Op.SUB:
            return _Interval(simplify(x.lo - y.hi), simplify(x.hi - y.lo))
        case _:
            corners = [
                simplify(a * b) for a in dict.fromkeys((x.lo, x.hi)) for b in dict.fromkeys((y.lo, y.hi))
            ]
            return _Interval(_extreme(Op.MIN, *corners), _extreme(Op.MAX, *corners))


def _unary(op: Op, x: _Interval) -> _Interval:
    low, high = simplify(-x.hi), simplify(-x.lo)
    if op is Op.NEG:
        return _Interval(low, high)
    return _Interval(_extreme(Op.MAX, x.lo, low, Const(0)), _extreme(Op.MAX, high, x.hi))


def _hull(x: _Interval, y: _Interval) -> _Interval:
    return _Interval(_extreme(Op.MIN, x.lo, y.lo), _extreme(Op.MAX, x.hi, y.hi), attained=False)


def _extreme(op: Op, *values: Expr) -> Expr:
    return simplify(reduce(lambda a, b: call(op, a, b), values))


def _at_most(a: Expr, b: Expr) -> Expr:
    """a <= b, or an end is NaN: a tile with a NaN in it is never left out."""
    return call(Op.LE, a, b) if DType.FLOAT not in (a.dtype, b.dtype) else ~call(Op.LT, b, a)


def _below(a: Expr, b: Expr) -> Expr:
    return call(Op.LT, a, b) if DType.FLOAT not in (a.dtype, b.dtype) else ~call(Op.LE, b, a)


def _negated(x: _Truth) -> _Truth:
    return _Truth(_not(x.must), _not(x.may))


def _both(x: _Truth, y: _Truth) -> _Truth:
    return _Truth(_and(x.may, y.may), _and(x.must, y.must))


def _either(x: _Truth, y: _Truth) -> _Truth:
    return _Truth(_or(x.may, y.may), _or(x.must, y.must))


def _not(a: Expr) -> Expr:
    """~a; an integer comparison is turned round instead, to be read more easily."""
    match a:
        case Const(bool() as value):
            return Const(not value)
        case Call(Op.NOT, (x,)):
            return x
        case Call(Op.LE, (x, y)) if DType.FLOAT not in (x.dtype, y.dtype):
            return call(Op.LT, y, x)
        case Call(Op.LT, (x, y)) if DType.FLOAT not in (x.dtype, y.dtype):
            return call(Op.LE, y, x)
        case Call(Op.AND, (x, y)):
            return _or(_not(x), _not(y))
        case Call(Op.OR, (x, y)):
            return _and(_not(x), _not(y))
        case _:
            return ~a


def _and(a: Expr, b: Expr) -> Expr:
    if a is FALSE or b is FALSE:
        return FALSE
    return b if a is TRUE or a is b else a if b is TRUE else a & b


def _or(a: Expr, b: Expr) -> Expr:
    if a is TRUE or b is TRUE:
        return TRUE
    return b if a is FALSE or a is b else a if b is FALSE else a | b

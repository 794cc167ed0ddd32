"""Ranges of integer expressions over the positions of a call.

`index_bounds` is exact for what is linear in the positions, `integer_bounds` is interval arithmetic for the rest, and
`proved_inside` uses what the mask demands of every visible pair.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from attn_engine.ir.expr import Call, Const, Expr, Load, Var, postorder
from attn_engine.ir.ops import DType, Number, Op

Bounds = tuple[int, int]
INT_LIMITS = (-(2**31), 2**31 - 1)
_POSITIONS = {"batch": "batches", "head": "heads", "q_idx": "q_len", "kv_idx": "kv_len"}


def index_bounds(index: Expr, sizes: Mapping[str, int], scalars: Mapping[str, Number]) -> Bounds | None:
    """(lowest, highest) value over all positions; None where it is not linear in them. lowest > highest: no position.

    >>> from attn_engine.ir.program import KV_IDX, Q_IDX
    >>> index_bounds(Q_IDX - KV_IDX + 3, {"q_len": 4, "kv_len": 4}, {})
    (0, 6)
    """
    form = _linear(index, scalars)
    if form is None or not all(_POSITIONS[name] in sizes for name in form[1]):
        return None
    constant, coefficients = form
    low = high = constant
    for name, factor in coefficients.items():
        last = sizes[_POSITIONS[name]] - 1
        if last < 0:
            return (0, -1)
        low, high = low + min(0, factor * last), high + max(0, factor * last)
    return low, high


def _linear(e: Expr, scalars: Mapping[str, Number]) -> tuple[int, dict[str, int]] | None:
    match e:
        case Const(int() as value) if e.dtype is DType.INT:
            return int(value), {}
        case Var(name) if name in _POSITIONS:
            return 0, {name: 1}
        case Var(name) if isinstance(scalars.get(name), int):
            return int(scalars[name]), {}
        case Call(Op.ADD | Op.SUB as op, (a, b)):
            x, y = _linear(a, scalars), _linear(b, scalars)
            return None if x is None or y is None else _plus(x, y, 1 if op is Op.ADD else -1)
        case Call(Op.NEG, (a,)):
            x = _linear(a, scalars)
            return None if x is None else _plus((0, {}), x, -1)
        case Call(Op.MUL, (a, b)):
            x, y = _linear(a, scalars), _linear(b, scalars)
            if x is None or y is None or (x[1] and y[1]):
                return None
            x, y = (x, y) if not y[1] else (y, x)
            return _plus((0, {}), x, y[0])
        case _:
            return None


def _plus(
    x: tuple[int, dict[str, int]], y: tuple[int, dict[str, int]], factor: int
) -> tuple[int, dict[str, int]]:
    """x + factor * y."""
    coefficients = dict(x[1])
    for name, c in y[1].items():
        coefficients[name] = coefficients.get(name, 0) + factor * c
    return x[0] + factor * y[0], {n: c for n, c in coefficients.items() if c}


Contents = Callable[[str], Bounds | None]
"""The smallest and largest element of a captured integer tensor; None where it is not known."""


def integer_bounds(
    root: Expr, sizes: Mapping[str, int], scalars: Mapping[str, Number], contents: Contents
) -> dict[Expr, Bounds | None]:
    """An interval that holds every value of each integer or boolean node below `root`; None where none is known.

    Linear nodes get their exact range; the others what their operands' intervals give.
    """
    found: dict[Expr, Bounds | None] = {}
    for node in postorder(root):
        if node.dtype is DType.BOOL:
            found[node] = (0, 1)
        elif node.dtype is DType.INT:
            exact = index_bounds(node, sizes, scalars)
            found[node] = exact if exact is not None else _interval(node, found, contents)
        else:
            found[node] = None
    return found


def _interval(node: Expr, known: Mapping[Expr, Bounds | None], contents: Contents) -> Bounds | None:
    match node:
        case Load(tensor):
            return contents(tensor)
        case Call(Op.WHERE, (_, a, b)):
            x, y = known[a], known[b]
            return None if x is None or y is None else (min(x[0], y[0]), max(x[1], y[1]))
        case Call(Op.NEG | Op.ABS as op, (a,)):
            return _unary(op, known[a])
        case Call(Op.MAX | Op.MIN as op, (a, b)):
            return _extremum(op, known[a], known[b])
        case Call(op, (a, b)):
            return _binary(op, known[a], known[b])
        case _:
            return None


def _unary(op: Op, x: Bounds | None) -> Bounds | None:
    if x is None:
        return None
    if op is Op.NEG:
        return -x[1], -x[0]
    return (0 if x[0] <= 0 <= x[1] else min(map(abs, x))), max(map(abs, x))


def _extremum(op: Op, x: Bounds | None, y: Bounds | None) -> Bounds | None:
    """One known side bounds the result on that side; the other side is then any 32-bit integer."""
    a, b = x or INT_LIMITS, y or INT_LIMITS
    if x is None and y is None:
        return None
    choose = max if op is Op.MAX else min
    return choose(a[0], b[0]), choose(a[1], b[1])


def _binary(op: Op, x: Bounds | None, y: Bounds | None) -> Bounds | None:
    if op is Op.MOD and y is not None and y[0] == y[1] > 0:
        return (0, y[0] - 1) if x is None or x[0] < 0 or x[1] >= y[0] else x
    if x is None or y is None:
        return None
    if op is Op.ADD:
        return x[0] + y[0], x[1] + y[1]
    if op is Op.SUB:
        return x[0] - y[1], x[1] - y[0]
    if op is Op.MUL:
        corners = [a * b for a in x for b in y]
        return min(corners), max(corners)
    if op is Op.FLOORDIV and (y[0] > 0 or y[1] < 0):
        corners = [a // b for a in x for b in y]
        return min(corners), max(corners)
    return None


def proved_inside(
    index: Expr, size: int, demands: tuple[Expr, ...], sizes: Mapping[str, int], scalars: Mapping[str, Number]
) -> bool:
    """Whether 0 <= index < size follows from one linear demand of the mask on every visible pair, per side."""
    amounts = [d for demand in demands if (d := _at_least_zero(demand)) is not None]
    lows = [index, *(index - amount for amount in amounts)]
    highs = [size - 1 - index, *(size - 1 - index - amount for amount in amounts)]

    def never_negative(e: Expr) -> bool:
        bounds = index_bounds(e, sizes, scalars)
        return bounds is not None and (bounds[0] >= 0 or bounds[0] > bounds[1])

    return any(map(never_negative, lows)) and any(map(never_negative, highs))


def _at_least_zero(demand: Expr) -> Expr | None:
    """What is >= 0 where an integer comparison holds."""
    match demand:
        case Call(Op.LE, (a, b)) if a.dtype is DType.INT is b.dtype:
            return b - a
        case Call(Op.LT, (a, b)) if a.dtype is DType.INT is b.dtype:
            return b - a - 1
        case _:
            return None


def conjuncts(mask: Expr | None) -> tuple[Expr, ...]:
    """The parts of a mask that all hold where it holds."""
    match mask:
        case None:
            return ()
        case Call(Op.AND, (a, b)):
            return conjuncts(a) + conjuncts(b)
        case _:
            return (mask,)

"""Operators on bits: those of bools are logical; on ints only shifts by a fixed number have a meaning in kernels."""

from __future__ import annotations

from collections.abc import Callable

from attn_engine.errors import WrongOperands
from attn_engine.frontend.operations import apply, floor_divide, kind, multiply
from attn_engine.ir.expr import Const, Expr
from attn_engine.ir.ops import DType, Op


def bitwise(op: Op, symbol: str) -> Callable[..., Expr]:
    """`&`, `|`, `~`, `^` on bools; on ints they would be bit patterns, which kernels do not have."""

    def build(*args: Expr) -> Expr:
        if any(a.dtype is not DType.BOOL for a in args):
            got = ", ".join(kind(a) for a in args)
            advice = _advice(symbol, args)
            raise WrongOperands(operation=f"`{symbol}`", expected="bools", got=got, instead=advice)
        return apply(op, *args)

    return build


def _advice(symbol: str, args: tuple[Expr, ...]) -> str:
    last = args[-1]
    ints = all(a.dtype is DType.INT for a in args)
    if symbol == "&" and ints and isinstance(last, Const) and last.value > 0:
        following = int(last.value) + 1
        if following & (following - 1) == 0:
            return f"The low bits of an int are a remainder: `% {following}` for `& {last.value}`."
        return "Take bits of an int by division: `x // 4 % 2` is bit 2."
    if symbol == "~":
        return "Invert a condition: `~(a < b)`, with brackets."
    if symbol == "^" and ints and isinstance(last, Const):
        return "`^` is exclusive or; a power is `**`."
    return f"`{symbol}` binds tighter than a comparison: write `(a < b) {symbol} (c < d)` with brackets."


def shift_left(x: Expr, bits: Expr) -> Expr:
    return multiply(x, _power_of_two(x, bits, "<<", "*"))


def shift_right(x: Expr, bits: Expr) -> Expr:
    return floor_divide(x, _power_of_two(x, bits, ">>", "//"))


def _power_of_two(x: Expr, bits: Expr, symbol: str, instead: str) -> Const:
    fixed = isinstance(bits, Const) and bits.dtype is DType.INT and 0 <= bits.value < 31
    if not (isinstance(bits, Const) and fixed) or x.dtype is not DType.INT:
        raise WrongOperands(
            operation=f"`{symbol}`",
            expected="an int and a fixed number of bits, 0 to 30",
            got=f"{kind(x)} and {bits.value if isinstance(bits, Const) else kind(bits)}",
            instead=f"Write `x {instead} 2**n` as arithmetic.",
        )
    return Const(2 ** int(bits.value))

"""The shared half of every renderer: spell expressions, insert broadcasts and parentheses, indent statements."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

from attn_engine.ir.expr import Call, Cast, Const, Dot, Expr, FirstColumns, Full, Load, Reduce, Var
from attn_engine.ir.ops import Number, Op
from attn_engine.ir.printer import INFIX, PREFIX
from attn_engine.ir.tile import Accumulate, Choose, If, Kernel, Let, Loop, Narrow, Section, Stmt, StoreTile

UNARY = 7
ATOM = 9


def ordered(axes: tuple[str, ...], order: tuple[str, ...]) -> tuple[str, ...]:
    """A tile's axes in a kernel's order of dimensions."""
    return tuple(axis for axis in order if axis in axes)


def oriented(product: Dot, order: tuple[str, ...]) -> tuple[Expr, Expr, bool, bool]:
    """(left, right, transpose left?, transpose right?) so that left @ right has its dimensions in `order`."""
    shared = product.contracted
    first = ordered(product.axes, order)[0]
    left, right = (product.a, product.b) if first in product.a.axes else (product.b, product.a)
    return left, right, ordered(left.axes, order)[-1] != shared, ordered(right.axes, order)[0] != shared


class Renderer:
    """Spells a kernel as source. A backend overrides the spellings that differ from Python's."""

    functions: ClassVar[Mapping[Op, str]] = {}
    infix: ClassVar[Mapping[Op, tuple[str, int]]] = INFIX
    prefix: ClassVar[Mapping[Op, str]] = PREFIX
    comment: ClassVar[str] = "#"
    indent: ClassVar[str] = "    "
    kernel: Kernel

    def render(self, kernel: Kernel) -> str:
        """The kernel's source text."""
        self.kernel = kernel
        return "\n".join([*self.prologue(), *self.block(kernel.body, depth=1), *self.epilogue()]) + "\n"

    # -- what a backend spells

    def prologue(self) -> list[str]:
        raise NotImplementedError

    def epilogue(self) -> list[str]:
        return []

    def loop(self, s: Loop) -> list[str]:
        """The lines that open a loop, not its body."""
        raise NotImplementedError

    def store(self, s: StoreTile) -> list[str]:
        raise NotImplementedError

    def accumulate(self, s: Accumulate) -> list[str]:
        raise NotImplementedError

    def narrow(self, s: Narrow) -> list[str]:
        raise NotImplementedError

    def choice(self, s: Choose) -> list[str]:
        raise AssertionError("selections are refused before this backend is asked")

    def full(self, e: Full) -> str:
        raise NotImplementedError

    def load(self, e: Load, axes: tuple[str, ...]) -> str:
        """A tile or an element, broadcast to `axes`."""
        raise NotImplementedError

    def dot(self, left: str, right: str) -> str:
        raise NotImplementedError

    def cast(self, x: str, like: str) -> str:
        raise NotImplementedError

    def reduce(self, kind: str, x: str, axis: int) -> str:
        raise NotImplementedError

    def function(self, op: Op, args: list[str]) -> str:
        return f"{self.functions[op]}({', '.join(args)})"

    def number(self, value: Number) -> str:
        return f'float("{value}")' if isinstance(value, float) and not math.isfinite(value) else repr(value)

    # -- statements

    def block(self, body: tuple[Stmt, ...], depth: int) -> list[str]:
        pad = self.indent * depth
        lines: list[str] = []
        for s in body:
            lines += [f"{pad}{line}".rstrip() for line in self.statement(s)]
            if isinstance(s, Loop | If):
                lines += self.block(s.body, depth if self.is_flat(s) else depth + 1)
        return lines

    def is_flat(self, s: Loop | If) -> bool:
        """Whether the body stands beside the statement instead of inside it."""
        return False

    def statement(self, s: Stmt) -> list[str]:
        """The lines of a statement without those of its body."""
        match s:
            case Section(title):
                return ["", f"{self.comment} -- {title}"]
            case Let(_, _, source):
                return [f"{self.comment} {source}", *self.let(s)] if source else self.let(s)
            case Loop():
                return self.loop(s)
            case If(condition):
                return [f"if {self.expr(condition)}:"]
            case StoreTile():
                return self.store(s)
            case Accumulate():
                return self.accumulate(s)
            case Narrow():
                return self.narrow(s)
            case Choose():
                return self.choice(s)

    def let(self, s: Let) -> list[str]:
        return [f"{s.name} = {self.expr(s.value)}"]

    # -- expressions

    def span(self, e: Expr) -> tuple[str, ...]:
        """The axes of e in this kernel's order of dimensions."""
        return ordered(e.axes, self.kernel.order)

    def expr(self, e: Expr, axes: tuple[str, ...] | None = None, parent: int = 0) -> str:
        """Source for e, broadcast to span `axes` and parenthesized inside precedence `parent`."""
        axes = self.span(e) if axes is None else axes
        match e:
            case Call():
                return self.call(e, axes, parent)
            case Const(value):
                text = self.number(value)
                return f"({text})" if text.startswith("-") and parent > UNARY else text
            case Var(name):
                return name + self.broadcast(self.span(e), axes)
            case Full():
                return self.full(e)
            case Load():
                return self.load(e, axes)
            case Cast(x, like):
                return self.cast(self.expr(x, None, ATOM), like)
            case FirstColumns(x):  # all of a piece: where heads are cut, a value is a piece of its key
                return self.expr(x, None, parent)
            case Reduce(kind, x, axis):
                text = self.reduce(kind, self.expr(x), self.span(x).index(axis))
                return text + self.broadcast(self.span(e), axes)
            case Dot():
                return self.product(e)
            case _:
                raise AssertionError(f"no spelling for {type(e).__name__}")

    def call(self, e: Call, axes: tuple[str, ...], parent: int) -> str:
        if e.op in self.infix:
            symbol, level = self.infix[e.op]
            a, b = e.args
            strict = level if symbol in ("<=", "<", "==", "!=") else level - 1  # comparisons do not chain
            text = f"{self.expr(a, axes, strict + 1)} {symbol} {self.expr(b, axes, level + 1)}"
            return f"({text})" if level < parent else text
        if e.op in self.prefix:
            text = self.prefix[e.op] + self.expr(e.args[0], axes, ATOM)
            return f"({text})" if parent > UNARY else text
        return self.function(e.op, [self.expr(a, axes) for a in e.args])

    def product(self, e: Dot) -> str:
        left, right, turn_left, turn_right = oriented(e, self.kernel.order)
        return self.dot(
            self.expr(left, None, ATOM if turn_left else 0) + ".T" * turn_left,
            self.expr(right, None, ATOM if turn_right else 0) + ".T" * turn_right,
        )

    @staticmethod
    def broadcast(have: tuple[str, ...], want: tuple[str, ...]) -> str:
        """The subscript that gives a tile over `have` the dimensions of `want`."""
        if not have or have == want:
            return ""
        return "[" + ", ".join(":" if axis in have else "None" for axis in want) + "]"

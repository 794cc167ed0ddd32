"""Turn expressions into Lets under the user's own names.

An `Emitter` remembers what is already computed, so several results over one function (a score and its derivative) share
their common part: interning makes the shared nodes identical, and each is emitted once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from attn_engine.ir.expr import Call, Cast, Expr, Reduce, Var, postorder, rebuild
from attn_engine.ir.ops import Op
from attn_engine.ir.passes.simplify import simplify
from attn_engine.ir.tile import Let, Stmt

LOG2_E = 1.4426950408889634
Adjust = Callable[[Expr], Expr]


class Names:
    """Hands out each name once; a second user of a name gets `name_2`."""

    def __init__(self, taken: frozenset[str] | set[str] = frozenset()) -> None:
        self._taken = set(taken)

    def fresh(self, wanted: str) -> str:
        name, n = wanted, 2
        while name in self._taken:
            name, n = f"{wanted}_{n}", n + 1
        self._taken.add(name)
        return name

    def copy(self) -> Names:
        return Names(self._taken)

    def without(self, names: set[str]) -> Names:
        """A copy that may hand out these names again."""
        return Names(self._taken - names)


class Emitter:
    """Collects the Lets of one straight-line block."""

    def __init__(
        self, names: Names, known: Mapping[Expr, Expr] | None = None, adjust: Adjust | None = None
    ) -> None:
        self.names = names
        self.lets: list[Stmt] = []
        self._done: dict[Expr, Expr] = dict(known or {})
        self._adjust: Adjust = adjust or (lambda e: e)

    def bind(self, node: Expr, value: Expr) -> None:
        """From now on `node` is read as `value`."""
        self._done[node] = value

    def let(self, name: str, value: Expr, source: str = "") -> Var:
        let = Let(name, simplify(value), source)
        self.lets.append(let)
        return let.var

    def value(self, root: Expr, names: Mapping[Expr, str], sources: Mapping[Expr, str]) -> Expr:
        """The expression for `root`; nodes that the user named become Lets first."""
        for node in postorder(root):
            if node in self._done:
                continue
            new = self._adjust(rebuild(node, tuple(self._done[o] for o in node.operands)))
            if node in names and node is not root and isinstance(new, Call):
                new = self.let(self.names.fresh(names[node]), new, sources.get(node, ""))
            self._done[node] = new
        return self._done[root]

    def define(
        self,
        name: str,
        root: Expr,
        names: Mapping[Expr, str] | None = None,
        sources: Mapping[Expr, str] | None = None,
    ) -> Var:
        """`root` as a Let, of this name or one like it; the variable that holds it where there is one already."""
        names, sources = names or {}, sources or {}
        value = self.value(root, names, sources)
        if isinstance(value, Var):
            return value
        var = self.let(self.names.fresh(name), value, sources.get(root, ""))
        self._done[root] = var
        return var


def base_two(e: Expr) -> Expr:
    """exp(x) -> exp2(x * log2(e)): the hardware computes powers of two.

    The factor stays outside a difference: exp2(a * c - b * c) would save an operation, but the rounding of b * c is
    amplified without bound when a and b are large and nearly equal.
    """
    match e:
        case Call(Op.EXP, (x,)):
            return Call(Op.EXP2, (x * LOG2_E,))
        case _:
            return e


def factor_outside(e: Expr) -> Expr:
    """max(x * c) -> max(x) * c for a positive factor of all pairs: of a normaliser in powers of two."""
    match e:
        case Reduce("max" | "min" as kind, Call(Op.MUL, (x, factor)), axis) if not factor.axes:
            return Reduce(kind, x, axis) * factor
        case _:
            return e


def rounded(x: Expr, tensor: str) -> Expr:
    """x in the element type of `tensor`, as a product of tiles reads it."""
    return Cast(x, tensor)

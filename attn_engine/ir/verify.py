"""Structural rules of tile kernels: run on every lowering in the tests, and before a kernel is trusted."""

from __future__ import annotations

from functools import partial

from attn_engine.ir.expr import AXES, COLUMNS, Cast, Const, Dot, Expr, Load, Reduce, Var, postorder
from attn_engine.ir.ops import DType
from attn_engine.ir.tile import (
    Accumulate,
    Choice,
    Choose,
    If,
    Kernel,
    Let,
    Loop,
    Narrow,
    Section,
    Stmt,
    StoreTile,
)

SIZES = ("batches", "heads", "kv_heads", "q_len", "kv_len")
_TILED = ("q", "kv")


class VerificationError(AssertionError):
    """A kernel breaks a rule of the tile language: a mistake of this package, not of its user."""


def verify_kernel(kernel: Kernel) -> None:
    """Raise VerificationError unless names are set before they are read, with the kind and axes that they are read
    with; arguments keep their values; tensors are parameters and indexed by integers of their rank; only outputs are
    written; loop bounds and conditions are scalar; and tile axes have a size."""
    _Verifier(kernel).run()


class _Verifier:
    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.params = {p.name: p for p in kernel.params}
        self.tile = dict(kernel.tile)
        self.known: dict[str, Var] = {v.name: v for v in kernel.scalars}
        self.given = {*self.known, *self.params, *kernel.grid}  # what a statement may not set

    def run(self) -> None:
        kernel = self.kernel
        self.require(len(self.params) == len(kernel.params), "a parameter appears twice")
        for size in (*SIZES, *(name for p in kernel.params for name in p.shape)):
            self.define(Var(size, DType.INT))
        for axis in kernel.grid:
            self.place(axis) if axis in _TILED else self.define(Var(axis, DType.INT))
        for axis in COLUMNS:
            if axis in self.tile:
                self.define(Var(f"{axis}_idx", DType.INT, (axis,)))
        self.block(kernel.body)

    def require(self, legal: bool, message: str) -> None:
        if not legal:
            raise VerificationError(f"kernel {self.kernel.name}: {message}")

    def define(self, var: Var) -> None:
        self.known[var.name] = var

    def place(self, axis: str) -> None:
        """A tile of `axis` is in sight: its start and its positions are names."""
        self.require(axis in self.tile, f"axis {axis!r} has no tile size")
        self.define(Var(f"{axis}_start", DType.INT))
        self.define(Var(f"{axis}_idx", DType.INT, (axis,)))

    def block(self, body: tuple[Stmt, ...]) -> None:
        for s in body:
            self.statement(s)

    def statement(self, s: Stmt) -> None:
        match s:
            case Section():
                pass
            case Let():
                self.expression(s.value)
                self.assign(s)
            case Loop(var, lo, hi, axis, body):
                self.scalar(lo, DType.INT, f"lower bound of the loop over {var}")
                self.scalar(hi, DType.INT, f"upper bound of the loop over {var}")
                self.require(axis is None or var == f"{axis}_start", f"the loop over {axis!r} runs {var!r}")
                self.scoped(body, Var(var, DType.INT), axis)
            case If(condition, body):
                self.scalar(condition, DType.BOOL, "condition")
                self.scoped(body, None, None)
            case Narrow(tensor, axis, first, length, page, places):
                whole_tile = page is None or not page.axes
                check = self.scalar if whole_tile else partial(self.integers, axis=axis)
                check(first, DType.INT, f"first row of {tensor!r}")
                self.scalar(length, DType.INT, f"number of rows of {tensor!r}")
                if page is not None:
                    check(page, DType.INT, f"page of {tensor!r}")
                shape = self.params[tensor].shape if tensor in self.params else ()
                self.require(f"{axis}_len" in shape, f"{tensor!r} has no rows along {axis!r}")
                self.require(places is None or places in self.params, f"{places!r} is no argument")
            case Choose():
                self.choose(s)
            case StoreTile(tensor, indices, value) | Accumulate(tensor, indices, value):
                self.expression(value)
                self.access(tensor, indices)
                self.require(self.params[tensor].output, f"{tensor!r} is written, but is not an output")
                if isinstance(s, StoreTile):
                    extra = set(value.axes) - {a for i in indices for a in i.axes}
                    self.require(
                        not extra, f"the value stored to {tensor!r} has axes {sorted(extra)} that it lacks"
                    )

    def choose(self, s: Choose) -> None:
        wide = s.choice in (Choice.OFFER, Choice.FORCE)
        settles = s.choice is Choice.SETTLE
        kind = {Choice.OFFER: "number", Choice.FORCE: "bool"}.get(s.choice, "int")
        self.expression(s.value)
        self.require(s.value.axes == (("kv",) if wide else ()), f"{s.choice.value} spans axes {s.value.axes}")
        self.require(_kind(s.value) == kind, f"{s.choice.value} takes a {kind}, not a {_kind(s.value)}")
        for tensor, indices, missing in ((s.states, s.row, 1 + settles), (s.result, s.place, 1))[
            : 1 + settles
        ]:
            self.access(tensor, (*indices, *[Const(0)] * missing))
            self.require(self.params[tensor].output, f"{tensor!r} is written, but is not an output")

    def assign(self, s: Let) -> None:
        self.require(s.name not in self.given, f"{s.name!r} is an argument, and is set")
        before = self.known.get(s.name)
        if before is not None:
            # ELEMENT and FLOAT may replace each other: both are numbers of the same arithmetic.
            same = before.axes == s.value.axes and _kind(before) == _kind(s.value)
            self.require(same, f"{s.name!r} changes from {_typed(before)} to {_typed(s.value)}")
        self.define(s.var)

    def scoped(self, body: tuple[Stmt, ...], counter: Var | None, axis: str | None) -> None:
        """Check an inner body; names first set there end with it."""
        outer = dict(self.known)
        if axis is not None:
            self.require(axis in AXES, f"unknown axis {axis!r}")
            self.place(axis)
        if counter is not None:
            self.define(counter)
        self.block(body)
        self.known = outer

    def scalar(self, e: Expr, kind: DType, what: str) -> None:
        self.expression(e)
        self.require(not e.axes, f"the {what} spans axes {e.axes}")
        self.require(e.dtype is kind, f"the {what} is {e.dtype.value}, not {kind.value}")

    def integers(self, e: Expr, kind: DType, what: str, axis: str) -> None:
        """One for every position of a tile of the axis."""
        self.expression(e)
        self.require(e.axes == (axis,), f"the {what} spans axes {e.axes}")
        self.require(e.dtype is kind, f"the {what} is {e.dtype.value}, not {kind.value}")

    def expression(self, root: Expr) -> None:
        for node in postorder(root):
            self.node(node)

    def node(self, node: Expr) -> None:
        missing = [axis for axis in node.axes if axis not in self.tile]
        self.require(not missing, f"axes {missing} have no tile size")
        match node:
            case Var(name):
                self.require(name in self.known, f"{name!r} is read before it is set")
                known = self.known[name]
                same = known.axes == node.axes and _kind(known) == _kind(node)
                self.require(same, f"{name!r} is {_typed(known)}, but is read as {_typed(node)}")
            case Load(tensor, _, indices):
                self.access(tensor, indices)
            case Reduce(kind, x, axis):
                self.require(kind in ("max", "min", "sum"), f"unknown reduction {kind!r}")
                self.require(axis in x.axes, f"a reduction over {axis!r} of a value over {x.axes}")
            case Dot(a, b):
                numbers = _kind(a) == _kind(b) == "number"
                self.require(numbers, f"a Dot of {_typed(a)} and {_typed(b)}")
            case Cast(_, like):
                self.require(like in self.params, f"a value is rounded like {like!r}, which is no parameter")
            case _:
                pass

    def access(self, tensor: str, indices: tuple[Expr, ...]) -> None:
        self.require(tensor in self.params, f"{tensor!r} is no parameter")
        rank = len(self.params[tensor].shape)
        self.require(len(indices) == rank, f"{tensor!r} has {rank} dimensions, not {len(indices)}")
        for index in indices:
            self.expression(index)
            self.require(index.dtype is DType.INT, f"{tensor!r} is indexed by a {index.dtype.value}")


def _kind(e: Expr) -> str:
    return {DType.BOOL: "bool", DType.INT: "int"}.get(e.dtype, "number")


def _typed(e: Expr) -> str:
    return f"{e.dtype.value} over ({', '.join(e.axes)})"

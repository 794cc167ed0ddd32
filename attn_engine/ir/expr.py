"""Expressions: scalar mathematics over variables that may span tile axes.

    expr = Const(value) | Var(name, dtype, axes) | Load(tensor, dtype, indices) | Call(op, args)
         | Full(value, axes) | Dot(a, b) | Reduce(kind, x, axis) | Cast(x, like) | FirstColumns(x, axis)

Nodes are immutable and interned: building the same node twice returns the same object, so `is` is structural
equality, hashing is O(1) and common subexpressions are shared for free. Names and source lines belong to the
trace that built a node (`ScalarFn`) or to the `Let` that stores it, never to the node.

Axes are a set ("q", "kv", "d", "dv"): a value over ("q", "kv") is a tile of them. Broadcasting is implied. Head
dimensions that are cut into pieces span "d", "d2", ... and "dv", "dv2", ...
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakValueDictionary

from attn_engine.ir.ops import INFO, DType, Number, Op, result_dtype

MOST_PIECES = 8  # of the columns of a tile
AXES = ("q", "kv", *(f"{a}{i if i > 1 else ''}" for a in ("d", "dv") for i in range(1, MOST_PIECES + 1)))
COLUMNS = AXES[2:]


class _Interned(type):
    """Metaclass that returns the live equal node instead of building a second one."""

    _live: ClassVar[WeakValueDictionary[tuple[Any, ...], Any]] = WeakValueDictionary()

    if not TYPE_CHECKING:  # pyright checks __init__ signatures as usual

        def __call__(cls, *args, **kwargs):
            node = super().__call__(*args, **kwargs)
            key = (cls, *(_key_of(getattr(node, f.name)) for f in fields(node) if f.init))
            return cls._live.setdefault(key, node)


def _key_of(value: Any) -> Any:
    # The type keeps 1, 1.0 and True apart, and repr keeps 0.0 and -0.0 apart: Python calls them equal.
    return (type(value), repr(value)) if isinstance(value, float) else (type(value), value)


class _Referenced:
    """Gives slotted nodes the slot that the table of live nodes needs."""

    __slots__ = ("__weakref__",)


@dataclass(frozen=True, slots=True, eq=False)
class Expr(_Referenced, metaclass=_Interned):
    """Base of every node. `dtype` and `axes` are computed once, when the node is built."""

    dtype: DType = field(init=False, repr=False)
    axes: tuple[str, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        dtype, axes = self._type()
        object.__setattr__(self, "dtype", dtype)
        object.__setattr__(self, "axes", axes)

    def _type(self) -> tuple[DType, tuple[str, ...]]:
        raise NotImplementedError

    @property
    def operands(self) -> tuple[Expr, ...]:
        return ()

    def with_operands(self, operands: tuple[Expr, ...]) -> Expr:
        """The same node over new operands."""
        raise AssertionError(f"{self} has no operands")

    def __add__(self, other: Operand) -> Expr:
        return call(Op.ADD, self, other)

    def __radd__(self, other: Operand) -> Expr:
        return call(Op.ADD, other, self)

    def __sub__(self, other: Operand) -> Expr:
        return call(Op.SUB, self, other)

    def __rsub__(self, other: Operand) -> Expr:
        return call(Op.SUB, other, self)

    def __mul__(self, other: Operand) -> Expr:
        return call(Op.MUL, self, other)

    def __rmul__(self, other: Operand) -> Expr:
        return call(Op.MUL, other, self)

    def __truediv__(self, other: Operand) -> Expr:
        return call(Op.DIV, self, other)

    def __rtruediv__(self, other: Operand) -> Expr:
        return call(Op.DIV, other, self)

    def __floordiv__(self, other: Operand) -> Expr:
        return call(Op.FLOORDIV, self, other)

    def __mod__(self, other: Operand) -> Expr:
        return call(Op.MOD, self, other)

    def __neg__(self) -> Expr:
        return call(Op.NEG, self)

    def __le__(self, other: Operand) -> Expr:
        return call(Op.LE, self, other)

    def __lt__(self, other: Operand) -> Expr:
        return call(Op.LT, self, other)

    def __ge__(self, other: Operand) -> Expr:
        return call(Op.LE, other, self)

    def __gt__(self, other: Operand) -> Expr:
        return call(Op.LT, other, self)

    def __and__(self, other: Operand) -> Expr:
        return call(Op.AND, self, other)

    def __or__(self, other: Operand) -> Expr:
        return call(Op.OR, self, other)

    def __invert__(self) -> Expr:
        return call(Op.NOT, self)

    def equals(self, other: Operand) -> Expr:
        """The comparison node; `==` on nodes is identity."""
        return call(Op.EQ, self, other)

    def __bool__(self) -> bool:
        raise TypeError("an expression has no truth value: use `&`, `|`, `~` and where")


@dataclass(frozen=True, slots=True, eq=False)
class Const(Expr):
    """A number written in the program."""

    value: Number

    def _type(self) -> tuple[DType, tuple[str, ...]]:
        kind = (
            DType.BOOL
            if isinstance(self.value, bool)
            else DType.INT
            if isinstance(self.value, int)
            else DType.FLOAT
        )
        return kind, ()


@dataclass(frozen=True, slots=True, eq=False)
class Var(Expr):
    """An input of a traced function (`score`, `q_idx`, ...), a runtime number, or a named value of a tile program."""

    name: str
    kind: DType
    spans: tuple[str, ...] = ()

    def _type(self) -> tuple[DType, tuple[str, ...]]:
        return self.kind, in_order(self.spans)


@dataclass(frozen=True, slots=True, eq=False)
class Load(Expr):
    """A tensor's element at `indices`; a tile of elements where the indices span axes.

    Rows of q, k, v and their like past the end read zero. Captured tensors are read inside their bounds only.
    """

    tensor: str
    kind: DType
    indices: tuple[Expr, ...]

    def _type(self) -> tuple[DType, tuple[str, ...]]:
        return self.kind, union_axes(self.indices)

    @property
    def operands(self) -> tuple[Expr, ...]:
        return self.indices

    def with_operands(self, operands: tuple[Expr, ...]) -> Expr:
        return Load(self.tensor, self.kind, operands)


@dataclass(frozen=True, slots=True, eq=False)
class Call(Expr):
    """A scalar operation, elementwise over the axes of its operands."""

    op: Op
    args: tuple[Expr, ...]

    def _type(self) -> tuple[DType, tuple[str, ...]]:
        assert len(self.args) == INFO[self.op].arity, f"{self.op} takes {INFO[self.op].arity} operands"
        return result_dtype(self.op, tuple(a.dtype for a in self.args)), union_axes(self.args)

    @property
    def operands(self) -> tuple[Expr, ...]:
        return self.args

    def with_operands(self, operands: tuple[Expr, ...]) -> Expr:
        return Call(self.op, operands)


@dataclass(frozen=True, slots=True, eq=False)
class Full(Expr):
    """A tile holding one value everywhere."""

    value: float
    spans: tuple[str, ...]

    def _type(self) -> tuple[DType, tuple[str, ...]]:
        return DType.FLOAT, in_order(self.spans)


@dataclass(frozen=True, slots=True, eq=False)
class Dot(Expr):
    """Contract the one axis that both operands share, accumulating in FLOAT. Symmetric in its operands."""

    a: Expr
    b: Expr

    def _type(self) -> tuple[DType, tuple[str, ...]]:
        shared = set(self.a.axes) & set(self.b.axes)
        assert len(shared) == 1, f"a Dot contracts one shared axis, not {shared or 'none'}"
        return DType.FLOAT, tuple(x for x in AXES if (x in self.a.axes) != (x in self.b.axes))

    @property
    def operands(self) -> tuple[Expr, ...]:
        return (self.a, self.b)

    def with_operands(self, operands: tuple[Expr, ...]) -> Expr:
        return Dot(*operands)

    @property
    def contracted(self) -> str:
        (axis,) = set(self.a.axes) & set(self.b.axes)
        return axis


@dataclass(frozen=True, slots=True, eq=False)
class Reduce(Expr):
    """`kind` ("max", "min" or "sum") of x along `axis`."""

    kind: str
    x: Expr
    axis: str

    def _type(self) -> tuple[DType, tuple[str, ...]]:
        return self.x.dtype, tuple(a for a in self.x.axes if a != self.axis)

    @property
    def operands(self) -> tuple[Expr, ...]:
        return (self.x,)

    def with_operands(self, operands: tuple[Expr, ...]) -> Expr:
        return Reduce(self.kind, operands[0], self.axis)


@dataclass(frozen=True, slots=True, eq=False)
class Cast(Expr):
    """x rounded to the element type of tensor `like`: what a tensor core reads."""

    x: Expr
    like: str

    def _type(self) -> tuple[DType, tuple[str, ...]]:
        return DType.ELEMENT, self.x.axes

    @property
    def operands(self) -> tuple[Expr, ...]:
        return (self.x,)

    def with_operands(self, operands: tuple[Expr, ...]) -> Expr:
        return Cast(operands[0], self.like)


@dataclass(frozen=True, slots=True, eq=False)
class FirstColumns(Expr):
    """The first columns of the tile x, as those of `axis`, which has as many or fewer: values that are part of keys."""

    x: Expr
    axis: str

    def _type(self) -> tuple[DType, tuple[str, ...]]:
        return self.x.dtype, in_order(self.axis if a in COLUMNS else a for a in self.x.axes)

    @property
    def operands(self) -> tuple[Expr, ...]:
        return (self.x,)

    def with_operands(self, operands: tuple[Expr, ...]) -> Expr:
        return FirstColumns(operands[0], self.axis)


Operand = Expr | bool | int | float

REDUCE_IDENTITY = {"max": float("-inf"), "min": float("inf"), "sum": 0.0}


def in_order(axes: Iterable[str]) -> tuple[str, ...]:
    """Axes in canonical order, without repetition."""
    present = set(axes)
    assert present <= set(AXES), f"unknown axes {present - set(AXES)}"
    return tuple(a for a in AXES if a in present)


def union_axes(operands: Iterable[Expr]) -> tuple[str, ...]:
    return in_order(a for o in operands for a in o.axes)


def call(op: Op, *args: Operand) -> Expr:
    """`op` applied to nodes or plain numbers."""
    return Call(op, tuple(a if isinstance(a, Expr) else Const(a) for a in args))


def where(condition: Expr, a: Operand, b: Operand) -> Expr:
    return call(Op.WHERE, condition, a, b)


def rebuild(node: Expr, operands: tuple[Expr, ...]) -> Expr:
    """The same node over new operands; the node itself when nothing changed."""
    same = all(a is b for a, b in zip(operands, node.operands, strict=True))
    return node if same else node.with_operands(operands)


def postorder(*roots: Expr) -> list[Expr]:
    """Every distinct node reachable from the roots, operands first. Iterative: graphs may be deep."""
    order: dict[Expr, None] = {}
    stack = [(root, False) for root in reversed(roots)]
    while stack:
        node, ready = stack.pop()
        if node in order:
            continue
        if ready:
            order[node] = None
        else:
            stack.append((node, True))
            stack.extend((o, False) for o in reversed(node.operands))
    return list(order)


def transform(root: Expr, change: Callable[[Expr], Expr | None]) -> Expr:
    """Rebuild bottom-up; `change` returns the replacement of a node whose operands are done, or None to keep it."""
    done: dict[Expr, Expr] = {}
    for node in postorder(root):
        new = rebuild(node, tuple(done[o] for o in node.operands))
        changed = change(new)
        done[node] = new if changed is None else changed
    return done[root]


def substitute(root: Expr, replacements: dict[Expr, Expr]) -> Expr:
    """Replace whole nodes, outermost first: below a replaced node nothing else is replaced."""
    done: dict[Expr, Expr] = dict(replacements)
    for node in postorder(root):
        if node not in done:
            done[node] = rebuild(node, tuple(done[o] for o in node.operands))
    return done[root]


def variables(root: Expr) -> list[Var]:
    return [node for node in postorder(root) if isinstance(node, Var)]


def loads(root: Expr) -> list[Load]:
    return [node for node in postorder(root) if isinstance(node, Load)]

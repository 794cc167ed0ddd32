"""How the statements of a kernel become steps: every product and reduction gets one of its own."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

from attn_engine.codegen.lower.emit import LOG2_E
from attn_engine.codegen.lower.steps import (
    COLUMNS,
    Form,
    Pack,
    Product,
    Shape,
    Step,
    Unpack,
    View,
    is_pair_load,
    is_tile_load,
    shape_of,
    step_shape,
    stored_by_column,
)
from attn_engine.codegen.lower.values import DV_IDX
from attn_engine.ir.expr import (
    Call,
    Cast,
    Const,
    Dot,
    Expr,
    FirstColumns,
    Full,
    Load,
    Reduce,
    Var,
    call,
    postorder,
    rebuild,
    transform,
)
from attn_engine.ir.ops import DType, Op
from attn_engine.ir.tile import (
    Accumulate,
    Choose,
    If,
    Kernel,
    Lanes,
    Let,
    Loop,
    Narrow,
    Section,
    Stmt,
    StoreTile,
    expressions,
    map_expressions,
    walk,
)


def prepare(kernel: Kernel, paired: bool = False) -> tuple[Kernel, dict[str, Expr]]:
    """The kernel without casts, and the factor by which each packed tile is multiplied.

    Paired products multiply tiles as they are: a factor would have to be rounded with them.
    """
    body = map_expressions(kernel.body, lambda e: transform(transform(e, _simpler), _gather_factors))
    if paired:
        return replace(kernel, body=body), {}
    body, factors = fold_scale(replace(kernel, body=body))
    return replace(kernel, body=body), factors


def _simpler(e: Expr) -> Expr | None:
    """Without casts: operands in the compute type lose nothing, and paired products round theirs in any case. With exp
    as it was written: that is one operation more than a power of two, and spares the rounding of x * log2(e)."""
    match e:
        case Cast(x):
            return x
        case Call(Op.EXP2, (Call(Op.MUL, (x, Const(factor))),)) if factor == LOG2_E:
            return call(Op.EXP, x)
        case _:
            return None


def _gather_factors(e: Expr) -> Expr | None:
    """x / c -> x * (1/c), (x * c) * y -> (x * y) * c, (x * a) * b -> x * ab: one multiplication, no division."""
    match e:
        case Call(Op.DIV, (x, Const(value))) if x.axes and value and math.isfinite(1 / value):
            return _gathered(x * (1 / value))
        case Call(Op.MUL, (Const() as c, x)) if x.axes and not isinstance(x, Const):
            return _gathered(x * c)
        case Call(Op.MUL, (Call(Op.MUL, (x, Const(a))), Const(b))) if x.axes and e.dtype is DType.FLOAT:
            return x if a * b == 1 and x.dtype is DType.FLOAT else x * (float(a) * float(b))
        case Call(Op.MUL, (Call(Op.MUL, (x, Const() as c)), y)) if x.axes and e.dtype is DType.FLOAT:
            return _gathered((x * y) * c)
        case _:
            return None


def _gathered(e: Expr) -> Expr:
    again = _gather_factors(e)
    return e if again is None else again


def fold_scale(kernel: Kernel) -> tuple[tuple[Stmt, ...], dict[str, Expr]]:
    """Dot(query, key) * s -> Dot(query * s, key): a multiplication per query element instead of one per score."""
    scalars: set[Expr] = set(kernel.scalars)
    tiles = {s.name for s in walk(kernel.body) if isinstance(s, Let) and is_tile_load(s.value)}
    factors: dict[str, set[Expr]] = {}

    def packed(e: Dot) -> str | None:
        """The operand of a product over columns that has one of its rows per lane."""
        found = [
            x.name
            for x in e.operands
            if isinstance(x, Var) and kernel.lanes.packed in x.axes and x.name in tiles
        ]
        return found[0] if found and e.contracted in COLUMNS else None

    def scaled(e: Expr) -> tuple[Dot, Expr] | None:
        match e:
            case Call(Op.MUL, (Dot() as dot, s)) | Call(Op.MUL, (s, Dot() as dot)) if s in scalars:
                return (dot, s) if packed(dot) else None
            case _:
                return None

    for s in walk(kernel.body):
        for e in expressions(s):
            inner = {found[0] for node in postorder(e) if (found := scaled(node))}
            for node in postorder(e):
                if found := scaled(node):
                    factors.setdefault(packed(found[0]) or "", set()).add(found[1])
                elif isinstance(node, Dot) and node not in inner and (name := packed(node)):
                    factors.setdefault(name, set()).add(Const(1.0))
    agreed = {name: next(iter(f)) for name, f in factors.items() if len(f) == 1}

    def drop(e: Expr) -> Expr | None:
        found = scaled(e)
        return found[0] if found and packed(found[0]) in agreed else None

    return map_expressions(kernel.body, lambda e: transform(e, drop)), agreed


class Splitter:
    """Gives every product and reduction a step of its own, so that each step runs over one row axis."""

    def __init__(self, kernel: Kernel, factors: dict[str, Expr], paired: bool = False) -> None:
        self._factors = factors
        self._paired = paired
        self._uses = TileUses(kernel, paired)
        self.lanes = kernel.lanes
        self.steps: list[Step] = []
        self._taken: set[str] = set()
        self._tiles: dict[str, Load] = {}

    def block(self, body: Iterable[Stmt]) -> list[Step]:
        """The steps of statements that contain no others."""
        self.steps = []
        statements = list(body)
        self._taken = {s.name for s in statements if isinstance(s, Let)}
        for s in statements:
            match s:
                case Let(name, value, source):
                    self.let(name, value, source)
                case StoreTile() if stored_by_column(s) and s.indices[-2].axes == (self.lanes.axis,):
                    self.unpack(s)
                case StoreTile(tensor, indices, value):
                    self.steps.append(StoreTile(tensor, indices, self.split(value)))
                case Accumulate() if stored_by_column(s):
                    self.accumulate_rows(s)
                case Accumulate(tensor, indices, value):
                    self.steps.append(Accumulate(tensor, indices, self.split(value)))
                case Section() | Narrow() | Choose() | Loop() | If():
                    raise AssertionError("only straight-line statements become steps")
        return self.steps

    def let(self, name: str, value: Expr, source: str = "") -> None:
        match value:
            case FirstColumns(Var(whole)):
                self.first_columns(name, whole)
            case Load() if is_tile_load(value):
                self._tiles[name] = value
                for form in self._uses.packed.get(name, ()):
                    self.steps.append(Pack(name, value, self._factors.get(name, Const(1.0)), form))
                for form, padding in self._uses.views.get(name, {}).items():
                    self.steps.append(View(name, value, padding, form))
            case Load() if self._far_apart(value):
                self.steps.append(Pack(name, value, Const(1.0)))
            case Dot():
                self.product(name, Full(0.0, value.axes), value, source)
            case Call(Op.ADD, (init, Dot() as dot)) | Call(Op.ADD, (Dot() as dot, init)) if (
                init.axes == dot.axes
            ):
                self.product(name, self.split(init), dot, source)
            case Reduce(kind, x, axis):
                self.steps.append(Let(name, Reduce(kind, self.split(x), axis), source))
            case _:
                self.steps.append(Let(name, self.split(value), source))

    def first_columns(self, name: str, whole: str) -> None:
        """The rows of the tile `whole` where they are numbers; pairs are made from the tensor's own columns."""
        load = self._tiles[whole]
        load = Load(load.tensor, load.kind, (*load.indices[:-1], DV_IDX))
        shared = self._uses.views.get(whole, {})
        for form, padding in self._uses.views[name].items():
            within = whole if form is Form.NUMBERS and form in shared else ""
            self.steps.append(View(name, load, padding, form, within))

    def _far_apart(self, e: Expr) -> bool:
        """Whether neighbouring lanes read elements of different rows."""
        return self.lanes is Lanes.QUERIES and is_pair_load(e)

    def split(self, e: Expr) -> Expr:
        """e with every product and reduction inside it replaced by the name of a step."""
        match e:
            case Dot():
                return self.own_let("product", e)
            case Reduce(kind):
                return self.own_let(f"tile_{kind}", e)
            case Load() if is_tile_load(e):
                return self.own_let(f"{e.tensor}_rows", e)
            case Load() if self._far_apart(e):
                return self.own_let(f"{e.tensor}_tile", e)
            case _:
                return rebuild(e, tuple(self.split(o) for o in e.operands))

    def own_let(self, wanted: str, e: Expr) -> Var:
        name, n = wanted, 2
        while name in self._taken:
            name, n = f"{wanted}_{n}", n + 1
        self._taken.add(name)
        self.let(name, e)
        return Var(name, DType.FLOAT, e.axes)

    def product(self, name: str, init: Expr, dot: Dot, source: str, shape: Shape | None = None) -> None:
        shape = shape or shape_of(dot.axes, self.lanes)
        a, b = (x if isinstance(x, Var) else self.own_let(f"{name}_operand", x) for x in dot.operands)
        lanes, numbers = (a, b) if shape.lanes in a.axes else (b, a)
        self.steps.append(Product(name, init, numbers, lanes, shape, source, self._paired))

    def unpack(self, s: StoreTile) -> None:
        if isinstance(s.value, Var):
            self.steps.append(Unpack(s.tensor, s.indices, s.value.name))
        else:
            made = self.own_let("result", s.value)
            self.steps.append(Unpack(s.tensor, s.indices, made.name))

    def accumulate_rows(self, s: Accumulate) -> None:
        """A product that goes to memory row by row: columns in lanes, nothing transposed."""
        assert isinstance(s.value, Dot), "a tile of rows is accumulated straight from a product"
        name = f"{s.tensor}_tile"
        self.product(name, Full(0.0, s.value.axes), s.value, "", step_shape(s, self.lanes))
        self.steps.append(Accumulate(s.tensor, s.indices, Var(name, DType.FLOAT, s.value.axes)))


class TileUses:
    """How loaded tiles are read. `views`: those read by rows, in which forms, and to what their columns must be filled
    up in each; `packed`: those read with a row per lane, in which forms.
    """

    def __init__(self, kernel: Kernel, paired: bool = False) -> None:
        body = kernel.body
        lets = [s for s in walk(body) if isinstance(s, Let)]
        parts = {s.name: s.value.x for s in lets if isinstance(s.value, FirstColumns)}
        self._loaded = {s.name for s in lets if is_tile_load(s.value)} | parts.keys()
        self._axis = kernel.lanes.packed
        self._paired = paired
        self.views: dict[str, dict[Form, str]] = {}
        self.packed: dict[str, dict[Form, None]] = {}
        for s in walk(body):
            by_column = isinstance(s, Accumulate) and stored_by_column(s)
            for e in expressions(s):
                for node in postorder(e):
                    self._operands(node, by_column)
        for name, whole in parts.items():  # what is read of the part holds for all of it
            for form, padding in self.views.get(name, {}).items():
                if isinstance(whole, Var) and form in self.views.get(whole.name, {}):
                    self._by_rows(whole.name, form, padding)

    def _operands(self, node: Expr, by_column: bool) -> None:
        for x in node.operands:
            if not (isinstance(x, Var) and x.name in self._loaded) or isinstance(node, FirstColumns):
                continue
            if isinstance(node, Dot):
                self._in_product(x, node, by_column)
            elif self._axis in x.axes:
                self._packed(x.name, Form.NUMBERS)
            else:
                self._by_rows(x.name, Form.NUMBERS, "LANES")

    def _in_product(self, x: Var, product: Dot, by_column: bool) -> None:
        other = product.b if x is product.a else product.a
        along, down = (Form.ROWS, Form.PAIRS) if self._paired else (Form.NUMBERS, Form.NUMBERS)
        if product.contracted in COLUMNS and self._axis in x.axes:
            self._packed(x.name, down)
        elif product.contracted in COLUMNS:
            self._by_rows(x.name, along, "")  # numbers: a row for each row of the result
        elif self._axis in other.axes and product.contracted != self._axis and not by_column:
            self._by_rows(x.name, down, "ROWS")  # numbers, read down its columns
        else:
            self._by_rows(x.name, down, "LANES")

    def _packed(self, name: str, form: Form) -> None:
        self.packed.setdefault(name, {})[form] = None

    def _by_rows(self, name: str, form: Form, padding: str) -> None:
        views = self.views.setdefault(name, {})
        views[form] = max(views.get(form, ""), padding, key=["", "ROWS", "LANES"].index)

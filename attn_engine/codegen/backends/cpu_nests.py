"""C++ spellings of scheduled loops: nests of rows, the micro-kernel, loads and stores of tiles."""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Mapping
from typing import ClassVar

from attn_engine.codegen.lower.nests import Branch, Item, Nest, Schedule, Sweep
from attn_engine.codegen.lower.steps import (
    COLUMNS, Pack, Product, Shape, Step, Unpack, View, is_total, name_made, names_read, stored_by_column,
)
from attn_engine.codegen.render import Renderer
from attn_engine.ir.expr import Call, Const, Expr, Full, Load, Reduce, Var
from attn_engine.ir.ops import DType, Number, Op
from attn_engine.ir.tile import Accumulate, Let, Section, Stmt, StoreTile

BLOCKS = {"q": "BLOCK_Q", "kv": "BLOCK_KV", "d": "D", "dv": "DV"}
TRIPS = {"q": "q_rows", "kv": "kv_rows", "d": "D", "dv": "DV"}  # rows that a nest visits
SCALARS = {DType.INT: "int", DType.BOOL: "bool", DType.FLOAT: "Real", DType.ELEMENT: "Real"}
TOTALS = {"max": "max({total}, {x})", "min": "min({total}, {x})", "sum": "{total} + {x}"}
EMPTY = {"max": "-INFINITY", "min": "INFINITY", "sum": "0"}


class NestRenderer(Renderer):
    """Prints a schedule's items. `scratch` collects the arrays they use: name -> declaration."""

    comment: ClassVar[str] = "//"
    indent: ClassVar[str] = "  "
    prefix: ClassVar[Mapping[Op, str]] = {Op.NEG: "-", Op.NOT: "!"}
    infix: ClassVar[Mapping[Op, tuple[str, int]]] = {
        Op.OR: ("|", 1), Op.AND: ("&", 2), Op.EQ: ("==", 3), Op.NE: ("!=", 3), Op.LE: ("<=", 4), Op.LT: ("<", 4),
        Op.ADD: ("+", 5), Op.SUB: ("-", 5), Op.MUL: ("*", 6), Op.DIV: ("/", 6),
    }
    functions: ClassVar[Mapping[Op, str]] = {
        Op.FLOORDIV: "floor_div", Op.MOD: "floor_mod",
        **{op: op.value for op in (
            Op.ABS, Op.MAX, Op.MIN, Op.WHERE, Op.TO_FLOAT, Op.TO_INT, Op.FLOOR, Op.EXP, Op.EXP2, Op.LOG, Op.LOG2,
            Op.TANH, Op.SIGMOID, Op.SQRT, Op.RSQRT, Op.SIN, Op.COS,
        )},
    }
    in_double: bool = False

    def scheduled(self, schedule: Schedule) -> list[str]:
        self.arrays, self.states = schedule.arrays, schedule.states
        self.scratch: dict[str, str] = {}
        self._packed: set[str] = set()
        self._views: set[str] = set()
        self._declared: set[str] = set()
        self._at_hand: frozenset[str] | set[str] = frozenset()  # values that the row being printed has in registers
        self._places: Mapping[str, str] = {}
        self._row = "row"  # how the row being printed is called
        self._checked_axis: str | None = "kv"  # rows of this axis beyond the end are masked by the kernel itself
        return self.items(schedule.body, {})

    def scratch_fields(self) -> list[str]:
        return [f"Real {declaration};" for declaration in self.scratch.values()]

    def scalar_type(self, kind: DType) -> str:
        return SCALARS[kind]

    # -- loops and branches

    def items(self, items: tuple[Item, ...], steps: dict[tuple[Stmt, ...], str]) -> list[str]:
        lines: list[str] = []
        steps = dict(steps)  # loop bodies already printed in this scope, and their names
        for item in items:
            match item:
                case Section(title):
                    lines += ["", f"// -- {title}"]
                case Nest():
                    lines += self.nest(item)
                case Sweep(loop) if item.innermost and loop.axis:
                    if loop.body not in steps:
                        title = loop.title or "step"
                        steps[loop.body] = title if title not in steps.values() else f"{title}_{len(steps) + 1}"
                        lines += self.step_function(item, steps[loop.body])
                    lines += [*self.opening(item)[:-1], f"  {steps[loop.body]}({loop.var});"]
                case Sweep(loop):
                    inner = self.items(item.body, steps)
                    lines += [*self.opening(item), *self.inside(item, inner), "}"]
                case Branch(condition, body):
                    inner = self.items(body, steps)
                    lines += [f"if ({self.expr(condition)}) {{", *self.indented(inner), "}"]
        return lines

    def opening(self, sweep: Sweep) -> list[str]:
        loop = sweep.loop
        by = f"++{loop.var}" if loop.axis is None else f"{loop.var} += {BLOCKS[loop.axis]}"
        head = f"for (int {loop.var} = {self.expr(loop.lo)}; {loop.var} < {self.expr(loop.hi)}; {by})"
        return [head, f"{head} {{"] if sweep.innermost and loop.axis else [f"{head} {{"]

    def step_function(self, sweep: Sweep, title: str) -> list[str]:
        """The loop's body as a local function, where it is first needed; loops with equal bodies share it."""
        outer, self._checked_axis = self._checked_axis, sweep.loop.axis
        inner = self.items(sweep.body, {})
        self._checked_axis = outer
        head = f"const auto {title} = [&](int {sweep.loop.var}) __attribute__((noinline)) {{"
        return [head, *self.inside(sweep, inner), "};"]

    def inside(self, sweep: Sweep, inner: list[str]) -> list[str]:
        words = set(re.findall(r"\w+", "\n".join(inner)))
        positions = self.tile_positions(sweep.loop.axis, words) if sweep.loop.axis else []
        return self.indented([*positions, *inner])

    def tile_positions(self, axis: str, words: set[str]) -> list[str]:
        """Which rows a tile has: those inside the tensors, and the query positions lane by lane."""
        lines: list[str] = []
        if f"{axis}_rows" in words:
            lines.append(f"const int {axis}_rows = min({BLOCKS[axis]}, {axis}_len - {axis}_start);")
        if axis == "q" and "q_idx" in words:
            lines.append("const Positions q_idx = positions(q_start);")
        return lines

    @staticmethod
    def indented(lines: list[str]) -> list[str]:
        return [f"  {line}".rstrip() for line in lines]

    # -- nests

    def nest(self, n: Nest) -> list[str]:
        self._places = n.places
        if n.shape.rows is None:
            self._at_hand = frozenset()
            return [line for step in n.steps for line in self.flat(step)]
        matrices = dict.fromkeys(line for s in n.steps for line in self.matrix_of(s))
        totals = [self.total(s) for s in n.steps if isinstance(s, Let) and is_total(s, n.shape.rows)]
        match n.steps[0]:
            case Product() as product:
                rows = self.product_rows(n, product)
            case _:
                body = self.indented(self.row(n, n.steps, ""))
                rows = [f"for (int row = 0; row < {TRIPS[n.shape.rows]}; ++row) {{", *body, "}"]
                if len(body) == 1:
                    rows = [f"{rows[0].removesuffix(' {')} {body[0].strip()}"]
        if n.shape.lanes in COLUMNS:
            head = f"for (int column = 0; column < {BLOCKS[n.shape.lanes]}; column += LANES) {{"
            rows = [head, *self.indented(rows), "}"] if len(rows) > 1 else [head.removesuffix(" {"), f"  {rows[0]}"]
        return [*matrices, *totals, *rows]

    def total(self, s: Let) -> str:
        assert isinstance(s.value, Reduce)
        start = EMPTY[s.value.kind]
        return f"Floats {s.name} = fill({start});" if s.value.axes else f"Real {s.name} = {start};"

    def product_rows(self, n: Nest, product: Product) -> list[str]:
        """ROWS rows at a time: start from init, multiply-add, then the rest of the nest on the registers."""
        assert n.shape.rows is not None
        self._row = "block + r"
        self._at_hand = frozenset()
        init = self.expr(product.init)
        self._row = "row"
        call = f"multiply_add(sums, {TRIPS[product.depth]}, {self.numbers(product)}, {self.lanes(product)});"
        kept = product.name in n.stored and len(n.steps) == 1
        rest = (
            [f"UNROLL for (int r = 0; r < ROWS; ++r) store({self.element(product.name, 'block + r')}, sums[r]);"]
            if kept
            else [
                "UNROLL for (int r = 0; r < ROWS; ++r) {",
                "  const int row = block + r;",
                *self.indented(self.row(n, n.steps[1:], product.name)),
                "}",
            ]
        )
        return [
            f"for (int block = 0; block < {TRIPS[n.shape.rows]}; block += ROWS) {{",
            "  Floats sums[ROWS];",
            f"  UNROLL for (int r = 0; r < ROWS; ++r) sums[r] = {init};",
            f"  {call}",
            *self.indented(rest),
            "}",
        ]

    def numbers(self, product: Product) -> str:
        """Pointer, row stride and depth stride of the operand that is read number by number."""
        name, rows = product.a.name, product.shape.rows
        array = self.array_of(name)
        if array is None:
            first, stride, axes = name, f"{name}.stride", [a for a in product.a.axes if a not in COLUMNS]
        else:
            shape = self.arrays[self._places.get(name, name)]
            first, stride, axes = array, self.row_length(shape), [shape.rows]
        if axes[0] == rows:
            return f"{first}[block], {stride}, 1"
        return f"{first}[0] + block, 1, {stride}"

    def lanes(self, product: Product) -> str:
        """Pointer and stride of the operand that is read lane by lane."""
        name = product.b.name
        array = self.array_of(name)
        offset = " + column" if product.shape.lanes in COLUMNS else ""
        if array is not None:
            return f"{array}[0]{offset}, {self.row_length(self.arrays[self._places.get(name, name)])}"
        if product.shape.lanes == "q":
            return f"{name}_packed[0], LANES"
        return f"{name}[0]{offset}, {name}.stride"

    def row(self, n: Nest, steps: tuple[Step, ...], product: str) -> list[str]:
        """The steps at one row; values made in this nest are registers, all others are loaded."""
        assert n.shape.rows is not None
        lines: list[str] = []
        read = {r for s in steps for r in names_read(s)}
        known: set[str] = set()
        if product and product in read:
            lines.append(f"const Floats {product} = sums[r];")
            known.add(product)
        if product in n.stored:
            lines.append(f"store({self.element(product, 'row')}, {product if product in known else 'sums[r]'});")
        for i, s in enumerate(steps):
            self._at_hand = known
            later = {r for x in steps[i + 1 :] for r in names_read(x)}
            lines += self.row_step(n, s, bool(product), later)
            if name := name_made(s):
                known = known | {name}
        self._at_hand = frozenset()
        if n.shape.rows == "kv" and re.search(r"\bkv_idx\b", "\n".join(lines)):
            lines.insert(0, "const int kv_idx = kv_start + row;")
        return lines

    def row_step(self, n: Nest, s: Step, blocked: bool, later: set[str]) -> list[str]:
        # A block of rows may reach beyond the last one: those rows must not be added up or written.
        beyond = blocked and n.shape.rows in ("q", "kv") and n.shape.rows != self._checked_axis
        guard = f"if (row < {TRIPS[n.shape.rows or 'kv']}) "
        match s:
            case Let(name, Reduce(kind, x, axis)) if axis == n.shape.rows:
                update = f"{name} = {TOTALS[kind].format(total=name, x=self.expr(x))};"
                return [f"{guard if beyond else ''}{update}"]
            case Let(name, Reduce(kind, x)):
                return self.made(n, s, f"{kind}_lanes({self.expr(x)}, q_rows)", later)
            case Let(name, value):
                return self.made(n, s, self.expr(value), later)
            case StoreTile() | Accumulate():
                return [f"{guard if blocked else ''}{self.write(s)}"]
            case _:
                raise AssertionError(f"{s} inside a row loop")

    def made(self, n: Nest, s: Let, value: str, later: set[str]) -> list[str]:
        note = [f"// {s.source}"] if s.source else []
        if s.name not in n.stored:
            return [*note, f"const auto {s.name} = {value};"]
        element = self.element(s.name, "row")
        wide = self.arrays[self._places.get(s.name, s.name)].lanes is not None
        if s.name in later:
            keep = f"store({element}, {s.name});" if wide else f"{element} = {s.name};"
            return [*note, f"const auto {s.name} = {value};", keep]
        return [*note, f"store({element}, {value});" if wide else f"{element} = {value};"]

    # -- statements outside row loops

    def flat(self, s: Step) -> list[str]:
        match s:
            case View(name, load, padding):
                return self.view(name, load, padding)
            case Pack(name, load, factor):
                columns = BLOCKS[load.axes[-1]]
                self._packed.add(name)
                self.scratch[f"{name}_packed"] = f"{name}_packed[{columns}][LANES]"
                return [f"pack_lanes<{columns}>({name}_packed, {self.matrix(load)}, q_start, q_rows, {self.expr(factor)});"]
            case Unpack(tensor, indices, name):
                target = f"matrix({', '.join([tensor, *(self.expr(i) for i in indices[:-2])])})"
                return [f"unpack_lanes<{BLOCKS[indices[-1].axes[0]]}>({target}, q_start, q_rows, {self.array_of(name)});"]
            case Let(name, value, source):
                return [f"// {source}", *self.variable(name, value)] if source else self.variable(name, value)
            case StoreTile() | Accumulate():
                return [self.write(s)]
            case Product():
                raise AssertionError("a product has rows")

    def view(self, name: str, load: Load, padding: str) -> list[str]:
        row_axis, column_axis = load.axes[0], load.axes[-1]
        columns = BLOCKS[column_axis]
        padded = f"round_up({columns}, {padding})" if padding else columns
        self.scratch[f"{name}_spare"] = f"{name}_spare[{BLOCKS[row_axis]}][{padded}]"
        self._views.add(name)
        arguments = f"{self.matrix(load)}, {row_axis}_start, {TRIPS[row_axis]}, {name}_spare"
        return [f"const Rows {name} = tile_of<{columns}>({arguments});"]

    def matrix(self, load: Load) -> str:
        return f"matrix({', '.join([load.tensor, *(self.expr(i) for i in load.indices[:-2])])})"

    def variable(self, name: str, value: Expr) -> list[str]:
        if isinstance(value, Reduce):
            text = f"{value.kind}_lanes({self.expr(value.x)}, q_rows)"
        else:
            text = self.expr(value)
        if name in self.states:
            wide = "q" in value.axes
            kind = "Floats" if wide else self.scalar_type(value.dtype)
            declaration = "" if name in self._declared else f"{kind} "
            self._declared.add(name)
            return [f"{declaration}{name} = {text};"]
        kind = "auto" if value.axes else self.scalar_type(value.dtype)
        return [f"const {kind} {name} = {text};"]

    # -- stores

    def matrix_of(self, s: Step) -> list[str]:
        """The declaration of the matrix that a store by rows writes to, before its loop."""
        if isinstance(s, StoreTile | Accumulate) and stored_by_column(s):
            leading = ", ".join([s.tensor, *(self.expr(i) for i in s.indices[:-2])])
            return [f"const auto {s.tensor}_matrix = matrix({leading});"]
        return []

    def write(self, s: StoreTile | Accumulate) -> str:
        verb = "add" if isinstance(s, Accumulate) else "write"
        if stored_by_column(s):
            row, columns = s.indices[-2].axes[0], BLOCKS[s.indices[-1].axes[0]]
            value = self.expr(s.value)
            return f"{verb}_row<{columns}>({s.tensor}_matrix, {row}_start + row, column, {value});"
        indices = ", ".join(self.expr(i) for i in s.indices)
        across = any("q" in i.axes for i in s.indices)
        value = self.expr(s.value)
        value = f"floats({value})" if across and "q" not in s.value.axes else value
        count = "q_rows" if across or "q" in s.value.axes else "1"
        return f"{verb}({s.tensor}, {count}, {value}{', ' if indices else ''}{indices});"

    # -- arrays

    def array_of(self, name: str) -> str | None:
        """The scratch array that holds a stored value; declares it."""
        place = self._places.get(name, name)
        if place not in self.arrays:
            return None
        shape, array = self.arrays[place], f"{place}_tile"
        rows = f"round_up({BLOCKS[shape.rows or 'kv']}, ROWS)" if shape.rows in COLUMNS else BLOCKS[shape.rows or "kv"]
        columns = "" if shape.lanes is None else f"[{self.row_length(shape)}]"
        self.scratch[array] = f"{array}[{rows}]{columns}"
        return array

    @staticmethod
    def row_length(shape: Shape) -> str:
        return "LANES" if shape.lanes == "q" else f"round_up({BLOCKS[shape.lanes or 'd']}, LANES)"

    def element(self, name: str, row: str) -> str:
        """Where a stored value keeps its row."""
        array = self.array_of(name)
        shape = self.arrays[self._places.get(name, name)]
        return f"{array}[{row}]" + (" + column" if shape.lanes in COLUMNS else "")

    # -- expressions

    def expr(self, e: Expr, axes: tuple[str, ...] | None = None, parent: int = 0) -> str:
        if isinstance(e, Var) and e.name not in self._at_hand and e.axes:
            if self.array_of(e.name) is not None:
                wide = self.arrays[self._places.get(e.name, e.name)].lanes is not None
                return f"load({self.element(e.name, self._row)})" if wide else self.element(e.name, self._row)
            if e.name in self._packed and "q" in e.axes:
                return f"load({e.name}_packed[{self._row}])"
            if e.name in self._views:
                return f"load({e.name}[{self._row}] + column)"
        return super().expr(e, axes, parent)

    def call(self, e: Call, axes: tuple[str, ...], parent: int) -> str:
        plain = all(not a.axes for a in e.args)
        match e:
            case Call(Op.AND | Op.OR as op, (a, b)) if not set(e.axes) - {"kv"}:
                symbol, level = ("||", 1) if op is Op.OR else ("&&", 2)
                text = f"{self.expr(a, axes, level)} {symbol} {self.expr(b, axes, level)}"
                return f"({text})" if parent and parent != level else text
            case Call(Op.EQ | Op.NE | Op.LE | Op.LT) if parent:
                return f"({super().call(e, axes, 0)})"
            case Call(Op.DIV, (a, b)) if plain and a.dtype is not DType.FLOAT and b.dtype is not DType.FLOAT:
                return f"to_float({self.expr(a, axes)}) / {self.expr(b, axes, 7)}"
            case _:
                return super().call(e, axes, parent)

    @staticmethod
    def broadcast(have: tuple[str, ...], want: tuple[str, ...]) -> str:
        return ""  # operators take any mixture of lanes and numbers

    def full(self, e: Full) -> str:
        return f"fill({self.number(e.value)})" if set(e.axes) - {"kv"} else self.number(e.value)

    def load(self, e: Load, axes: tuple[str, ...]) -> str:
        return f"{e.tensor}({', '.join(self.expr(i) for i in e.indices)})"

    def number(self, value: Number) -> str:
        if isinstance(value, bool):
            return "true" if value else "false"
        if isinstance(value, int):
            return str(value)
        if math.isnan(value):
            return "NAN"
        text = repr(value) if self.in_double or not math.isfinite(value) else _single(value)
        if "inf" in text:
            return "-INFINITY" if value < 0 else "INFINITY"
        suffix = "" if self.in_double else "f"
        return f"{text}{suffix}" if "." in text or "e" in text else f"{text}.0{suffix}"


def _single(value: float) -> str:
    """The shortest text that reads back as the float32 next to `value`."""
    try:
        (rounded,) = struct.unpack("f", struct.pack("f", value))
    except OverflowError:
        return "-inf" if value < 0 else "inf"
    texts = (f"{rounded:.{digits}g}" for digits in range(1, 18))
    return repr(next(x for x in map(float, texts) if struct.pack("f", x) == struct.pack("f", rounded)))

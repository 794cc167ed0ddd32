"""C++ spellings of scheduled loops: nests of rows, the micro-kernel, loads and stores of tiles."""

from __future__ import annotations

import re

from attn_engine.codegen.backends.cpu_lanes import BLOCKS, LaneRenderer
from attn_engine.codegen.lower.nests import Branch, Item, Nest, Schedule, Sweep
from attn_engine.codegen.lower.steps import (
    COLUMNS,
    Pack,
    Product,
    Step,
    Unpack,
    View,
    is_total,
    name_made,
    names_read,
    stored_by_column,
)
from attn_engine.ir.expr import Expr, Full, Load, Reduce
from attn_engine.ir.tile import Accumulate, Let, Section, Stmt, StoreTile

TRIPS = {"q": "q_rows", "kv": "kv_rows", "d": "D", "dv": "DV"}  # rows that a nest visits
TOTALS = {"max": "max({total}, {x})", "min": "min({total}, {x})", "sum": "{total} + {x}"}
EMPTY = {"max": "-INFINITY", "min": "INFINITY", "sum": "0"}


class NestRenderer(LaneRenderer):
    """Prints a schedule's items."""

    def scheduled(self, schedule: Schedule) -> list[str]:
        """The lines of a kernel's body."""
        self.start(schedule.arrays)
        self.states = schedule.states
        self._declared: set[str] = set()
        self._checked_axis: str | None = (
            "kv"  # rows of this axis beyond the end are masked by the kernel itself
        )
        return self.items(schedule.body, {})

    # -- loops and branches

    def items(self, items: tuple[Item, ...], steps: dict[tuple[Stmt, ...], str]) -> list[str]:
        lines: list[str] = []
        steps = dict(steps)  # loop bodies already printed in this scope, and their names
        for item in items:
            match item:
                case Section(title):
                    lines += ["", self.remark(f"-- {title}")]
                case Nest():
                    lines += self.nest(item)
                case Sweep(loop) if item.innermost and loop.axis:
                    if loop.body not in steps:
                        title = loop.title or "step"
                        steps[loop.body] = (
                            title if title not in steps.values() else f"{title}_{len(steps) + 1}"
                        )
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
        self.places = n.places
        if n.shape.rows is None:
            self.at_hand = frozenset()
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
            rows = (
                [head, *self.indented(rows), "}"]
                if len(rows) > 1
                else [head.removesuffix(" {"), f"  {rows[0]}"]
            )
        return [*matrices, *totals, *rows]

    def total(self, s: Let) -> str:
        assert isinstance(s.value, Reduce)
        start = EMPTY[s.value.kind]
        return f"Floats {s.name} = fill({start});" if s.value.axes else f"Real {s.name} = {start};"

    def product_rows(self, n: Nest, product: Product) -> list[str]:
        """ROWS rows at a time: multiply-add, then the rest of the nest on the registers.

        What the sums are added to comes last: a long sum of short sums is rounded less than one long sum.
        """
        assert n.shape.rows is not None
        self.row_name = "block + r"
        self.at_hand = frozenset()
        init = self.expr(product.init)
        self.row_name = "row"
        zero = isinstance(product.init, Full) and product.init.value == 0
        added = [] if zero else [f"  UNROLL for (int r = 0; r < ROWS; ++r) sums[r] = {init} + sums[r];"]
        call = f"multiply_add(sums, {TRIPS[product.depth]}, {self.numbers(product)}, {self.lanes(product)});"
        kept = product.name in n.stored and len(n.steps) == 1
        rest = (
            [
                f"UNROLL for (int r = 0; r < ROWS; ++r) store({self.element(product.name, 'block + r')}, sums[r]);"
            ]
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
            f"  UNROLL for (int r = 0; r < ROWS; ++r) sums[r] = fill({self.number(0.0)});",
            f"  {call}",
            *added,
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
            shape = self.arrays[self.places.get(name, name)]
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
            return f"{array}[0]{offset}, {self.row_length(self.arrays[self.places.get(name, name)])}"
        if product.shape.lanes == "q":
            return f"{name}_packed[0], LANES"
        return f"{name}[0]{offset}, {name}.stride"

    def row(self, n: Nest, steps: tuple[Step, ...], product: str) -> list[str]:
        """The steps at one row; values made in this nest are registers, all others are loaded."""
        assert n.shape.rows is not None
        lines: list[str] = []
        read = {r for s in steps for r in names_read(s)}
        known: frozenset[str] = frozenset()
        if product and product in read:
            lines.append(f"const Floats {product} = sums[r];")
            known = frozenset((product,))
        if product in n.stored:
            lines.append(
                f"store({self.element(product, 'row')}, {product if product in known else 'sums[r]'});"
            )
        for i, s in enumerate(steps):
            self.at_hand = known
            later = {r for x in steps[i + 1 :] for r in names_read(x)}
            lines += self.row_step(n, s, bool(product), later)
            if name := name_made(s):
                known |= {name}
        self.at_hand = frozenset()
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
        note = [self.remark(s.source)] if s.source else []
        if s.name not in n.stored:
            return [*note, f"const auto {s.name} = {value};"]
        element = self.element(s.name, "row")
        wide = self.arrays[self.places.get(s.name, s.name)].lanes is not None
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
                self.packed.add(name)
                self.scratch[f"{name}_packed"] = f"{name}_packed[{columns}][LANES]"
                matrix, times = self.matrix(load.tensor, load.indices), self.expr(factor)
                return [f"pack_lanes<{columns}>({name}_packed, {matrix}, q_start, q_rows, {times});"]
            case Unpack(tensor, indices, name):
                columns, matrix = BLOCKS[indices[-1].axes[0]], self.matrix(tensor, indices)
                return [f"unpack_lanes<{columns}>({matrix}, q_start, q_rows, {self.array_of(name)});"]
            case Let(name, value, source):
                return [*([self.remark(source)] if source else []), *self.variable(name, value)]
            case StoreTile() | Accumulate():
                return [self.write(s)]
            case Product():
                raise AssertionError("a product has rows")

    def view(self, name: str, load: Load, padding: str) -> list[str]:
        row_axis, column_axis = load.axes[0], load.axes[-1]
        columns = BLOCKS[column_axis]
        padded = f"round_up({columns}, {padding})" if padding else columns
        self.scratch[f"{name}_spare"] = f"{name}_spare[{BLOCKS[row_axis]}][{padded}]"
        self.views.add(name)
        arguments = (
            f"{self.matrix(load.tensor, load.indices)}, {row_axis}_start, {TRIPS[row_axis]}, {name}_spare"
        )
        return [f"const Rows {name} = tile_of<{columns}>({arguments});"]

    def matrix(self, tensor: str, indices: tuple[Expr, ...]) -> str:
        """The rows of a tensor at the leading indices."""
        return f"matrix({', '.join([tensor, *(self.expr(i) for i in indices[:-2])])})"

    def variable(self, name: str, value: Expr) -> list[str]:
        across = isinstance(value, Reduce)
        text = f"{value.kind}_lanes({self.expr(value.x)}, q_rows)" if across else self.expr(value)
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
            return [f"const auto {s.tensor}_matrix = {self.matrix(s.tensor, s.indices)};"]
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

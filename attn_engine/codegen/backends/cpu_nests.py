"""C++ spellings of scheduled loops: nests of rows, the micro-kernel, loads and stores of tiles."""

from __future__ import annotations

import re

from attn_engine.codegen.backends.cpu_ahead import AheadRenderer
from attn_engine.codegen.backends.cpu_choices import ChoiceRenderer
from attn_engine.codegen.backends.cpu_lanes import BLOCKS
from attn_engine.codegen.backends.cpu_steps import is_long, steps_of_entries, titled, with_summed_products
from attn_engine.codegen.backends.cpu_tiles import TRIPS
from attn_engine.codegen.lower.nests import Branch, Item, Nest, Schedule, Sweep
from attn_engine.codegen.lower.paged import table_of_pages
from attn_engine.codegen.lower.steps import (
    COLUMNS,
    Form,
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
from attn_engine.ir.expr import Call, Expr, Full, Reduce
from attn_engine.ir.ops import Op
from attn_engine.ir.tile import (
    Accumulate,
    Choose,
    If,
    Let,
    Loop,
    Narrow,
    Section,
    Stmt,
    StoreTile,
)

TOTALS = {"max": "max({total}, {x})", "min": "min({total}, {x})", "sum": "{total} + {x}"}
EMPTY = {"max": "-INFINITY", "min": "INFINITY", "sum": "0"}


class NestRenderer(ChoiceRenderer, AheadRenderer):
    """Prints a schedule's items."""

    def scheduled(self, schedule: Schedule) -> list[str]:
        """The lines of a kernel's body."""
        self.start(schedule.arrays, schedule.operands)
        self.states = schedule.states
        self.pair_lengths = {}
        self.ahead = {}
        self._declared: set[str] = set()
        self._checked_axis: str | None = (
            "kv"  # rows of this axis beyond the end are masked by the kernel itself
        )
        return self.items(schedule.body, {})

    # -- loops and branches

    def items(
        self, items: tuple[Item, ...], steps: dict[tuple[Stmt, ...], str], loop: Loop | None = None
    ) -> list[str]:
        """loop: the innermost loop around the items."""
        lines: list[str] = []
        steps = dict(steps)  # loop bodies already printed in this scope, and their names
        for item in items:
            match item:
                case Section(title):
                    lines += ["", self.remark(f"-- {title}")]
                case Narrow():
                    lines += self.narrow(item)
                case Choose():
                    lines.append(self.choose(item))
                case Nest():
                    lines += self.nest(item)
                case Sweep():
                    lines += self.sweep(item, steps)
                case Branch(branch) if loop is not None and branch.body in steps:
                    call = self.step_call(loop, steps[branch.body])
                    lines.append(f"if ({self.expr(branch.condition)}) {call}")
                case Branch(branch, body):
                    head = f"if ({self.expr(branch.condition)}) {{"
                    lines += [head, *self.indented(self.items(body, steps, loop)), "}"]
        return lines

    def sweep(self, sweep: Sweep, steps: dict[tuple[Stmt, ...], str]) -> list[str]:
        """A loop, after the functions of its steps."""
        loop, body = sweep.loop, sweep.body
        if sweep.innermost and loop.axis:
            lines = self.step_function(loop, loop, body, steps)
            if self.is_one_tile(loop):
                return [*lines, f"{steps[loop.body]}({self.expr(loop.lo)});"]
            return [*lines, *self.opening(sweep)[:-1], f"  {self.step_call(loop, steps[loop.body])}"]
        if self.is_one_tile(loop):
            start = f"const int {loop.var} = {self.expr(loop.lo)};"
            return [start, *self.in_tile(loop, self.items(body, steps, loop))]
        lines = list[str]()
        for branch in titled(body):
            lines += self.step_function(loop, branch.branch, branch.body, steps)
        for loop_of_step, step, step_body in steps_of_entries(sweep):
            lines += self.step_function(loop_of_step, step, step_body, steps)
        inner = [*self.next_tile(sweep), *self.inside_tile(loop, body, steps)]
        return [*lines, *self.opening(sweep), *self.inside(loop, inner), "}"]

    def inside_tile(
        self, loop: Loop, body: tuple[Item, ...], steps: dict[tuple[Stmt, ...], str]
    ) -> list[str]:
        """A body, with what is known there of the next tile."""
        outer, self.next_axis = self.next_axis, loop.axis if loop.following is not None else self.next_axis
        lines = self.items(body, steps, loop)
        self.next_axis, self.to_fetch = outer, {}
        return lines

    def opening(self, sweep: Sweep) -> list[str]:
        loop = sweep.loop
        by = f"++{loop.var}" if loop.axis is None else f"{loop.var} += {BLOCKS[loop.axis]}"
        head = f"for (int {loop.var} = {self.expr(loop.lo)}; {loop.var} < {self.expr(loop.hi)}; {by})"
        return [head, f"{head} {{"] if sweep.innermost and loop.axis else [f"{head} {{"]

    def step_function(
        self, loop: Loop, step: Loop | If, body: tuple[Item, ...], steps: dict[tuple[Stmt, ...], str]
    ) -> list[str]:
        """What is done to a tile as a local function, where it is first needed; equal steps share it."""
        if step.body in steps:
            return []
        title = step.title or "step"
        title = title if title not in steps.values() else f"{title}_{len(steps) + 1}"
        steps[step.body] = title
        outer, self._checked_axis = self._checked_axis, loop.axis
        inner = self.inside_tile(loop, body, {})
        self._checked_axis = outer
        following = "" if loop.following is None else f", int {loop.axis}_next"
        head = f"const auto {title} = [&](int {loop.var}{following}) __attribute__((noinline)) {{"
        return [head, *self.inside(loop, inner), "};"]

    def is_one_tile(self, loop: Loop) -> bool:
        return loop.axis is not None and loop.is_one_tile(self.kernel.block(loop.axis))

    def inside(self, loop: Loop, inner: list[str]) -> list[str]:
        return self.indented(self.in_tile(loop, inner))

    def in_tile(self, loop: Loop, inner: list[str]) -> list[str]:
        """A loop's body after the positions that it reads."""
        words = set(re.findall(r"\w+", "\n".join(inner)))
        return [*(self.tile_positions(loop.axis, words) if loop.axis else []), *inner]

    def tile_positions(self, axis: str, words: set[str]) -> list[str]:
        """Which rows a tile has: those inside the tensors, and the query positions lane by lane."""
        lines: list[str] = []
        if f"{axis}_rows" in words:
            lines.append(f"const int {axis}_rows = min({BLOCKS[axis]}, {axis}_len - {axis}_start);")
        if axis == self.axis and f"{axis}_idx" in words:
            lines.append(f"const Positions {axis}_idx = positions({axis}_start);")
        return lines

    @staticmethod
    def indented(lines: list[str]) -> list[str]:
        return [f"  {line}".rstrip() for line in lines]

    def narrow(self, s: Narrow) -> list[str]:
        """The rows of one sequence, in pages or not, as a tensor of their own, under the tensor's name."""
        dimension = self.kernel.param(s.tensor).shape.index(f"{s.axis}_len")
        rows = f"{self.expr(s.first)}, {self.expr(s.length)}"
        whole = f"arguments.{s.tensor}"
        if s.page is not None:
            load, page = table_of_pages(s)
            place = f"{load.tensor}, {self.expr(load.indices[0])}, kv_len"
            return [f"const auto {s.tensor} = in_pages<{page}>({whole}, {place});"]
        if s.places is not None:
            return [f"const auto {s.tensor} = listed_rows<{dimension}>({whole}, {s.places}, {rows});"]
        return [f"const auto {s.tensor} = rows_of<{dimension}>({whole}, {rows});"]

    # -- nests

    def nest(self, n: Nest) -> list[str]:
        self.places = n.places
        if n.shape.rows is None:
            self.at_hand = frozenset()
            return [line for step in n.steps for line in self.flat(step)]
        matrices = dict.fromkeys(line for s in n.steps for line in self.matrix_of(s))
        totals = [self.total(s) for s in n.steps if isinstance(s, Let) and is_total(s, {n.shape.rows})]
        match n.steps[0]:
            case Product() as product:
                rows = self.product_rows(n, product)
            case _:
                rows = self.plain_rows(n)
        if n.shape.lanes in COLUMNS:
            head = f"for (int column = 0; column < {BLOCKS[n.shape.lanes]}; column += LANES) {{"
            rows = (
                [head, *self.indented(rows), "}"]
                if len(rows) > 1
                else [head.removesuffix(" {"), f"  {rows[0]}"]
            )
        return [*matrices, *totals, *rows]

    def plain_rows(self, n: Nest) -> list[str]:
        """The nest's steps row by row; by two where some are kept in pairs: the last may be one row beyond the end."""
        trips = TRIPS[n.shape.rows or ""]
        evens = self.evens(n)
        self.parity = "half" if evens else "row"
        body = self.row(n, n.steps, "")
        if evens:
            inner = ["UNROLL for (int half = 0; half < 2; ++half) {", "  const int row = pair + half;"]
            inner = [*evens, *inner, *self.indented(body), "}"]
            return [f"for (int pair = 0; pair < {trips}; pair += 2) {{", *self.indented(inner), "}"]
        head = f"for (int row = 0; row < {trips}; ++row)"
        return [f"{head} {body[0]}"] if len(body) == 1 else [f"{head} {{", *self.indented(body), "}"]

    @staticmethod
    def evens(n: Nest) -> list[str]:
        """Declarations of the rows that wait for their partners."""
        return [f"Floats even_{name};" for name, forms in n.forms.items() if Form.PAIRS in forms]

    def total(self, s: Let) -> str:
        assert isinstance(s.value, Reduce)
        start = EMPTY[s.value.kind]
        return f"Floats {s.name} = fill({start});" if s.value.axes else f"Real {s.name} = {start};"

    def product_rows(self, n: Nest, product: Product) -> list[str]:
        """ROWS rows at a time: multiply-add, then the rest of the nest on the registers.

        What the sums are added to comes last: a long sum of short sums is rounded less than one long sum.
        """
        assert n.shape.rows is not None
        self.row_name, self.parity = "block + r", "r"
        self.at_hand = frozenset()
        init = self.expr(product.init)
        self.row_name = "row"
        zero = isinstance(product.init, Full) and product.init.value == 0
        added = [] if zero else [f"  UNROLL for (int r = 0; r < ROWS; ++r) sums[r] = {init} + sums[r];"]
        asked = [
            f"  {line}"
            for line in (*self.fetched_rows(product), *self.fetched_sums(n), *self.fetched_keys(product))
        ]
        call = f"multiply_add(sums, {TRIPS[product.depth]}, {self.numbers(product)}, {self.lanes(product)});"
        kept = product.name in n.stored and len(n.steps) == 1 and not n.forms
        rest = (
            [
                f"UNROLL for (int r = 0; r < ROWS; ++r) store({self.element(product.name, 'block + r')}, sums[r]);"
            ]
            if kept
            else [
                f"{'' if is_long(n) and not n.forms else 'UNROLL '}for (int r = 0; r < ROWS; ++r) {{",
                "  const int row = block + r;",
                *self.indented(self.row(n, n.steps[1:], product.name)),
                "}",
            ]
        )
        return [
            f"for (int block = 0; block < {TRIPS[n.shape.rows]}; block += ROWS) {{",
            *asked,
            "  Floats sums[ROWS];",
            f"  UNROLL for (int r = 0; r < ROWS; ++r) sums[r] = fill({self.number(0.0)});",
            f"  {call}",
            *added,
            *self.indented(self.evens(n)),
            *self.indented(rest),
            "}",
        ]

    def row(self, n: Nest, steps: tuple[Step, ...], product: str) -> list[str]:
        """The steps at one row; values made in this nest are registers, all others are loaded."""
        assert n.shape.rows is not None
        steps = with_summed_products(n, steps)
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
        if product in n.forms:
            lines += self.keep_operand(n, product, product if product in known else "sums[r]")
        for i, s in enumerate(steps):
            self.at_hand = known
            later = {r for x in steps[i + 1 :] for r in names_read(x)}
            lines += self.row_step(n, s, bool(product) or bool(self.evens(n)), later)
            if name := name_made(s):
                known |= {name}
        self.at_hand = frozenset()
        if re.search(rf"\b{n.shape.rows}_idx\b", "\n".join(lines)):
            lines.insert(0, f"const int {n.shape.rows}_idx = {n.shape.rows}_start + row;")
        return lines

    def row_step(self, n: Nest, s: Step, blocked: bool, later: set[str]) -> list[str]:
        # A block of rows may reach beyond the last one: those rows must not be added up or written.
        beyond = blocked and n.shape.rows in ("q", "kv") and n.shape.rows != self._checked_axis
        guard = f"if (row < {TRIPS[n.shape.rows or 'kv']}) "
        match s:
            case Let(name, Reduce("sum", Call(Op.MUL, (a, b)), axis) as total) if (
                axis == n.shape.rows and total.axes
            ):
                update = f"{name} = fma({self.expr(a)}, {self.expr(b)}, {name});"
                return [f"{guard if beyond else ''}{update}"]
            case Let(name, Reduce(kind, x, axis)) if axis == n.shape.rows:
                update = f"{name} = {TOTALS[kind].format(total=name, x=self.expr(x))};"
                return [f"{guard if beyond else ''}{update}"]
            case Let(name, Reduce(kind, x)):
                return self.made(n, s, f"{kind}_lanes({self.expr(x)}, {TRIPS[self.axis]})", later)
            case Let(name, value):
                return self.made(n, s, self.expr(value), later)
            case StoreTile() | Accumulate():
                return [f"{guard if blocked else ''}{self.write(s)}"]
            case _:
                raise AssertionError(f"{s} inside a row loop")

    def made(self, n: Nest, s: Let, value: str, later: set[str]) -> list[str]:
        note = [self.remark(s.source)] if s.source else []
        if s.name in n.forms:
            note += [f"const auto {s.name} = {value};", *self.keep_operand(n, s.name, s.name)]
            if s.name in n.stored:
                note.append(f"store({self.element(s.name, 'row')}, {s.name});")
            return note
        if s.name not in n.stored:
            return [*note, f"const auto {s.name} = {value};"]
        element = self.element(s.name, "row")
        wide = self.arrays[self.places.get(s.name, s.name)].lanes is not None
        if s.name in later:
            keep = f"store({element}, {s.name});" if wide else f"{element} = {s.name};"
            return [*note, f"const auto {s.name} = {value};", keep]
        return [*note, f"store({element}, {value});" if wide else f"{element} = {value};"]

    def keep_operand(self, n: Nest, name: str, value: str) -> list[str]:
        """Store one row of an operand of paired products, in every form in which they read it."""
        offset = " + column" if self.operands[name].lanes in COLUMNS else ""
        lines: list[str] = []
        for form in n.forms[name]:
            array = self.operand(name, form)
            if form is Form.PAIRS:
                lines.append(f"store_pairs({array}[row / 2]{offset}, {self.parity}, even_{name}, {value});")
            else:
                lines.append(f"store_elements({array}[row]{offset}, {value});")
        return lines

    # -- statements outside row loops

    def flat(self, s: Step) -> list[str]:
        match s:
            case View(name, load, padding, form, within):
                return self.view(name, load, padding, form, within)
            case Pack():
                self.keep_ahead(s)
                return [self.pack(s)]
            case Unpack(tensor, indices, name):
                columns, matrix = BLOCKS[indices[-1].axes[0]], self.matrix(tensor, indices)
                place = f"{self.axis}_start, {TRIPS[self.axis]}"
                return [f"unpack_lanes<{columns}>({matrix}, {place}, {self.array_of(name)});"]
            case Let(name, value, source):
                return [*([self.remark(source)] if source else []), *self.variable(name, value)]
            case StoreTile() | Accumulate():
                return [self.write(s)]
            case Product():
                raise AssertionError("a product has rows")

    def variable(self, name: str, value: Expr) -> list[str]:
        across = isinstance(value, Reduce)
        text = f"{value.kind}_lanes({self.expr(value.x)}, {TRIPS[self.axis]})" if across else self.expr(value)
        if name in self.states:
            wide = self.axis in value.axes
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
        across = self.kernel.lanes.whole and any(self.axis in i.axes for i in s.indices)
        value = self.expr(s.value)
        value = f"floats({value})" if across and self.axis not in s.value.axes else value
        count = TRIPS[self.axis] if across or set(s.value.axes) - self.number_axes else "1"
        return f"{verb}({s.tensor}, {count}, {value}{', ' if indices else ''}{indices});"

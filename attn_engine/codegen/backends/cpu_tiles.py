"""C++ spellings of tiles: how they come out of tensors, and how the micro-kernel finds its operands."""

from __future__ import annotations

from attn_engine.codegen.backends.cpu_lanes import BLOCKS, LaneRenderer
from attn_engine.codegen.lower.steps import COLUMNS, Form, Pack, Product, Shape, is_pair_load
from attn_engine.ir.expr import Expr, Load, Var

TRIPS = {"q": "q_rows", "kv": "kv_rows", "d": "D", "dv": "DV"}  # rows that a nest visits


class TileRenderer(LaneRenderer):
    """Prints the loads of tiles, and pointers and strides of operands."""

    pair_lengths: dict[str, str]  # columns of tiles that lie in pairs of rows

    # -- tiles of tensors

    def pack(self, s: Pack) -> str:
        columns = BLOCKS["kv" if is_pair_load(s.load) else s.load.axes[-1]]
        place = f"{self.matrix(s.load.tensor, s.load.indices)}, {self.axis}_start, {TRIPS[self.axis]}"
        if s.form is Form.PAIRS:
            array = f"{s.name}_packed_pairs"
            self.scratch[array] = f"Pair {array}[round_up({columns}, 2) / 2][LANES]"
            return f"pack_lane_pairs<{columns}>({array}, {place});"
        array = f"{s.name}_packed"
        self.packed.add(s.name)
        self.scratch[array] = f"Real {array}[{columns}][LANES]"
        if is_pair_load(s.load):
            return f"pack_lanes_of_pairs<{columns}>({array}, {place}, kv_start, kv_rows);"
        return f"pack_lanes<{columns}>({array}, {place}, {self.expr(s.factor)});"

    def view(self, name: str, load: Load, padding: str, form: Form, within: str = "") -> list[str]:
        if within:
            self.views.add(name)
            return [f"const Rows {name} = {within};  // its first columns"]
        row_axis, column_axis = load.axes[0], load.axes[-1]
        rows, columns = BLOCKS[row_axis], BLOCKS[column_axis]
        padded = f"round_up({columns}, {padding})" if padding else columns
        matrix = self.matrix(load.tensor, load.indices)
        place = f"{matrix}, {row_axis}_start, {TRIPS[row_axis]}"
        if row_axis == self.next_axis:
            self.to_fetch[name] = columns, matrix
        if form is Form.PAIRS:
            self.pair_lengths[name] = padded
            self.scratch[f"{name}_pairs"] = f"Pair {name}_pairs[round_up({rows}, 2) / 2][{padded}]"
            return [f"pack_row_pairs<{columns}>({name}_pairs, {place});"]
        if form is Form.ROWS:
            self.scratch[f"{name}_spare"] = f"BFloat16 {name}_spare[{rows}][round_up({columns}, 2)]"
            return [f"const ElementRows {name}_rows = element_rows_of<{columns}>({place}, {name}_spare);"]
        self.scratch[f"{name}_spare"] = f"Real {name}_spare[{rows}][{padded}]"
        self.views.add(name)
        order = ", false" if row_axis == self.next_axis else ""
        return [f"const Rows {name} = tile_of<{columns}{order}>({place}, {name}_spare);"]

    def matrix(self, tensor: str, indices: tuple[Expr, ...]) -> str:
        """The rows of a tensor at the leading indices."""
        return f"matrix({', '.join([tensor, *(self.expr(i) for i in indices[:-2])])})"

    # -- operands of products

    def numbers(self, product: Product) -> str:
        """Pointer, row stride and depth stride of the operand that is read number by number (or pair by pair)."""
        name, lies = product.a.name, self.lies(product.a)
        form = product.form_of_numbers(lies)
        step = 2 if form is Form.ROWS else 1
        if name in self.operands:
            first, stride = self.operand(name, form), self.row_length(self.operands[name])
        elif (array := self.array_of(name)) is not None:
            first, stride = array, self.row_length(self.arrays[self.places.get(name, name)])
        elif form is Form.PAIRS:
            first, stride = f"{name}_pairs", self.pair_lengths[name]
        else:
            first = name if form is Form.NUMBERS else f"{name}_rows"
            stride = f"{first}.stride"
        if lies.rows == product.shape.rows:
            return f"{first}[block], {stride}, {step}"
        return f"{first}[0] + block, 1, {stride}"

    def lies(self, x: Var) -> Shape:
        """Rows and lanes of an operand in memory."""
        place = self.places.get(x.name, x.name)
        if found := self.operands.get(x.name) or self.arrays.get(place):
            return found
        columns = next(a for a in x.axes if a in COLUMNS)
        return Shape(next(a for a in x.axes if a != columns), columns)

    def lanes(self, product: Product) -> str:
        """Pointer and stride of the operand that is read lane by lane."""
        name, form = product.b.name, product.form_of_lanes
        offset = " + column" if product.shape.lanes in COLUMNS else ""
        if name in self.operands:
            return f"{self.operand(name, form)}[0]{offset}, {self.row_length(self.operands[name])}"
        if (array := self.array_of(name)) is not None:
            return f"{array}[0]{offset}, {self.row_length(self.arrays[self.places.get(name, name)])}"
        paired = form is Form.PAIRS
        if product.shape.lanes == self.axis:
            return f"{name}_packed{'_pairs' * paired}[0], LANES"
        if paired:
            return f"{name}_pairs[0]{offset}, {self.pair_lengths[name]}"
        return f"{name}[0]{offset}, {name}.stride"

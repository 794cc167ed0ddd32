"""C++ spellings of scheduled loops for few query rows: rows are loops, keys and columns lie in lanes."""

from __future__ import annotations

import re

from attn_engine.codegen.backends.cpu_lanes import BLOCKS
from attn_engine.codegen.backends.cpu_nests import EMPTY, TOTALS, NestRenderer
from attn_engine.codegen.lower.nests import Nest
from attn_engine.codegen.lower.steps import Pack, Product, Shape, Step, View, is_total, name_made, names_read
from attn_engine.ir.expr import Full, Reduce
from attn_engine.ir.tile import Accumulate, Let, StoreTile

ENDS = {"kv": "kv_rows", "d": "D", "dv": "DV"}  # columns that a loop over vectors visits


class RowNestRenderer(NestRenderer):
    """Prints a schedule whose kernel has keys in lanes: a loop over query rows, in it a loop over vectors."""

    def tile_positions(self, axis: str, words: set[str]) -> list[str]:
        return super().tile_positions(axis, words - {"q_idx", "kv_idx"})  # one in each row and vector

    # -- arrays

    @staticmethod
    def dimensions(shape: Shape) -> list[str]:
        rows = [] if shape.rows is None else [BLOCKS[shape.rows]]
        return rows if shape.lanes is None else [*rows, f"round_up({BLOCKS[shape.lanes]}, LANES)"]

    def array_of(self, name: str) -> str | None:
        place = self.places.get(name, name)
        if place not in self.arrays:
            return None
        array = f"{place}_tile"
        self.scratch[array] = f"Real {array}" + "".join(f"[{n}]" for n in self.dimensions(self.arrays[place]))
        return array

    def element(self, name: str, row: str) -> str:
        array, shape = self.array_of(name), self.arrays[self.places.get(name, name)]
        line = array if shape.rows is None else f"{array}[{row}]"
        return f"{line} + column" if shape.lanes else f"{line}"

    # -- nests

    def nest(self, n: Nest) -> list[str]:
        self.places = n.places
        if n.shape.rows is None:
            return super().nest(n)
        match n.steps[0]:
            case Product() as product:
                return self.product_call(product)
            case _:
                return self.row_loop(n)

    def row_loop(self, n: Nest) -> list[str]:
        """Values of a row first, then its vectors, then what was collected from them."""
        matrices = dict.fromkeys(line for s in n.steps for line in self.matrix_of(s))
        stores = any(isinstance(s, StoreTile | Accumulate) for s in n.steps)
        body = self.row_body(n)
        if re.search(r"\bq_idx\b", "\n".join(body)):
            body.insert(0, "const int q_idx = q_start + row;")
        # Rows beyond the last are computed, from zeros, and not stored.
        head = f"for (int row = 0; row < {'q_rows' if stores else 'BLOCK_Q'}; ++row)"
        return [*matrices, *self.braced(head, body)]

    def braced(self, head: str, body: list[str]) -> list[str]:
        return [head, f"  {body[0]}"] if len(body) == 1 else [f"{head} {{", *self.indented(body), "}"]

    def row_body(self, n: Nest) -> list[str]:
        self.at_hand = frozenset()
        if n.shape.lanes is None:
            return self.values(n, n.steps)
        of_row = tuple(s for s in n.steps if isinstance(s, Let) and self.is_number(s))
        wide = tuple(s for s in n.steps if s not in of_row)
        totals = [s for s in wide if isinstance(s, Let) and is_total(s, {n.shape.lanes})]
        before = self.values(n, of_row)
        vectors = self.values(n, wide)
        if re.search(r"\bkv_idx\b", "\n".join(vectors)):
            vectors.insert(0, "const Positions kv_idx = positions(kv_start + column);")
        head = f"for (int column = 0; column < {ENDS[n.shape.lanes]}; column += LANES)"
        return [
            *before,
            *(self.total(s) for s in totals),
            *self.braced(head, vectors),
            *(self.collected(s) for s in totals),
        ]

    def is_number(self, s: Let) -> bool:
        return not isinstance(s.value, Reduce) and not set(s.value.axes) - self.number_axes

    def values(self, n: Nest, steps: tuple[Step, ...]) -> list[str]:
        lines: list[str] = []
        for i, s in enumerate(steps):
            later = {r for x in steps[i + 1 :] for r in names_read(x)}
            lines += self.row_step(n, s, False, later)
            if (name := name_made(s)) and not is_total(s, {n.shape.lanes}):
                self.at_hand |= {name}
        return lines

    def row_step(self, n: Nest, s: Step, blocked: bool, later: set[str]) -> list[str]:
        match s:
            case Let(name, Reduce(kind, x)):
                return [f"{name} = {TOTALS[kind].format(total=name, x=self.expr(x))};"]
            case _:
                return super().row_step(n, s, blocked, later)

    def total(self, s: Let) -> str:
        assert isinstance(s.value, Reduce)
        return f"Floats {s.name} = fill({EMPTY[s.value.kind]});"

    def collected(self, s: Let) -> str:
        """One number from the lanes of a total. Lanes beyond the last key hold the total's neutral element."""
        assert isinstance(s.value, Reduce)
        return f"{self.element(s.name, 'row')} = {s.value.kind}_lanes({s.name});"

    # -- products

    def product_call(self, product: Product) -> list[str]:
        array, tile = self.array_of(product.name), product.b.name
        assert array is not None, "a product fills an array"
        assert tile in self.views, "a product reads the rows of a tensor"
        if product.depth != "kv":
            assert product.init == Full(0.0, product.init.axes), "scores start from zero"
            assert product.a.name in self.packed, "scores multiply the query tile"
            arguments = f"{array}, {product.a.name}_packed, {tile}, kv_rows"
            return [f"inner_products<{BLOCKS[product.depth]}>({arguments});"]
        weights = self.array_of(product.a.name)
        start = Nest(
            product.shape, (Let(product.name, product.init),), frozenset({product.name}), self.places
        )
        columns = BLOCKS[product.shape.lanes or ""]
        return [*self.row_loop(start), f"add_products<{columns}>({array}, {weights}, {tile}, kv_rows);"]

    # -- tiles

    def flat(self, s: Step) -> list[str]:
        match s:
            case Pack(name, load, factor):
                columns = BLOCKS[load.axes[-1]]
                self.packed.add(name)
                self.scratch[f"{name}_packed"] = f"Real {name}_packed[BLOCK_Q][round_up({columns}, WIDTH)]"
                matrix, times = self.matrix(load.tensor, load.indices), self.expr(factor)
                return [f"pack_rows<{columns}>({name}_packed, {matrix}, q_start, q_rows, {times});"]
            case View(name, load, within=within):
                self.views.add(name)
                if within:
                    return [f"const auto {name} = {within};  // its first columns"]
                matrix = self.matrix(load.tensor, load.indices)
                axis = load.axes[0]
                next_tile = f", {axis}_next" if axis == self.next_axis else ""
                return [f"const auto {name} = from_row({matrix}, {axis}_start{next_tile});"]
            case _:
                return super().flat(s)

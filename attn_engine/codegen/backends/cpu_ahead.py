"""C++ spellings of what is asked for ahead: the tile of the next entry of a list, which no processor guesses."""

from __future__ import annotations

from attn_engine.codegen.backends.cpu_lanes import BLOCKS
from attn_engine.codegen.backends.cpu_tiles import TileRenderer
from attn_engine.codegen.lower.nests import Nest, Sweep
from attn_engine.codegen.lower.steps import Product, stored_by_column
from attn_engine.ir.tile import Accumulate, Loop


class AheadRenderer(TileRenderer):
    """Spreads the requests over the products of a step, whose loops over rows leave time between them."""

    def next_tile(self, sweep: Sweep) -> list[str]:
        """Where a loop over entries of a list says which tile comes after the one of its body."""
        loops = [x.loop for x in sweep.body if isinstance(x, Sweep) and x.loop.following is not None]
        return [
            f"const int {x.axis}_next = {self.expr(x.following)};"
            for x in loops[:1]
            if x.following is not None
        ]

    def step_call(self, loop: Loop, step: str) -> str:
        following = "" if loop.following is None else f", {loop.axis}_next"
        return f"{step}({loop.var}{following});"

    def fetched_rows(self, product: Product) -> list[str]:
        """Asks for the next tile of what a product reads number by number, a share in each trip over its rows."""
        if product.a.name not in self.to_fetch:
            return []
        columns, matrix = self.to_fetch.pop(product.a.name)
        return [self.fetch_share(columns, matrix, BLOCKS[product.shape.rows or ""])]

    def fetch_share(self, columns: str, matrix: str, trips: str) -> str:
        axis = self.next_axis or ""
        return f"fetch_share<{columns}, {BLOCKS[axis]}, {trips}>({matrix}, {axis}_next, block);"

    def fetched_sums(self, n: Nest) -> list[str]:
        """Asks for the rows that the next tile adds to."""
        sums = (s for s in n.steps if isinstance(s, Accumulate) and stored_by_column(s))
        if self.next_axis is None or n.shape.rows != self.next_axis:
            return []
        rows = BLOCKS[self.next_axis]
        return [self.fetch_share(BLOCKS[s.indices[-1].axes[0]], f"{s.tensor}_matrix", rows) for s in sums]

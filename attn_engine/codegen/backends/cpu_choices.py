"""C++ spellings of choices: calls of include/select.h."""

from __future__ import annotations

from attn_engine.codegen.backends.cpu_lanes import BLOCKS
from attn_engine.codegen.backends.cpu_tiles import TileRenderer
from attn_engine.codegen.lower.steps import Pack, Product
from attn_engine.ir.tile import Choice, Choose, walk


class ChoiceRenderer(TileRenderer):
    """Prints what is done to rows of which the best candidates are kept."""

    ahead: dict[str, tuple[str, str]]  # tiles of keys, by name: their columns, and the rows that they are of

    def choose(self, s: Choose) -> str:
        """A call of include/select.h."""
        step, reach = s.blocks
        kind = f"<{step}, {reach}>" if s.blocks != (1, 0) else ""
        row = ", ".join(self.expr(i) for i in s.row)
        if s.choice is Choice.SETTLE:
            place = ", ".join(self.expr(i) for i in s.place)
            return f"settle{kind}({s.states}, topk, {self.expr(s.value)}, {row}, {s.result}, {place});"
        state, value = f"state_of{kind}({s.states}, topk, {row})", self.expr(s.value)
        return {
            Choice.BEGIN: f"begin({state}, {value});",
            Choice.OFFER: f"offer({state}, kv_start, {value});",
            Choice.FORCE: f"force({state}, kv_start, {value});",
        }[s.choice]

    def keep_ahead(self, s: Pack) -> None:
        """Remembers a tile of keys that few tokens read: memory must be asked for the next one in time."""
        if any(isinstance(x, Choose) for x in walk(self.kernel.body)):
            self.ahead[s.name] = BLOCKS[s.load.axes[-1]], self.matrix(s.load.tensor, s.load.indices)

    def fetched_keys(self, product: Product) -> list[str]:
        """Asks for the next tile of keys, a share in each trip over the rows of the product that reads this one."""
        if product.b.name not in self.ahead:
            return []
        columns, matrix = self.ahead[product.b.name]
        sizes = f"{columns}, {BLOCKS[self.axis]}, {BLOCKS[product.shape.rows or '']}"
        return [f"fetch_share<{sizes}>({matrix}, {self.axis}_start + LANES, block);"]

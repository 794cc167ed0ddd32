"""C++ spellings of choices: calls of include/select.h."""

from __future__ import annotations

from attn_engine.codegen.backends.cpu_lanes import BLOCKS
from attn_engine.codegen.backends.cpu_tiles import TileRenderer
from attn_engine.codegen.lower.steps import Pack
from attn_engine.ir.tile import Choice, Choose, walk


class ChoiceRenderer(TileRenderer):
    """Prints what is done to rows of which the best candidates are kept."""

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

    def fetched(self, s: Pack) -> list[str]:
        """Asks for the rows of the next tile, where keys stream past few tokens."""
        if not any(isinstance(x, Choose) for x in walk(self.kernel.body)):
            return []
        columns, matrix = BLOCKS[s.load.axes[-1]], self.matrix(s.load.tensor, s.load.indices)
        return [f"fetch_rows<{columns}>({matrix}, {self.axis}_start + LANES, LANES);"]

"""C++ spellings of choices: calls of include/select.h."""

from __future__ import annotations

from attn_engine.codegen.backends.cpu_tiles import TileRenderer
from attn_engine.ir.tile import Choice, Choose


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

"""Triton spellings of choices: calls of include/select.triton."""

from __future__ import annotations

from attn_engine.codegen.backends.device_library import device_functions, functions_called
from attn_engine.codegen.backends.triton_address import Addressing, stride_names
from attn_engine.ir.expr import Expr
from attn_engine.ir.ops import Op
from attn_engine.ir.printer import INFIX
from attn_engine.ir.tile import Choice, Choose, Kernel

LIBRARY = "select.triton"
SHARE_WORDS = 4  # of a state, that each share of the keys has
CANDIDATES = 2048  # of a tile of what is settled
_CONSTANTS = {
    "SHARE_WORDS": SHARE_WORDS, "CANDIDATES": CANDIDATES, "DIGITS": 256, "LOWEST": -(2**31), "HIGHEST": 2**31 - 1,
}  # fmt: skip


def choice_lines(body: str) -> list[str]:
    """The device functions that a kernel's text calls, and before them their constants."""
    functions = functions_called(LIBRARY, body)
    if not functions:
        return []
    text = "\n".join(functions)
    return [*(f"{n} = tl.constexpr({x})" for n, x in _CONSTANTS.items() if n in text), "", "", *functions]


def choice_names(kernel: Kernel) -> set[str]:
    """What a user's values must not be called in a kernel that chooses."""
    return {*device_functions(LIBRARY), *_CONSTANTS} if kernel.chooses else set()


class Choosing(Addressing):
    """Prints what is done to rows of which the best candidates are kept. All shares of the keys have one state."""

    def choice(self, s: Choose) -> list[str]:
        """A call of include/select.triton."""
        row, value = self._row(s.states, s.row[-3:]), self.expr(s.value)
        plane = stride_names(self.kernel.param(s.states))[0]
        name = self._named((s.states, "row"), f"{s.states}_row")
        lines = [f"{name} = {row}"]
        match s.choice:
            case Choice.BEGIN:
                return [*lines, f"begin_row({name}, {self.expr(s.row[0])}, {value})"]
            case Choice.OFFER:
                share = self.expr(s.row[0])
                return [*lines, f"offer_tile({name}, {share}, splits, kv_start, {value})"]
            case Choice.FORCE:
                share = self.expr(s.row[0])
                return [*lines, f"force_tile({name}, {plane}, {share}, splits, kv_start, {value})"]
            case Choice.SETTLE:
                to = self._named((s.result, "row"), f"{s.result}_row")
                place = stride_names(self.kernel.param(s.result))[3]
                step, reach = s.blocks
                call = f"settle_row({name}, {plane}, {value}, topk, {to}, {place}, {step}, {reach})"
                return [*lines, f"{to} = {self._row(s.result, s.place)}", call]

    def _row(self, tensor: str, indices: tuple[Expr, ...]) -> str:
        """Where a row begins: these are the indices before its last dimension."""
        strides = stride_names(self.kernel.param(tensor))[-1 - len(indices) : -1]
        places: list[str] = []
        for index, stride in zip(indices, strides, strict=True):
            wide = self._is_wide(index)
            text = self.expr(index, (), INFIX[Op.MUL][1] if wide else 0)
            places.append(f"{text if wide else f'tl.cast({text}, tl.int64)'} * {stride}")
        return " + ".join([tensor, *places])

"""C++ spellings of values: lanes, numbers, and the scratch arrays that hold them between loops."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from typing import ClassVar

from attn_engine.codegen.lower.steps import COLUMNS, Form, Shape
from attn_engine.codegen.render import Renderer
from attn_engine.ir.expr import Call, Expr, Full, Load, Var
from attn_engine.ir.ops import DType, Number, Op
from attn_engine.ir.tile import Kernel

BLOCKS = {"q": "BLOCK_Q", "kv": "BLOCK_KV", "d": "D", "dv": "DV"}
SCALARS = {DType.INT: "int", DType.BOOL: "bool", DType.FLOAT: "Real", DType.ELEMENT: "Real"}


class LaneRenderer(Renderer):
    """Prints expressions. `scratch` collects the arrays they use: name -> declaration."""

    comment: ClassVar[str] = "//"
    indent: ClassVar[str] = "  "
    prefix: ClassVar[Mapping[Op, str]] = {Op.NEG: "-", Op.NOT: "!"}
    infix: ClassVar[Mapping[Op, tuple[str, int]]] = {
        Op.OR: ("|", 1),
        Op.AND: ("&", 2),
        Op.EQ: ("==", 3),
        Op.NE: ("!=", 3),
        Op.LE: ("<=", 4),
        Op.LT: ("<", 4),
        Op.ADD: ("+", 5),
        Op.SUB: ("-", 5),
        Op.MUL: ("*", 6),
        Op.DIV: ("/", 6),
    }
    functions: ClassVar[Mapping[Op, str]] = {
        Op.FLOORDIV: "floor_div",
        Op.MOD: "floor_mod",
        Op.BIT: "bit_of",
        **{
            op: op.value
            for op in (
                Op.ABS,
                Op.MAX,
                Op.MIN,
                Op.WHERE,
                Op.TO_FLOAT,
                Op.TO_INT,
                Op.FLOOR,
                Op.EXP,
                Op.EXP2,
                Op.LOG,
                Op.LOG2,
                Op.TANH,
                Op.SIGMOID,
                Op.SQRT,
                Op.RSQRT,
                Op.SIN,
                Op.COS,
            )
        },
    }
    kernel: Kernel
    in_double: bool = False

    @property
    def axis(self) -> str:
        """The axis that lies in lanes."""
        return self.kernel.lanes.axis

    @property
    def number_axes(self) -> set[str]:
        """A value over these alone is a number in its row."""
        return {"q", "kv"} - {self.axis}

    def start(self, arrays: Mapping[str, Shape], operands: Mapping[str, Shape]) -> None:
        """Forget the last kernel; `arrays` gives the shape of every stored value, `operands` of those in pairs."""
        self.arrays = arrays
        self.operands = operands
        self.scratch: dict[str, str] = {}
        self.packed: set[str] = set()  # tiles with one of their rows per lane
        self.views: set[str] = set()  # tiles read by rows, as they lie
        self.next_axis: str | None = None  # whose next tile is known where the step is printed
        self.to_fetch: dict[
            str, tuple[str, str]
        ] = {}  # columns and matrix of tiles whose next one is to be asked for
        self.at_hand: frozenset[str] = frozenset()  # values that the row being printed has in registers
        self.places: Mapping[str, str] = {}  # stored values that use another one's array
        self.row_name = "row"  # how the row being printed is called
        self.parity = "row"  # what tells its even rows from its odd ones

    def scratch_fields(self) -> list[str]:
        return [f"{declaration};" for declaration in self.scratch.values()]

    @staticmethod
    def remark(text: str) -> str:
        """A comment of one line, whatever the text: a backslash at its end would swallow the next line."""
        return f"// {' '.join(text.replace('??/', '? ?/').split())}".rstrip("\\ ")

    def scalar_type(self, kind: DType) -> str:
        return SCALARS[kind]

    # -- arrays

    def array_of(self, name: str) -> str | None:
        """The scratch array that holds a stored value; declares it."""
        place = self.places.get(name, name)
        if place not in self.arrays:
            return None
        shape, array = self.arrays[place], f"{place}_tile"
        rows = (
            f"round_up({BLOCKS[shape.rows or 'kv']}, ROWS)"
            if shape.rows in COLUMNS
            else BLOCKS[shape.rows or "kv"]
        )
        columns = "" if shape.lanes is None else f"[{self.row_length(shape)}]"
        self.scratch[array] = f"Real {array}[{rows}]{columns}"
        return array

    def operand(self, name: str, form: Form) -> str:
        """The scratch array that holds a computed operand of paired products; declares it."""
        shape, array = self.operands[name], f"{name}_{form.value}"
        rows = f"round_up({BLOCKS[shape.rows or 'kv']}, {'2' if form is Form.PAIRS else 'ROWS'})"
        kind, rows = ("Pair", f"{rows} / 2") if form is Form.PAIRS else ("BFloat16", rows)
        self.scratch[array] = f"{kind} {array}[{rows}][{self.row_length(shape)}]"
        return array

    def row_length(self, shape: Shape) -> str:
        return "LANES" if shape.lanes == self.axis else f"round_up({BLOCKS[shape.lanes or 'd']}, LANES)"

    def element(self, name: str, row: str) -> str:
        """Where a stored value keeps its row."""
        array = self.array_of(name)
        shape = self.arrays[self.places.get(name, name)]
        return f"{array}[{row}]" + (" + column" if shape.lanes in COLUMNS else "")

    # -- expressions

    def expr(self, e: Expr, axes: tuple[str, ...] | None = None, parent: int = 0) -> str:
        if isinstance(e, Var) and e.name not in self.at_hand and e.axes:
            if self.array_of(e.name) is not None:
                wide = self.arrays[self.places.get(e.name, e.name)].lanes is not None
                return (
                    f"load({self.element(e.name, self.row_name)})"
                    if wide
                    else self.element(e.name, self.row_name)
                )
            if e.name in self.packed and self.axis in e.axes:
                return f"load({e.name}_packed[{self.row_name}])"
            if e.name in self.views:
                return f"load({e.name}[{self.row_name}] + column)"
        return super().expr(e, axes, parent)

    def call(self, e: Call, axes: tuple[str, ...], parent: int) -> str:
        plain = not set(e.axes) - self.number_axes
        match e:
            case Call(Op.AND | Op.OR as op, (a, b)) if plain:
                # Levels that no infix operator has: && binds weaker in C++ than the & and | of lanes around it.
                symbol, level = ("||", -1) if op is Op.OR else ("&&", -2)
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
        return f"fill({self.number(e.value)})" if set(e.axes) - self.number_axes else self.number(e.value)

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

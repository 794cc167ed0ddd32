"""The steps of a kernel for a machine without tile instructions.

    step = Let | Product(name, init, a, b) | View(name, load) | Pack(name, load, factor)
         | StoreTile | Accumulate | Unpack(tensor, indices, name)

One axis of a step is the row loop that runs it, another lies across the vector's lanes (`Shape`). Which one, the kernel
says (`Kernel.lanes`). In a forward kernel a query row is a lane wherever the query axis occurs, so that row sums and
maxima are vertical; in a backward kernel, which owns keys, a key is one. Products that go to memory row by row have a
column per lane. For few query rows, keys are lanes: a vector after the other along each row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from attn_engine.ir.expr import (
    Expr,
    Load,
    Reduce,
    Var,
    variables,
)
from attn_engine.ir.ops import DType
from attn_engine.ir.program import KV_IDX, Q_IDX
from attn_engine.ir.tile import (
    Accumulate,
    Lanes,
    Let,
    StoreTile,
    expressions,
)

COLUMNS = ("d", "dv")


@dataclass(frozen=True, slots=True)
class Shape:
    """Where the axes of a value go: `rows` is a loop, `lanes` the vector."""

    rows: str | None
    lanes: str | None


class Form(Enum):
    """How an operand of the micro-kernel lies. The last two are for processors that multiply bfloat16 in pairs."""

    NUMBERS = "numbers"  # in the compute type
    ROWS = "rows"  # in bfloat16; the contracted axis runs along a row
    PAIRS = "pairs"  # in bfloat16, rows two by two; the contracted axis runs down the rows


@dataclass(frozen=True, slots=True)
class Product:
    """name = init + a . b, the micro-kernel. `a` gives numbers, `b` gives lanes; `depth` is the contracted axis.

    paired: in bfloat16, two neighbours of the contracted axis at a time.
    """

    name: str
    init: Expr
    a: Var
    b: Var
    shape: Shape
    source: str = ""
    paired: bool = False

    @property
    def depth(self) -> str:
        (axis,) = set(self.a.axes) & set(self.b.axes)
        return axis

    def form_of_numbers(self, lies: Shape) -> Form:
        """How `a` is read, where it lies like this."""
        if not self.paired:
            return Form.NUMBERS
        return Form.ROWS if lies.lanes == self.depth else Form.PAIRS

    @property
    def form_of_lanes(self) -> Form:
        return Form.PAIRS if self.paired else Form.NUMBERS


@dataclass(frozen=True, slots=True)
class View:
    """The rows of a tensor; `padding` says to what its columns must be filled up ("", "ROWS", "LANES").

    within: the view whose first columns these are.
    """

    name: str
    load: Load
    padding: str
    form: Form = Form.NUMBERS
    within: str = ""


@dataclass(frozen=True, slots=True)
class Pack:
    """The rows of a tensor, times `factor`; transposed where a row is a lane. In pairs: of neighbouring columns.

    A tile of a captured matrix is packed as well where a query row is a lane: its lanes would lie far apart.
    """

    name: str
    load: Load
    factor: Expr
    form: Form = Form.NUMBERS


@dataclass(frozen=True, slots=True)
class Unpack:
    """tensor[indices] = the transpose of array `name`."""

    tensor: str
    indices: tuple[Expr, ...]
    name: str


Step = Let | Product | View | Pack | StoreTile | Accumulate | Unpack


def shape_of(axes: Sequence[str], lanes: Lanes) -> Shape:
    """The kernel's axis of lanes, else columns in lanes, else numbers. Of many vectors each belongs to a query row."""
    across = next((a for a in (lanes.axis, *COLUMNS) if a in axes), None)
    row = "q" if across == lanes.axis and not lanes.whole else None
    return Shape(next((a for a in axes if a != across), row), across)


def loops_of(shape: Shape, lanes: Lanes) -> set[str | None]:
    """The axes that are loops: lanes too, except where one vector holds the tile."""
    return {shape.rows, shape.lanes} - {lanes.axis if lanes.whole else None}


def is_tile_load(e: Expr) -> bool:
    return isinstance(e, Load) and bool(set(e.axes) & set(COLUMNS))


def is_pair_load(e: Expr) -> bool:
    """A captured number for each pair of positions, read where it lies: a tile of rows of a matrix."""
    return isinstance(e, Load) and e.dtype is DType.FLOAT and e.indices[-2:] == (Q_IDX, KV_IDX)


def stored_by_column(s: StoreTile | Accumulate) -> bool:
    """Whether the last index runs over columns: a tile of rows, not elements one by one."""
    last = s.indices[-1]
    return isinstance(last, Var) and bool(set(last.axes) & set(COLUMNS))


def step_shape(step: Step, lanes: Lanes) -> Shape:
    match step:
        case Product(shape=shape):
            return shape
        case Let(_, Reduce(_, x)):
            return shape_of(x.axes, lanes)
        case Let(_, value):
            return shape_of(value.axes, lanes)
        case StoreTile() | Accumulate() if stored_by_column(step):
            rows, columns = step.indices[-2].axes, step.indices[-1].axes
            return Shape(rows[0], columns[0])
        case StoreTile(_, indices, value) | Accumulate(_, indices, value):
            return shape_of([a for a in ("q", "kv") if any(a in e.axes for e in (*indices, value))], lanes)
        case View() | Pack() | Unpack():
            return Shape(None, None)


def names_read(step: Step) -> set[str]:
    """Names whose values the step needs."""
    match step:
        case Product(_, init, a, b):
            return {v.name for v in variables(init)} | {a.name, b.name}
        case View(_, load, within=within):
            return {v.name for v in variables(load)} | ({within} if within else set())
        case Pack(_, load, factor):
            return {v.name for e in (load, factor) for v in variables(e)}
        case Unpack(_, indices, name):
            return {v.name for e in indices for v in variables(e)} | {name}
        case _:
            return {v.name for e in expressions(step) for v in variables(e)}


def numbers_read(step: Step) -> set[str]:
    """Names whose values the step needs in the compute type."""
    if isinstance(step, Product) and step.paired:
        return {v.name for v in variables(step.init)}
    return names_read(step)


def name_made(step: Step) -> str | None:
    return None if isinstance(step, StoreTile | Accumulate | Unpack) else step.name


def is_total(step: Step, loops: set[str | None]) -> bool:
    """A reduction along one of the loops that run the step: known only after it."""
    return isinstance(step, Let) and isinstance(step.value, Reduce) and step.value.axis in loops

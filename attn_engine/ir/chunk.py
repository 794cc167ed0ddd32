"""Chunk programs: a linear attention in chunks of tokens, a state carried from one to the next.

    tile   = Tile(name, axes), axes of "t" (tokens of the chunk), "d", "v" (columns of the state); "t", "t" is a matrix
    stmt   = Rows(values, writes) | Decays(...) | Scale(to, x, by) | Gram(to, x, y) | Diagonal(to, x, y)
           | Product(to, a, b) | Solve(to, matrix) | StateStep(state, keys, values) | Section(title)
           | CarriedGradient(...) | GramGradient(...) | DiagonalGradient(...)
    kernel = ChunkKernel(name, program, scan, gradient)

Three primitives make the family: the decayed Gram matrix, the solve with a unit lower triangle, the step of the state.
No statement ever forms e^{-G}: every exponent is a sum of decays, at most 0, and masks are inside the exponent.
`Gram` and its like hold their matrix transposed, [j][i] = weight of token j for token i.
"""

from __future__ import annotations

from dataclasses import dataclass

from attn_engine.ir.expr import Expr, Var
from attn_engine.ir.linear import LinearProgram
from attn_engine.ir.ops import DType

_SPANS = {"t": "q", "d": "d", "v": "dv"}


@dataclass(frozen=True, slots=True)
class Tile:
    """A value of one chunk, or of the state."""

    name: str
    axes: tuple[str, ...]

    @property
    def var(self) -> Var:
        """A token's row of the tile, in expressions."""
        return Var(self.name, DType.FLOAT, tuple(_SPANS[a] for a in self.axes))

    @property
    def last(self) -> Var:
        """A token's number in the column beyond those of v, where a normaliser has its sums."""
        return Var(f"{self.name}_last", DType.FLOAT, ("q",))


@dataclass(frozen=True, slots=True)
class Section:
    """A titled phase; becomes a comment line."""

    title: str


@dataclass(frozen=True, slots=True)
class RowOutput:
    """tensor[batch, head, t, column] = value for each token. axes: those of "q", "d", "dv" that the tensor has; without
    "q" it holds the sum over the tokens of its batch."""

    tensor: str
    value: Expr
    axes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Rows:
    """Token by token: rows of tiles, or of tensors, from expressions of the token's inputs and rows of other tiles.

    last: the same for the column beyond those of v. fault: tokens whose row of this tile is no decay (above 0, -inf,
    NaN) are reported.
    """

    values: tuple[tuple[Tile, Expr], ...] = ()
    writes: tuple[RowOutput, ...] = ()
    last: tuple[tuple[Tile, Expr], ...] = ()
    fault: Tile | None = None


@dataclass(frozen=True, slots=True)
class Decays:
    """With G the running sum of `decay` inside the chunk: reads = e^G (exclusive: up to the token before),
    erases = e^G, writes = e^{G_end - G}, whole = e^{G_end}, sums = G. None: not wanted."""

    decay: Tile
    sums: Tile
    steps: Tile | None
    reads: Tile | None
    erases: Tile | None
    writes: Tile
    whole: Tile
    exclusive: bool


@dataclass(frozen=True, slots=True)
class Scale:
    """to = x * by; `by` has a number for each row or for each element."""

    to: Tile
    x: Tile
    by: Tile


@dataclass(frozen=True, slots=True)
class Within:
    """How weights decay between two tokens of a chunk: by the sums G, or by the steps of single tokens (vector).

    exclusive: the reading token's own step does not count.
    """

    decay: Tile
    sums: Tile
    steps: Tile | None
    exclusive: bool

    @property
    def vector(self) -> bool:
        return "d" in self.decay.axes


@dataclass(frozen=True, slots=True)
class Gram:
    """to[j][i] = sum over columns of x_i y_j e^{G_i - G_j} for j <= i (strict: j < i), else 0. negative: minus it."""

    to: Tile
    x: Tile
    y: Tile
    within: Within | None
    strict: bool
    negative: bool = False


@dataclass(frozen=True, slots=True)
class Diagonal:
    """to[i][i] = sum over columns of x_i y_i."""

    to: Tile
    x: Tile
    y: Tile


@dataclass(frozen=True, slots=True)
class Product:
    """to = a b; `add`: to += a b; negative: with minus a b. `a` may be a matrix of tokens, as Gram holds it.

    upper: `a` is read as it is held, [j][i], else by its rows i. turned: b is read transposed.
    """

    to: Tile
    a: Tile
    b: Tile
    add: bool = False
    negative: bool = False
    upper: bool = False
    turned: bool = False


@dataclass(frozen=True, slots=True)
class Solve:
    """(I + L) to = to in place, L strictly lower, held transposed as Gram does. turned: with its transpose."""

    to: Tile
    matrix: Tile
    turned: bool = False


@dataclass(frozen=True, slots=True)
class StateStep:
    """state = whole * state + keys^T values, negative: - keys^T values; whole None: 1."""

    state: Tile
    keys: Tile
    values: Tile
    whole: Tile | None
    negative: bool = False


@dataclass(frozen=True, slots=True)
class CarriedGradient:
    """d_decay = what comes through the state. `reads`: (x, d_x, exclusive), x_i . d_x_i counts for the tokens up to i;
    `write`: (x, d_x), x_j . d_x_j counts for the tokens after j; and whole * <state, d_state> for all of them."""

    d_decay: Tile
    reads: tuple[tuple[Tile, Tile, bool], ...]
    write: tuple[Tile, Tile]
    state: Tile
    d_state: Tile
    whole: Tile


@dataclass(frozen=True, slots=True)
class GramGradient:
    """From d_matrix to d_x += ..., d_y += ..., and d_decay_t += the sum over pairs j < t <= i (exclusive: t < i) of
    d_matrix * matrix, the pairs whose weight the decay at t has a part in: no terms that cancel.

    d_matrix is changed. matrix: the Gram itself, needed unless the decay is a vector.
    """

    d_matrix: Tile
    matrix: Tile
    x: Tile
    y: Tile
    d_x: Tile
    d_y: Tile
    within: Within | None
    d_decay: Tile | None
    strict: bool


@dataclass(frozen=True, slots=True)
class DiagonalGradient:
    """d_x_i += d_matrix[i][i] y_i, d_y_i = d_matrix[i][i] x_i, from the d_matrix of before its GramGradient."""

    d_matrix: Tile
    x: Tile
    y: Tile
    d_x: Tile
    d_y: Tile


@dataclass(frozen=True, slots=True)
class TokenStep:
    """One token at a time, what Gram, Solve and StateStep do together for a chunk: to = what the token reads, and
    `state` after it. Its rows are the first rows of the tiles."""

    to: Tile
    state: Tile
    query: Tile
    key: Tile
    value: Tile
    decay: Tile | None
    eraser: Tile | None
    bonus: Tile | None
    exclusive: bool


ChunkStmt = (
    Section
    | Rows
    | Decays
    | Scale
    | Gram
    | Diagonal
    | Product
    | Solve
    | StateStep
    | CarriedGradient
    | GramGradient
    | DiagonalGradient
    | TokenStep
)


@dataclass(frozen=True, slots=True)
class ChunkKernel:
    """What is done for one head of one sequence.

    scan: for each chunk in order; it ends with the step of STATE. gradient: for each chunk from the last to the first,
    with STATE as it was before the chunk, found again by `scan`; it ends with the step of D_STATE.
    """

    name: str
    program: LinearProgram
    scan: tuple[ChunkStmt, ...]
    gradient: tuple[ChunkStmt, ...] = ()

    @property
    def outputs(self) -> tuple[RowOutput, ...]:
        """The tensors that rows are written to."""
        rows = (s for s in (*self.scan, *self.gradient) if isinstance(s, Rows))
        return tuple(w for s in rows for w in s.writes)

    def tiles(self) -> tuple[Tile, ...]:
        """Every tile that the statements name, once."""
        found: dict[Tile, None] = {}
        for statement in (*self.scan, *self.gradient):
            for tile in tiles_of(statement):
                found[tile] = None
        return tuple(found)


STATE = Tile("state", ("d", "v"))
D_STATE = Tile("d_state", ("d", "v"))


def tiles_of(statement: ChunkStmt) -> tuple[Tile, ...]:
    """The tiles that a statement reads or makes."""
    found: list[Tile] = []
    stack: list[object] = [getattr(statement, name) for name in statement.__slots__]
    while stack:
        x = stack.pop(0)
        if isinstance(x, Tile):
            found.append(x)
        elif isinstance(x, Within):
            stack.extend((x.decay, x.sums, x.steps))
        elif isinstance(x, tuple):
            stack.extend(x)  # pyright: ignore[reportUnknownArgumentType]
    return tuple(found)

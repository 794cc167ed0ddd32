"""Tile programs: what one program instance does, in loops over tiles.

    stmt   = Section(title) | Let(name, value, source) | Loop(var, lo, hi, axis, body, title, following)
           | If(condition, body, title) | StoreTile(tensor, indices, value) | Accumulate(tensor, indices, value)
           | Narrow(tensor, axis, first, length, page, places)
           | Choose(choice, states, row, value, result, place, blocks)
    kernel = Kernel(name, params, scalars, grid, order, tile, body, header, heavy_last, lanes, tables, tiles)
    module = Module(program, kernels)

A tile value is an `Expr` over named axes. The order of a tile's dimensions belongs to the kernel (`Kernel.order`),
which is how one lowering serves S and its transpose. A Let may overwrite a name of an outer statement: loop-carried
state. A name first set inside a loop is not visible after it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from enum import Enum

from attn_engine.ir.expr import Expr, Var
from attn_engine.ir.ops import Storage


@dataclass(frozen=True, slots=True)
class Section:
    """A titled phase of the program; becomes a comment line."""

    title: str


@dataclass(frozen=True, slots=True)
class Let:
    """`name = value`; `source` is the user's line that it came from."""

    name: str
    value: Expr
    source: str = ""

    @property
    def var(self) -> Var:
        return Var(self.name, self.value.dtype, self.value.axes)


@dataclass(frozen=True, slots=True)
class Loop:
    """`var` runs from lo to hi in steps of one tile of `axis`, or of 1 where axis is None (the heads of a group).

    Bounds of a tile loop are multiples of the tile. Inside, "<axis>_idx" is the tile's positions: var, var + 1, ...
    `title` names the body ("full_step", "partial_step") where a backend prints equal bodies once.
    following: the first position of the tile that is read after these, where no processor could guess it.
    """

    var: str
    lo: Expr
    hi: Expr
    axis: str | None
    body: tuple[Stmt, ...]
    title: str = ""
    following: Expr | None = None

    def is_one_tile(self, block: int) -> bool:
        """Whether the body runs once: from lo to lo + block."""
        return self.axis is not None and self.hi is self.lo + block


@dataclass(frozen=True, slots=True)
class If:
    """A branch that a whole program instance takes: the condition spans no axis. `title` as in Loop."""

    condition: Expr
    body: tuple[Stmt, ...]
    title: str = ""


@dataclass(frozen=True, slots=True)
class StoreTile:
    """tensor[indices] = value; elements outside the tensor are not written."""

    tensor: str
    indices: tuple[Expr, ...]
    value: Expr


@dataclass(frozen=True, slots=True)
class Accumulate:
    """tensor[indices] += value, in FLOAT; elements outside the tensor are not written.

    No two program instances that run at once touch the same element, so no atomics and the same bits every run.
    `indices` may repeat inside one tile (a gather's gradient): the additions then run in the tile's order.
    """

    tensor: str
    indices: tuple[Expr, ...]
    value: Expr


@dataclass(frozen=True, slots=True)
class Narrow:
    """From here on `tensor` is its `length` rows from `first` on, along the dimension "<axis>_len": one sequence of
    several that lie in it. Positions count from its first row, and no other row is read or written.

    `length` is what "<axis>_len" holds here. A Narrow inside a loop starts from the whole tensor every time.

    page: the first dimension of the tensor counts pages, and the rows are those of this one: position p is its row
    first + p. `first` may be negative: positions before the page and from `length` on are not there. The tensor is then
    indexed as if this page were its only one. Both may differ from position to position (span the axis) inside a tile.

    places: a table (rows,), int32, that names the tensor's rows, of which each occurs once: position p is its row
    places[first + p].
    """

    tensor: str
    axis: str
    first: Expr
    length: Expr
    page: Expr | None = None
    places: str | None = None


class Choice(Enum):
    """What is done to a row of which the best candidates are kept."""

    BEGIN = "begin"  # nothing has been offered yet; value: the first key that will be
    OFFER = "offer"  # value (kv): the numbers of the tile's keys; what is -inf or NaN is none
    FORCE = "force"  # value (kv): whether each candidate of the tile is taken first
    SETTLE = (
        "settle"  # the best of all are written; value: how many states, of shares of the keys, the row has
    )


@dataclass(frozen=True, slots=True)
class Choose:
    """A step of the choice of the `topk` best candidates of a row: the largest numbers, of equals those of lower index.

    states: the tensor that keeps what has been offered and may still be chosen, its rows at `row`; its last dimension
    is for the backend to use. A row is offered tile after tile, with rising positions. SETTLE writes their indices,
    ascending and -1 behind, to result[place], and takes the states of all shares, the first dimension of `states`.

    blocks: (step, reach): candidates are blocks of keys; block j is offered the sum over o from -reach to step - 1 of
    (min(o + reach + 1, step) - max(o, 0)) times the number of key j * step + o. (1, 0): they are the keys.
    """

    choice: Choice
    states: str
    row: tuple[Expr, ...]
    value: Expr
    result: str = ""
    place: tuple[Expr, ...] = ()
    blocks: tuple[int, int] = (1, 0)


Stmt = Section | Let | Loop | If | StoreTile | Accumulate | Narrow | Choose


@dataclass(frozen=True, slots=True)
class Param:
    """A tensor argument: its storage and the names of its sizes, outermost first.

    Sizes: "batches", "heads", "kv_heads", "q_len", "kv_len", "dim_qk", "dim_v"; "<name>_size_<i>" for captured tensors;
    "q_blocks", "kv_blocks" and "ends" for tables of tiles; "q_bounds", "kv_bounds", "partial_listed", "full_listed"
    and "partial_words" for lists of blocks; "span" and "tile_count" for tables of sequences.
    Strides are arguments too, one per dimension, in elements.
    """

    name: str
    storage: Storage
    shape: tuple[str, ...]
    output: bool = False


class Lanes(Enum):
    """What lies across the vectors of a machine without tile instructions; all else is loops."""

    QUERIES = "queries"  # a tile of query rows is one vector: nothing of a row is reduced across lanes
    KEYS = "keys"  # a tile of keys is one vector: for kernels that own keys and loop over queries
    FEW_ROWS = "few rows"  # loops over query rows, in them over vectors of keys and of columns

    @property
    def axis(self) -> str:
        """The axis that lies in lanes wherever it occurs; columns do where it does not."""
        return "q" if self is Lanes.QUERIES else "kv"

    @property
    def packed(self) -> str:
        """The axis whose tiles are copied into the order of the vectors; others are read as they lie."""
        return "kv" if self is Lanes.KEYS else "q"

    @property
    def whole(self) -> bool:
        """Whether one vector holds a tile of that axis."""
        return self is not Lanes.FEW_ROWS


@dataclass(frozen=True, slots=True)
class TileTable:
    """The smallest and the largest value of `value` in every tile of its axis, made before the launch as tensor `name`.

    Dimensions: "batches" and "heads" where the value depends on them, the tiles, and two: smallest, largest. A NaN
    anywhere in a tile makes both of them NaN.
    """

    name: str
    value: Expr
    block: int

    @property
    def axis(self) -> str:
        (axis,) = self.value.axes
        return axis


@dataclass(frozen=True, slots=True)
class TileGrid:
    """What the grid axis "tile" counts: tiles of `block` rows of `axis`.

    heads: those of every sequence, once for each of these ("heads" or "kv_heads"), by the tables "tile_list" (which
    sequence a tile belongs to) and "tile_ranges" (each sequence's first tile, and how many it has). None: as many as
    the longest sequence has.
    """

    axis: str
    block: int
    heads: str | None


@dataclass(frozen=True, slots=True)
class Kernel:
    """One kernel: parameters, what its program ids are, and what a program instance does.

    grid: axes of the launch, fastest first, such as ("q", "head", "batch"); a tile axis counts tiles, others ones.
    sections: the launch may take heads in sections that fit a cache, and tile by tile all heads of a section.
    Kernels over sequences have "tile" (described by `tiles`) or "turn" (sequences, longest first) instead.
    """

    name: str
    params: tuple[Param, ...]
    scalars: tuple[Var, ...]
    grid: tuple[str, ...]
    order: tuple[str, ...]
    tile: tuple[tuple[str, int], ...]  # block sizes of "q" and "kv"; columns of "d" and "dv"
    body: tuple[Stmt, ...]
    header: tuple[str, ...] = ()
    heavy_last: bool = False  # later tiles of the first grid axis have more work: hand them out first
    lanes: Lanes = Lanes.QUERIES
    tables: tuple[TileTable, ...] = ()
    first_columns: tuple[tuple[str, int], ...] = ()  # where pieces of "d", "dv" begin if not at 0
    sections: bool = False
    tiles: TileGrid | None = None

    def param(self, name: str) -> Param:
        return next(p for p in self.params if p.name == name)

    @property
    def chooses(self) -> bool:
        """Whether it keeps the best candidates of rows."""
        return any(isinstance(s, Choose) for s in walk(self.body))

    def block(self, axis: str) -> int:
        return dict(self.tile)[axis]

    def first_column(self, axis: str) -> int:
        """Where the columns of "d", "dv" or of one of their pieces begin."""
        return dict(self.first_columns).get(axis, 0)


@dataclass(frozen=True, slots=True)
class Module:
    """The kernels of one direction, in the order in which they run."""

    name: str
    kernels: tuple[Kernel, ...]

    def kernel(self, name: str) -> Kernel:
        return next(k for k in self.kernels if k.name == name)


def walk(body: tuple[Stmt, ...]) -> Iterator[Stmt]:
    """Every statement, outer before inner."""
    for s in body:
        yield s
        if isinstance(s, Loop | If):
            yield from walk(s.body)


def expressions(s: Stmt) -> tuple[Expr, ...]:
    """The expressions that a statement itself evaluates, not those of its body."""
    match s:
        case Let(_, value):
            return (value,)
        case Loop(_, lo, hi):
            return (lo, hi)
        case If(condition):
            return (condition,)
        case StoreTile(_, indices, value) | Accumulate(_, indices, value):
            return (*indices, value)
        case Narrow(_, _, first, length, page):
            return (first, length) if page is None else (first, length, page)
        case Choose(row=row, value=value, place=place):
            return (*row, value, *place)
        case Section():
            return ()


def map_expressions(body: tuple[Stmt, ...], change: Callable[[Expr], Expr]) -> tuple[Stmt, ...]:
    """The same statements with every expression replaced by change(expression)."""
    done: list[Stmt] = []
    for s in body:
        match s:
            case Let(_, value):
                done.append(replace(s, value=change(value)))
            case Loop(_, lo, hi, _, inner, _, following):
                then = None if following is None else change(following)
                inner = map_expressions(inner, change)
                done.append(replace(s, lo=change(lo), hi=change(hi), body=inner, following=then))
            case If(condition, inner):
                done.append(replace(s, condition=change(condition), body=map_expressions(inner, change)))
            case StoreTile(tensor, indices, value):
                done.append(StoreTile(tensor, tuple(change(i) for i in indices), change(value)))
            case Accumulate(tensor, indices, value):
                done.append(Accumulate(tensor, tuple(change(i) for i in indices), change(value)))
            case Narrow(_, _, first, length, page):
                page = page if page is None else change(page)
                done.append(replace(s, first=change(first), length=change(length), page=page))
            case Choose(row=row, value=value, place=place):
                row, place = tuple(change(i) for i in row), tuple(change(i) for i in place)
                done.append(replace(s, row=row, value=change(value), place=place))
            case Section():
                done.append(s)
    return tuple(done)

"""Kernels over sequences of their own lengths: any lowered kernel, once more over tables instead of a regular batch.

A kernel speaks of one batch at a time, of its rows by position, and of `q_len` and `kv_len`. So nothing of it changes
but where it begins: the sequence is read from a table, the lengths become those of the sequence, and the tensors are
narrowed to its rows. A grid of equal tiles becomes one of the tiles that there are, all those of a sequence's first
head, of its second head, and so on, then those of the next sequence: neighbours read the same keys.

    batch = tile_list[tile // heads]
    place = tile - tile_ranges[batch, 0] * heads
    head = place // tile_ranges[batch, 1]
    q_first, q_len = q_spans[batch, 0], q_spans[batch, 1]
    Q = q_len rows of Q from q_first on
    q_start = place % tile_ranges[batch, 1] * 64

Where rows of sequences lie anywhere (`Sequences.listed`), tables name them:

    Q = q_len rows of Q that q_places names from q_first on
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from attn_engine.codegen.lower.scaled import scale_param
from attn_engine.codegen.lower.values import INT, KV_LEN, Q_LEN, scalar
from attn_engine.ir.expr import Const, Expr, Load, Var, loads, substitute, variables
from attn_engine.ir.ops import Storage
from attn_engine.ir.passes.unread import without_unread
from attn_engine.ir.program import BATCH
from attn_engine.ir.tile import (
    Accumulate,
    If,
    Kernel,
    Let,
    Loop,
    Narrow,
    Param,
    Section,
    Stmt,
    TileGrid,
    expressions,
    map_expressions,
    walk,
)

AXES = ("q", "kv")
TILE, TURN, TILE_COUNT, TILE_START = (scalar(name) for name in ("tile", "turn", "tile_count", "tile_start"))
PLACE, TILES = scalar("place"), scalar("tiles_of_head")
TILE_LIST, TILE_RANGES, ORDER = "tile_list", "tile_ranges", "sequence_order"
LONGEST_Q, LONGEST_KV = scalar("longest_q"), scalar("longest_kv")
LONGEST: dict[Expr, Expr] = {Q_LEN: LONGEST_Q, KV_LEN: LONGEST_KV}


def spans_param(axis: str) -> str:
    """Where the rows of each sequence lie: int32 (batches, 2), the first row and how many there are."""
    return f"{axis}_spans"


def places_param(axis: str) -> str:
    """Which rows the sequences have, one after the other: int32 (rows of all sequences,)."""
    return f"{axis}_places"


# Tensors of whole rows: those stay where they are when rows are listed.
OF_PLACES = {
    "q": ("Q", "O", "dO", "dQ", "dQ_parts", "dQ_sums"),
    "kv": ("K", "V", "dK", "dV", "dK_parts", "dV_parts"),
}
TABLES = {
    spans_param("q"): ("batches", "span"),
    spans_param("kv"): ("batches", "span"),
    **{places_param(axis): (f"{axis}_places_size_0",) for axis in AXES},
    TILE_LIST: ("tile_count",),
    TILE_RANGES: ("batches", "span"),
    ORDER: ("batches",),
}


def over_sequences(kernel: Kernel, dense: Iterable[str] = (), listed: bool = False) -> Kernel:
    """The kernel for a call that brings sequences.

    dense: tensors with rows that stay as they are, (batches, ..., rows of the longest sequence, ...).
    listed: tables name the rows of sequences.
    """
    return _Sequences(kernel, frozenset(dense), listed).kernel()


def narrowed_tensors(kernel: Kernel) -> dict[str, int]:
    """The tensors of which a kernel sees one sequence, and which of their dimensions is the batch."""
    narrowed = (s for s in walk(kernel.body) if isinstance(s, Narrow) and s.page is None)
    names = dict.fromkeys(s.tensor for s in narrowed)
    present = {p.name for p in kernel.params}
    names |= dict.fromkeys(
        s for s in map(scale_param, list(names)) if s in present
    )  # narrowed with their tensors
    return {name: kernel.param(name).shape.index("batches") for name in names}


class _Sequences:
    def __init__(self, kernel: Kernel, dense: frozenset[str], listed: bool) -> None:
        self.old, self.listed = kernel, listed
        self.axis = next((a for a in AXES if a in kernel.grid), None)
        self.rows = [
            (p.name, axis)
            for p in kernel.params
            for axis in AXES
            if f"{axis}_len" in p.shape and p.name not in dense
        ]
        self.by_diagonal = {p.name for p in kernel.params if "diagonals" in p.shape}

    def kernel(self) -> Kernel:
        old, axis = self.old, self.axis
        body = _with_longest_diagonals(old.body, self.by_diagonal)
        title = Section("sequence of this program")
        grid, tiles = old.grid, None
        if "batch" not in old.grid:
            body = self.inside(body, axis)
            if axis is not None:
                tiles = TileGrid(axis, old.block(axis), None)
                grid = tuple("tile" if a == axis else a for a in grid)
                body = (_start(TILE * old.block(axis)), *body)
        elif axis is None:
            grid = tuple("turn" if a == "batch" else a for a in grid)
            body = (title, Let(BATCH.name, Load(ORDER, INT, (TURN,))), *self.entered(), *body)
        else:
            head = next(a for a in grid if a in ("head", "kv_head"))
            tiles = TileGrid(axis, old.block(axis), f"{head}s")
            grid = tuple("tile" if a == axis else a for a in grid if a not in (head, "batch"))
            own = self.tile(axis, body)
            body = (title, *self.tile_of_list(axis, head), *self.entered(), own)
        found = replace(old, body=body, grid=grid, heavy_last=False, sections=False, tiles=tiles)
        return self.with_tables(without_unread(found))

    def tile_of_list(self, axis: str, head: str) -> list[Stmt]:
        """The sequence, the head and the tile of this program."""
        heads = scalar(f"{head}s")
        tile = PLACE % TILES
        if self.old.heavy_last:  # the last tile of a head has the most work
            tile = TILES - 1 - tile
        return [
            Let(BATCH.name, Load(TILE_LIST, INT, (TILE // heads,))),
            Let(PLACE.name, TILE - Load(TILE_RANGES, INT, (BATCH, Const(0))) * heads),
            Let(TILES.name, Load(TILE_RANGES, INT, (BATCH, Const(1)))),
            Let(head, PLACE // TILES),
            _start(tile * self.old.block(axis)),
        ]

    def with_tables(self, kernel: Kernel) -> Kernel:
        """With the tables and the numbers that it reads now, and the count of its tiles."""
        every = [e for s in walk(kernel.body) for e in expressions(s)]
        tensors = {x.tensor for e in every for x in loads(e)}
        tensors |= {s.places for s in walk(kernel.body) if isinstance(s, Narrow) and s.places}
        numbers = {v for e in every for v in variables(e)}
        tables = tuple(Param(n, Storage.INT32, shape) for n, shape in TABLES.items() if n in tensors)
        more: list[Var] = [x for x in (LONGEST_Q, LONGEST_KV) if x in numbers]
        more += [TILE_COUNT] if kernel.tiles else []
        outputs = tuple(p for p in kernel.params if p.output)
        inputs = tuple(p for p in kernel.params if not p.output)
        return replace(kernel, params=(*inputs, *tables, *outputs), scalars=(*kernel.scalars, *more))

    def entered(self) -> list[Stmt]:
        """What stands where the sequence becomes known: its rows and its lengths."""
        lets: list[Stmt] = []
        for axis in AXES:
            spans = spans_param(axis)
            lets.append(Let(f"{axis}_first", Load(spans, INT, (BATCH, Const(0)))))
            lets.append(Let(f"{axis}_len", Load(spans, INT, (BATCH, Const(1)))))
        return [*lets, *(self.narrowed(name, axis) for name, axis in self.rows)]

    def narrowed(self, name: str, axis: str) -> Narrow:
        places = places_param(axis) if self.listed and name in OF_PLACES[axis] else None
        return Narrow(name, axis, scalar(f"{axis}_first"), scalar(f"{axis}_len"), places=places)

    def tile(self, axis: str, body: tuple[Stmt, ...]) -> Loop:
        """The tile that begins at `tile_start`."""
        return Loop(f"{axis}_start", TILE_START, TILE_START + self.old.block(axis), axis, body)

    def inside(self, body: tuple[Stmt, ...], axis: str | None) -> tuple[Stmt, ...]:
        """A body around the loop over batches; `axis`: whose tile is known before that."""
        done: list[Stmt] = []
        for s in body:
            if isinstance(s, Loop) and s.var == BATCH.name:
                own = s.body
                if axis is not None:  # shorter sequences have no such tile
                    own = (If(scalar(f"{axis}_len") > TILE_START, (self.tile(axis, own),)),)
                done.append(replace(s, body=(*self.entered(), *own)))
            elif isinstance(s, Loop) and s.axis is not None and _holds_batches(s):
                n, block = self.old.block(s.axis), scalar(f"{s.axis}_block")
                inner = (_start(block * n), *self.inside(s.body, s.axis))
                lo, hi = (substitute(x // n, LONGEST) for x in (s.lo, s.hi))
                done.append(Loop(block.name, lo, hi, None, inner))
            elif isinstance(s, Loop | If) and _holds_batches(s):
                own = self.inside(s.body, axis)
                done += [
                    replace(x, body=own)
                    for x in _of_longest((replace(s, body=()),))
                    if isinstance(x, Loop | If)
                ]
            else:
                done += _of_longest((s,))
        return tuple(done)


def _start(value: Expr) -> Let:
    return Let(TILE_START.name, value)


def _holds_batches(s: Loop | If) -> bool:
    return any(isinstance(x, Loop) and x.var == BATCH.name for x in walk(s.body))


def _of_longest(body: tuple[Stmt, ...]) -> tuple[Stmt, ...]:
    """Statements outside of any sequence: lengths are those of the longest."""
    return map_expressions(body, lambda e: substitute(e, LONGEST))


def _with_longest_diagonals(body: tuple[Stmt, ...], tensors: set[str]) -> tuple[Stmt, ...]:
    """Diagonals are counted alike in every sequence."""
    done: list[Stmt] = []
    for s in body:
        if isinstance(s, Loop | If):
            s = replace(s, body=_with_longest_diagonals(s.body, tensors))
        elif isinstance(s, Accumulate) and s.tensor in tensors:
            s = replace(s, indices=tuple(substitute(i, LONGEST) for i in s.indices))
        done.append(s)
    return tuple(done)

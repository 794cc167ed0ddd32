"""One lowering for every linear attention: the forward pass over chunks, and what both directions begin with.

With chunk start state S, G the running sum of the decays in the chunk, Q and W rows of reads and writes:

    A = gram(Q, W)                 V' = V, corrected: (I + gram(E, W)) V' = V - (E e^G) S
    O = (Q e^G) S + A V'           S_end = e^{G_end} S + (W e^{G_end - G})^T V'
"""

from __future__ import annotations

from dataclasses import dataclass

from attn_engine.ir.chunk import (
    STATE,
    ChunkKernel,
    ChunkStmt,
    Decays,
    Diagonal,
    Gram,
    Product,
    RowOutput,
    Rows,
    Scale,
    Section,
    Solve,
    StateStep,
    Tile,
    TokenStep,
    Within,
)
from attn_engine.ir.expr import Const, Expr, substitute
from attn_engine.ir.linear import WEIGHT_SUM, LinearProgram, Rank

QUERIES = Tile("queries", ("t", "d"))
KEYS = Tile("keys", ("t", "d"))
VALUES = Tile("values", ("t", "v"))
ERASERS = Tile("erasers", ("t", "d"))
BONUSES = Tile("bonuses", ("t", "d"))
WEIGHTS = Tile("weights", ("t", "t"))
ERASED = Tile("erased", ("t", "t"))
OUT = Tile("out", ("t", "v"))


@dataclass(frozen=True, slots=True)
class DecayTiles:
    """The decays of a chunk and what follows from them."""

    decays: Tile
    sums: Tile
    steps: Tile | None
    reads: Tile
    erases: Tile
    writes: Tile
    whole: Tile
    exclusive: bool

    def within(self, exclusive: bool) -> Within:
        return Within(self.decays, self.sums, self.steps, exclusive)


def decay_tiles(program: LinearProgram) -> DecayTiles | None:
    """None where nothing decays."""
    if program.rank is Rank.NONE:
        return None
    vector = program.rank is Rank.VECTOR
    axes = ("t", "d") if vector else ("t",)
    erases = Tile("decay_erases", axes)
    return DecayTiles(
        decays=Tile("decays", axes),
        sums=Tile("decay_sums", axes),
        steps=Tile("decay_steps", axes) if vector else None,
        reads=Tile("decay_reads", axes) if program.exclusive or not program.corrected else erases,
        erases=erases,
        writes=Tile("decay_writes", axes),
        whole=Tile("decay_whole", axes[1:]),
        exclusive=program.exclusive,
    )


def scaled(x: Tile, by: Tile | None) -> tuple[Tile, tuple[ChunkStmt, ...]]:
    """x times a factor of its rows, and what computes it; x itself where there is no factor."""
    if by is None:
        return x, ()
    product = Tile(f"{x.name}_decayed", x.axes)
    return product, (Scale(product, x, by),)


def features(program: LinearProgram, reading: bool) -> tuple[ChunkStmt, ...]:
    """The rows that the mods make of a chunk's tokens; `reading`: also those that only an output needs."""
    decays = decay_tiles(program)
    wanted: list[tuple[Tile, Expr | None]] = [(KEYS, program.write), (VALUES, program.value)]
    if decays is not None:
        wanted.insert(0, (decays.decays, program.decay))
    if program.corrected:
        wanted.append((ERASERS, program.erase))
    if reading:
        wanted.insert(0, (QUERIES, program.query))
        if program.bonus is not None:
            wanted.append((BONUSES, program.bonus))
    values = tuple((tile, value) for tile, value in wanted if value is not None)
    last = ((VALUES, Const(1.0)),) if program.divisor is not None else ()
    rows = Rows(values, last=last, fault=decays.decays if decays else None)
    return (Section("the chunk's rows"), rows, *_decay_factors(program, reading))


def _decay_factors(program: LinearProgram, reading: bool) -> tuple[ChunkStmt, ...]:
    tiles = decay_tiles(program)
    if tiles is None:
        return ()
    return (
        Section("what is left of a step by another: never more than 1"),
        Decays(
            tiles.decays,
            tiles.sums,
            tiles.steps if reading or program.corrected else None,
            tiles.reads if reading and tiles.reads is not tiles.erases else None,
            tiles.erases if program.corrected else None,
            tiles.writes,
            tiles.whole,
            program.exclusive,
        ),
    )


def corrected_values(program: LinearProgram) -> tuple[ChunkStmt, ...]:
    """What is written: values less what the state before them already gives for their erasers."""
    if not program.corrected:
        return ()
    tiles = decay_tiles(program)
    erasers, scale = scaled(ERASERS, tiles.erases if tiles else None)
    return (
        Section("values without what the state already holds"),
        *scale,
        Gram(ERASED, ERASERS, KEYS, tiles.within(False) if tiles else None, strict=True),
        Product(VALUES, erasers, STATE, add=True, negative=True),
        Solve(VALUES, ERASED),
    )


def state_step(program: LinearProgram) -> tuple[ChunkStmt, ...]:
    tiles = decay_tiles(program)
    keys, scale = scaled(KEYS, tiles.writes if tiles else None)
    return (
        Section("the state after the chunk"),
        *scale,
        StateStep(STATE, keys, VALUES, tiles.whole if tiles else None),
    )


def weights(program: LinearProgram) -> tuple[ChunkStmt, ...]:
    """How much each token of the chunk reads of each."""
    tiles = decay_tiles(program)
    within = tiles.within(program.exclusive) if tiles else None
    found: list[ChunkStmt] = [
        Section("what the tokens read of each other"),
        Gram(WEIGHTS, QUERIES, KEYS, within, strict=program.exclusive),
    ]
    if program.bonus is not None:
        found.append(Diagonal(WEIGHTS, QUERIES, BONUSES))
    return tuple(found)


def outputs(program: LinearProgram) -> tuple[ChunkStmt, ...]:
    tiles = decay_tiles(program)
    queries, scale = scaled(QUERIES, tiles.reads if tiles else None)
    return (*scale, Product(OUT, queries, STATE), Product(OUT, WEIGHTS, VALUES, add=True))


def output_row(program: LinearProgram) -> Expr:
    """A token's row of the output."""
    if program.divisor is None:
        return OUT.var
    return OUT.var / substitute(program.divisor, {WEIGHT_SUM: OUT.last})


def lower_chunked_forward(program: LinearProgram) -> ChunkKernel:
    """o of every token, and the state after the last."""
    body = (
        *features(program, reading=True),
        *corrected_values(program),
        *weights(program),
        *outputs(program),
        Rows(writes=(RowOutput("O", output_row(program), ("q", "dv")),)),
        *state_step(program),
    )
    return ChunkKernel("linear_forward", program, body)


def lower_token_step(program: LinearProgram) -> ChunkKernel:
    """o of one token, and the state after it: what a decode step does."""
    rows = next(s for s in features(program, reading=True) if isinstance(s, Rows))
    tiles = decay_tiles(program)
    step = TokenStep(
        to=OUT,
        state=STATE,
        query=QUERIES,
        key=KEYS,
        value=VALUES,
        decay=tiles.decays if tiles else None,
        eraser=ERASERS if program.corrected else None,
        bonus=BONUSES if program.bonus is not None else None,
        exclusive=program.exclusive,
    )
    output = Rows(writes=(RowOutput("O", output_row(program), ("q", "dv")),))
    body = (Section("the token's rows"), rows, Section("its step"), step, output)
    return ChunkKernel("linear_step", program, body)


def lower_chunked_scan(program: LinearProgram) -> tuple[ChunkStmt, ...]:
    """The states alone, for the backward pass."""
    return (*features(program, reading=False), *corrected_values(program), *state_step(program))

"""The backward pass of a linear attention over chunks, from the last to the first.

Given dO and the gradient of the state after the chunk, with the names of chunked.py:

    dV' = A^T dO + (W e^{..}) dS           dA = dO V'^T
    dQ  = e^G (dO S^T) + gram gradient     dW = e^{..} (V' dS^T) + gram gradient
    dS_start = e^{G_end} dS + (Q e^G)^T dO
    corrected: dV = (I + L)^-T dV',  dL = -dV V'^T,  dE = -e^G (dV S^T) + gram gradient,  dS_start -= (E e^G)^T dV
"""

from __future__ import annotations

from collections.abc import Sequence

from attn_engine.codegen.lower.chunked import (
    BONUSES,
    ERASED,
    ERASERS,
    KEYS,
    OUT,
    QUERIES,
    VALUES,
    WEIGHTS,
    corrected_values,
    decay_tiles,
    features,
    lower_chunked_scan,
    output_row,
    outputs,
    scaled,
    weights,
)
from attn_engine.ir.chunk import (
    D_STATE,
    STATE,
    CarriedGradient,
    ChunkKernel,
    ChunkStmt,
    DiagonalGradient,
    Gram,
    GramGradient,
    Product,
    RowOutput,
    Rows,
    Scale,
    Section,
    Solve,
    StateStep,
    Tile,
)
from attn_engine.ir.expr import Expr, Load, Var, loads
from attn_engine.ir.linear import BETA, KEY, QUERY, VALUE, LinearProgram, decay_var
from attn_engine.ir.ops import DType
from attn_engine.ir.passes.mod_gradients import row_gradients

D_OUT = Tile("d_out", ("t", "v"))
D_QUERIES = Tile("d_queries", ("t", "d"))
D_KEYS = Tile("d_keys", ("t", "d"))
D_VALUES = Tile("d_values", ("t", "v"))
D_ERASERS = Tile("d_erasers", ("t", "d"))
D_BONUSES = Tile("d_bonuses", ("t", "d"))
D_WEIGHTS = Tile("d_weights", ("t", "t"))
D_ERASED = Tile("d_erased", ("t", "t"))

# A token's row of the gradient of the output.
D_OUTPUT = Var("d_output", DType.FLOAT, ("q", "dv"))
# What a call's tensors are called where their gradients are wanted.
INPUTS = {"q": QUERY, "k": KEY, "v": VALUE, "beta": BETA}


def captured_reads(program: LinearProgram) -> tuple[Load, ...]:
    """The reads of captured floating tensors, each once: what gradients of captured tensors are sums of."""
    floating = {c.name for c in program.captures if c.storage.floating}
    found = dict.fromkeys(x for f in program.functions for x in loads(f) if x.tensor in floating)
    return tuple(found)


def lower_chunked_backward(program: LinearProgram, wanted: Sequence[str]) -> ChunkKernel:
    """Gradients of those of q, k, v, decay, beta that are `wanted`, and of every read of captured tensors that are."""
    body = (
        *features(program, reading=True),
        *corrected_values(program),
        *weights(program),
        *_output_gradient(program),
        *_through_output(program),
        *_through_correction(program),
        Section("back through the mods"),
        Rows(writes=_row_outputs(program, wanted)),
    )
    return ChunkKernel("linear_backward", program, lower_chunked_scan(program), body)


def _output_gradient(program: LinearProgram) -> tuple[ChunkStmt, ...]:
    """The gradient of the rows before they were divided."""
    if program.divisor is None:
        return (Section("the gradient of the output"), Rows(((D_OUT, D_OUTPUT),)))
    row, last = row_gradients(((output_row(program), D_OUTPUT),), (OUT.var, OUT.last))
    assert row is not None
    assert last is not None
    return (
        Section("the gradient of the output, before its division"),
        *outputs(program),
        Rows(((D_OUT, row),), last=((D_OUT, last),)),
    )


def _through_output(program: LinearProgram) -> tuple[ChunkStmt, ...]:
    tiles = decay_tiles(program)
    queries, scale_queries = scaled(QUERIES, tiles.reads if tiles else None)
    keys, scale_keys = scaled(KEYS, tiles.writes if tiles else None)
    found: list[ChunkStmt] = [
        Section("what the values, and the state across chunks, have done"),
        *scale_queries,
        *scale_keys,
        Product(D_VALUES, WEIGHTS, D_OUT, upper=True),
        Product(D_VALUES, keys, D_STATE, add=True),
        Product(D_QUERIES, D_OUT, STATE, turned=True),
        Product(D_KEYS, VALUES, D_STATE, turned=True),
    ]
    if tiles is not None:
        found += [Scale(D_QUERIES, D_QUERIES, tiles.reads), Scale(D_KEYS, D_KEYS, tiles.writes)]
    if not program.corrected:
        found += _carried(program, ())
    found += [
        Section("the weights inside the chunk"),
        Gram(D_WEIGHTS, D_OUT, VALUES, None, strict=program.exclusive and program.bonus is None),
    ]
    if program.corrected:
        found += [
            Section("the corrected values"),
            Solve(D_VALUES, ERASED, turned=True),
            Product(D_ERASERS, D_VALUES, STATE, negative=True, turned=True),
        ]
        if tiles is not None:
            found.append(Scale(D_ERASERS, D_ERASERS, tiles.erases))
        found += _carried(program, ((ERASERS, D_ERASERS, False),))
    if program.bonus is not None:
        found.append(DiagonalGradient(D_WEIGHTS, QUERIES, BONUSES, D_QUERIES, D_BONUSES))
    within = tiles.within(program.exclusive) if tiles else None
    found += [
        GramGradient(
            D_WEIGHTS,
            WEIGHTS,
            QUERIES,
            KEYS,
            D_QUERIES,
            D_KEYS,
            within,
            _d_decays(program),
            program.exclusive,
        ),
        StateStep(D_STATE, queries, D_OUT, tiles.whole if tiles else None),
    ]
    return tuple(found)


def _carried(program: LinearProgram, erasers: tuple[tuple[Tile, Tile, bool], ...]) -> tuple[ChunkStmt, ...]:
    tiles = decay_tiles(program)
    d_decays = _d_decays(program)
    if tiles is None or d_decays is None:
        return ()
    reads = ((QUERIES, D_QUERIES, program.exclusive), *erasers)
    return (
        Section("the decay: every pair of tokens, and of token and state, that it lies between"),
        CarriedGradient(d_decays, reads, (KEYS, D_KEYS), STATE, D_STATE, tiles.whole),
    )


def _d_decays(program: LinearProgram) -> Tile | None:
    tiles = decay_tiles(program)
    return None if tiles is None else Tile("d_decays", tiles.decays.axes)


def _through_correction(program: LinearProgram) -> tuple[ChunkStmt, ...]:
    if not program.corrected:
        return ()
    tiles = decay_tiles(program)
    erasers, _ = scaled(ERASERS, tiles.erases if tiles else None)
    within = tiles.within(False) if tiles else None
    return (
        Section("the weights of the correction"),
        Gram(D_ERASED, D_VALUES, VALUES, None, strict=True, negative=True),
        GramGradient(
            D_ERASED, ERASED, ERASERS, KEYS, D_ERASERS, D_KEYS, within, _d_decays(program), strict=True
        ),
        StateStep(D_STATE, erasers, D_VALUES, None, negative=True),
    )


def _row_outputs(program: LinearProgram, wanted: Sequence[str]) -> tuple[RowOutput, ...]:
    """The gradients of a token's inputs: the sum of what every function makes of its part."""
    d_decays = _d_decays(program)
    seeds: tuple[tuple[Expr | None, Tile | None], ...] = (
        (program.query, D_QUERIES),
        (program.write, D_KEYS),
        (program.value, D_VALUES),
        (program.erase, D_ERASERS),
        (program.bonus, D_BONUSES),
        (program.decay, d_decays),
    )
    results: list[tuple[Expr, Expr]] = [
        (f, tile.var) for f, tile in seeds if f is not None and tile is not None
    ]
    if program.divisor is not None:
        results.append((output_row(program), D_OUTPUT))
    inputs: list[tuple[str, Expr]] = [(f"d_{n}", var) for n, var in INPUTS.items() if n in wanted]
    if "decay" in wanted:
        inputs.append(("d_decay", decay_var(program.decay_given)))
    reads = [x for x in captured_reads(program) if x.tensor in wanted]
    inputs += [(read_gradient(program, x), x) for x in reads]
    found = row_gradients(results, [e for _, e in inputs])
    return tuple(
        RowOutput(name, d, e.axes) for (name, e), d in zip(inputs, found, strict=True) if d is not None
    )


def read_gradient(program: LinearProgram, read: Load) -> str:
    """The tensor that the gradient of one read of a captured tensor is written to."""
    return f"d_{read.tensor}_{captured_reads(program).index(read)}"

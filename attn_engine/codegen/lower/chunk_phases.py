"""A chunk kernel as phases, for machines that fill up with programs: the states at the start of every chunk first, one
chunk after the other, then everything else, all chunks at once.

Nothing is lowered anew: a phase is a kernel's statements without those that its results don't depend on.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from attn_engine.codegen.lower.chunked import lower_chunked_forward, lower_chunked_scan
from attn_engine.ir.chunk import (
    D_STATE,
    STATE,
    CarriedGradient,
    ChunkKernel,
    ChunkStmt,
    Decays,
    Diagonal,
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
    tiles_of,
)
from attn_engine.ir.expr import Expr, Reduce, postorder, variables
from attn_engine.ir.linear import LinearProgram


@dataclass(frozen=True, slots=True)
class ChunkPhase:
    """What one program instance does, for one head.

    carried: STATE for all chunks of a sequence in order, D_STATE for all from the last to the first: it is written down
    before each chunk and at the end. None: for one chunk, with the states written down for it.
    given: the states that it reads.
    reports: tokens whose decay is none are looked for.
    """

    name: str
    program: LinearProgram
    body: tuple[ChunkStmt, ...]
    carried: Tile | None
    given: tuple[Tile, ...] = ()
    reports: bool = False

    @property
    def outputs(self) -> tuple[RowOutput, ...]:
        """The tensors that rows are written to."""
        return tuple(w for s in self.body if isinstance(s, Rows) for w in s.writes)

    def tiles(self) -> tuple[Tile, ...]:
        """Every tile that the statements name, once."""
        return tuple(dict.fromkeys(t for s in self.body for t in tiles_of(s)))


def states_phase(program: LinearProgram, reports: bool) -> ChunkPhase:
    """The state before every chunk, and after the last."""
    body = _needed(lower_chunked_scan(program), {STATE.name}, writes=False)
    return ChunkPhase("linear_states", program, body, STATE, (), reports and program.decay is not None)


def output_phase(program: LinearProgram) -> ChunkPhase:
    """o of every token."""
    body = _needed(lower_chunked_forward(program).scan, set(), writes=True)
    return ChunkPhase("linear_output", program, body, None, (STATE,))


def state_gradients_phase(kernel: ChunkKernel) -> ChunkPhase:
    """The gradient of the state after every chunk, and of that before the first."""
    body = _needed(kernel.gradient, {D_STATE.name}, writes=False)
    given = tuple(t for t in (STATE,) if any(t in tiles_of(s) for s in body) or _reads_by_name(body, t))
    return ChunkPhase("linear_state_gradients", kernel.program, body, D_STATE, given)


def gradients_phase(kernel: ChunkKernel) -> ChunkPhase:
    """The gradients of what a token's functions read."""
    body = _needed(kernel.gradient, set(), writes=True)
    given = tuple(t for t in (STATE, D_STATE) if any(t in tiles_of(s) for s in body))
    return ChunkPhase("linear_gradients", kernel.program, body, None, given)


def columns_are_independent(program: LinearProgram) -> bool:
    """Whether programs may share the columns of the state: no function reads a whole row of v at once."""
    return not any(isinstance(e, Reduce) and e.axis == "dv" for f in program.functions for e in postorder(f))


def _reads_by_name(body: tuple[ChunkStmt, ...], tile: Tile) -> bool:
    return any(tile.name in names_read(s) for s in body)


def _needed(body: tuple[ChunkStmt, ...], results: set[str], *, writes: bool) -> tuple[ChunkStmt, ...]:
    """The statements that these tiles at the end depend on; `writes`: and the tensors that rows are written to."""
    live, kept = set(results), list[ChunkStmt]()
    for s in reversed(body):
        found = _part(s, live, writes)
        if found is None:
            continue
        kept.append(found)
        live -= _made(found)
        live |= names_read(found)
    return tuple(_without_empty_sections(kept[::-1]))


def _part(s: ChunkStmt, live: set[str], writes: bool) -> ChunkStmt | None:
    """As much of a statement as is needed."""
    match s:
        case Section():
            return s
        case Rows(values, outputs, last):
            kept = tuple((t, e) for t, e in values if t.name in live)
            columns = tuple((t, e) for t, e in last if _last(t) in live)
            found = Rows(kept, outputs if writes else (), columns, s.fault if kept else None)
            return found if found.values or found.writes or found.last else None
        case Decays(_, sums, steps, reads, erases, left, whole):
            made = (sums, steps, reads, erases, left, whole)
            if not any(t is not None and t.name in live for t in made):
                return None
            return replace(
                s,
                steps=steps if steps and steps.name in live | _names_if(s, live) else None,
                reads=reads if reads and reads.name in live else None,
                erases=erases if erases and erases.name in live else None,
            )
        case _:
            return s if _changed(s) & live else None


def _names_if(s: Decays, live: set[str]) -> set[str]:
    """The factors of a vector are products of the steps of single tokens."""
    vector = "d" in s.decay.axes
    factors = {t.name for t in (s.reads, s.erases, s.writes, s.whole) if t is not None}
    return {s.steps.name} if vector and s.steps and factors & live else set()


def _last(tile: Tile) -> str:
    return tile.last.name


def _changed(s: ChunkStmt) -> set[str]:
    """Names of the tiles that a statement sets or adds to."""
    match s:
        case Rows(values, _, last):
            return {t.name for t, _ in values} | {_last(t) for t, _ in last}
        case Decays(_, sums, steps, reads, erases, left, whole):
            return {t.name for t in (sums, steps, reads, erases, left, whole) if t is not None}
        case StateStep(state):
            return {state.name}
        case CarriedGradient(d_decay):
            return {d_decay.name}
        case GramGradient():
            d_decay = s.d_decay
            return {s.d_x.name, s.d_y.name} | ({d_decay.name} if d_decay is not None else set())
        case DiagonalGradient():
            return {s.d_x.name, s.d_y.name}
        case Scale(to) | Gram(to) | Diagonal(to) | Product(to) | Solve(to):
            return {to.name} | ({_last(to)} if to.axes == ("t", "v") else set())
        case _:
            return set()


def _made(s: ChunkStmt) -> set[str]:
    """Those whose value before the statement plays no part."""
    reads = names_read(s)
    return {name for name in _changed(s) if name not in reads}


def names_read(s: ChunkStmt) -> set[str]:
    """Names of the tiles that a statement reads; what it adds to is read."""
    match s:
        case Section():
            return set()
        case Rows():
            functions: list[Expr] = [e for _, e in (*s.values, *s.last)] + [w.value for w in s.writes]
            return {v.name for f in functions for v in variables(f)}
        case Decays(decay):
            return {decay.name}
        case Product(to, a, b):
            return {t.name for t in ((a, b, to) if s.add else (a, b))} | _lasts(a, b)
        case Scale(_, x, by):
            return {x.name, by.name}
        case Gram(to):
            return {t.name for t in tiles_of(s) if t is not to} | _lasts(s.x, s.y)
        case CarriedGradient(d_decay):
            return {t.name for t in tiles_of(s) if t is not d_decay}
        case DiagonalGradient():
            return {t.name for t in tiles_of(s) if t is not s.d_y}
        case _:
            return {t.name for t in tiles_of(s)} | _lasts(*tiles_of(s))


def _lasts(*tiles: Tile) -> set[str]:
    """The columns beyond those of v go with their tiles."""
    return {_last(t) for t in tiles if t.axes == ("t", "v")}


def _without_empty_sections(body: list[ChunkStmt]) -> list[ChunkStmt]:
    following = [*body[1:], Section("")]
    return [
        s for s, after in zip(body, following, strict=True) if not isinstance(s, Section) or _is_work(after)
    ]


def _is_work(s: ChunkStmt) -> bool:
    return not isinstance(s, Section)

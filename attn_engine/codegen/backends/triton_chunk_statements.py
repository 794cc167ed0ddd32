"""Triton of the statements of a chunk program: products of tiles, and calls of include/chunk.triton.

A matrix of tokens is held [i][j]: a row for each token that reads. What tiles of v have beyond its columns, where a
normaliser has its sums, are vectors of their own.
"""

from __future__ import annotations

from attn_engine.codegen.backends.triton_chunk_rows import ChunkRows
from attn_engine.codegen.backends.triton_types import TYPES
from attn_engine.codegen.lower.chunked import OUT, VALUES
from attn_engine.codegen.lower.chunked_backward import D_OUT
from attn_engine.ir.chunk import (
    D_STATE,
    STATE,
    CarriedGradient,
    ChunkStmt,
    Decays,
    Diagonal,
    DiagonalGradient,
    Gram,
    GramGradient,
    Product,
    Rows,
    Scale,
    Section,
    Solve,
    StateStep,
    Tile,
    Within,
)

_WITH_LAST = (VALUES, OUT, D_OUT, STATE, D_STATE)


class ChunkStatements(ChunkRows):
    """Prints statements; the file around them is triton_chunk.py's."""

    live: set[str]  # tiles that some statement of the phase reads
    _inverses: dict[Tile, str]

    def lines_of(self, s: ChunkStmt) -> list[str]:
        """The lines of a statement."""
        match s:
            case Section(title):
                return ["", f"# -- {title}"]
            case Rows():
                return self.rows(s)
            case Decays():
                lines = self._vector_decays(s) if self.vector else self._decays(s)
            case Scale(to, x, by):
                lines = [f"{to.name} = {x.name} * {by.name}{'' if len(by.axes) == 2 else '[:, None]'}"]
            case CarriedGradient():
                lines = self._carried(s)
            case GramGradient():
                lines = self._gram_gradient(s)
            case DiagonalGradient(d_matrix, x, y, d_x, d_y):
                lines = [
                    f"on_token = tl.sum(tl.where(on_diagonal(), {d_matrix.name}, 0.0), 1)[:, None]",
                    f"{d_x.name} += on_token * {y.name}",
                    f"{d_y.name} = on_token * {x.name}",
                ]
            case _:
                lines = self._matrices(s)
        return [piece for line in lines for piece in self.fold(line)]

    @property
    def vector(self) -> bool:
        """Whether the decay is one for each dimension."""
        return self.program.decay is not None and "d" in self.program.decay.axes

    def _matrices(self, s: ChunkStmt) -> list[str]:
        match s:
            case Gram():
                return self._gram(s)
            case Diagonal(to, x, y):
                own = f"tl.sum({self._wide(x)} * {y.name}, 1)[:, None]"
                return [f"{to.name} += tl.where(on_diagonal(), {own}, 0.0)"]
            case Product():
                return self._product(s)
            case Solve():
                return self._solve(s)
            case StateStep():
                return self._state_step(s)
            case _:
                raise AssertionError(f"no spelling for {type(s).__name__}")

    def has_last(self, tile: Tile) -> bool:
        """Whether a tile has numbers beyond the columns of v."""
        return self.program.divisor is not None and tile in _WITH_LAST

    def _wide(self, x: Tile) -> str:
        """A tile of elements in the compute type."""
        return x.name if TYPES[self.element] == self.compute else f"{x.name}.to(COMPUTE)"

    # -- decays

    def _decays(self, s: Decays) -> list[str]:
        double = f"{s.decay.name}.to(tl.float64)"
        lines = [f"{s.sums.name} = tl.cumsum({double}, 0)"]
        before = f"{s.sums.name} - {double}" if s.exclusive else s.sums.name
        if s.exclusive and (s.reads is not None or f"{s.sums.name}_before" in self.live):
            before = f"{s.sums.name}_before"
            lines.append(f"{before} = {s.sums.name} - {double}")
        if s.reads is not None:
            lines.append(f"{s.reads.name} = tl.exp({self._narrow(before)})")
        if s.erases is not None:
            lines.append(f"{s.erases.name} = tl.exp({self._narrow(s.sums.name)})")
        if {s.writes.name, s.whole.name} & self.live:
            end = f"{s.sums.name}_end"
            lines.append(f"{end} = tl.sum({double}, 0)")
            if s.writes.name in self.live:
                lines.append(f"{s.writes.name} = tl.exp({self._narrow(f'({end} - {s.sums.name})')})")
            if s.whole.name in self.live:
                lines.append(f"{s.whole.name} = tl.exp({self._narrow(end)})")
        return lines

    def _narrow(self, x: str) -> str:
        return f"{x}.to(COMPUTE)"

    def _vector_decays(self, s: Decays) -> list[str]:
        g, lines = s.decay.name, list[str]()
        if s.reads is not None:
            lines.append(f"{s.reads.name} = left_at_token({g}, {s.exclusive})")
        if s.erases is not None:
            lines.append(f"{s.erases.name} = left_at_token({g}, False)")
        if s.writes.name in self.live:
            lines.append(f"{s.writes.name} = left_at_end({g})")
        if s.whole.name in self.live:
            lines.append(f"{s.whole.name} = tl.exp(tl.sum({g}, 0))")
        return lines

    def sums_before(self, within: Within) -> str:
        """The sums that a reading token has."""
        return f"{within.sums.name}_before" if within.exclusive else within.sums.name

    def _between(self, within: Within, strict: bool) -> str:
        return f"weights_between({self.sums_before(within)}, {within.sums.name}, {strict})"

    # -- matrices of tokens

    def _gram(self, s: Gram) -> list[str]:
        name, sign = s.to.name, "-" if s.negative else ""
        if s.within is not None and s.within.vector:
            rows = f"{s.x.name}, {s.y.name}, {s.within.decay.name}"
            return [f"{name} = {sign}vector_gram({rows}, {s.strict}, {s.within.exclusive})"]
        found = f"product({s.x.name}, tl.trans({s.y.name}))"
        if self.has_last(s.x):
            found += f" + {s.x.last.name}[:, None] * {s.y.last.name}[None, :]"
        if s.within is not None:
            return [f"{name} = {sign}{found} * {self._between(s.within, s.strict)}"]
        if self.has_last(s.x):
            return [f"{name} = {sign}({found})", f"{name} = tl.where(reads({s.strict}), {name}, 0.0)"]
        return [f"{name} = tl.where(reads({s.strict}), {sign}{found}, 0.0)"]

    def _gram_gradient(self, s: GramGradient) -> list[str]:
        d, x, y = s.d_matrix.name, s.x.name, s.y.name
        if s.within is not None and s.within.vector:
            assert s.d_decay is not None
            sums = f"{s.d_x.name}, {s.d_y.name}, {s.d_decay.name}"
            rows = f"{d}, {x}, {y}, {s.within.decay.name}, {sums}, {s.strict}, {s.within.exclusive}"
            return [f"{sums} = vector_gram_gradient({rows})"]
        lines: list[str] = []
        weight = f"tl.where(reads({s.strict}), {d}, 0.0)"
        if s.within is not None:
            weight = f"{d} * {self._between(s.within, s.strict)}"
            if s.d_decay is not None and s.d_decay.name in self.live:
                pairs = f"tl.where(reads(True), {d} * {s.matrix.name}, 0.0)"
                lines.append(f"{s.d_decay.name} += between_pairs({pairs}, {s.within.exclusive})")
        return [
            *lines,
            f"{d} = {weight}",
            f"{s.d_x.name} += product({d}, {y})",
            f"{s.d_y.name} += product(tl.trans({d}), {x})",
        ]

    def _solve(self, s: Solve) -> list[str]:
        lines: list[str] = []
        inverse = self._inverses.get(s.matrix)
        if inverse is None:
            inverse = self._inverses[s.matrix] = f"{s.matrix.name}_inverse"
            lines.append(f"{inverse} = inverse_of({s.matrix.name})")
        by = f"tl.trans({inverse})" if s.turned else inverse
        return [*lines, f"{s.to.name} = product({by}, {s.to.name})"]

    # -- products and states

    def _product(self, s: Product) -> list[str]:
        matrix = s.a.axes == ("t", "t")
        a = f"tl.trans({s.a.name})" if matrix and s.upper else s.a.name
        b = f"tl.trans({s.b.name})" if s.turned else s.b.name
        lines = [self._set(s, s.to.name, f"product({a}, {b})")]
        if self.has_last(s.b) and self.has_last(s.to):  # a number of each token, or of each row of the state
            lines.append(self._set(s, s.to.last.name, f"tl.sum({s.a.name} * {s.b.last.name}[None, :], 1)"))
        elif self.has_last(s.a) and self.has_last(s.b) and s.turned:
            sign = "-" if s.negative else "+"
            lines.append(f"{s.to.name} {sign}= {s.a.last.name}[:, None] * {s.b.last.name}[None, :]")
        return lines

    @staticmethod
    def _set(s: Product, name: str, found: str) -> str:
        if s.add:
            return f"{name} {'-' if s.negative else '+'}= {found}"
        return f"{name} = {'-' if s.negative else ''}{found}"

    def _state_step(self, s: StateStep) -> list[str]:
        state, sign = s.state.name, "-" if s.negative else "+"
        step = f"product(tl.trans({s.keys.name}), {s.values.name})"
        whole = "" if s.whole is None else s.whole.name
        rows = f"{whole}[:, None]" if s.whole is not None and s.whole.axes else whole
        lines = [f"{state} = {state}{f' * {rows}' if rows else ''} {sign} {step}"]
        if self.has_last(s.state):
            last = s.state.last.name
            step = f"tl.sum({s.keys.name} * {s.values.last.name}[:, None], 0)"
            lines.append(f"{last} = {last}{f' * {whole}' if whole else ''} {sign} {step}")
        return lines

    def _carried(self, s: CarriedGradient) -> list[str]:
        d, (keys, d_keys) = s.d_decay.name, s.write
        last = f"{s.state.last.name} * {s.d_state.last.name}" if self.has_last(s.state) else ""
        if self.vector:
            through = f"tl.sum({s.state.name} * {s.d_state.name}, 1)"
            through = f"({through} + {last})" if last else through
            lines = [
                f"through = {s.whole.name} * {through}",
                f"{d} = through[None, :] + rows_before_token({keys.name} * {d_keys.name})",
            ]
            return lines + [
                f"{d} += rows_from_token_on({x.name} * {d_x.name}, {exclusive})"
                for x, d_x, exclusive in s.reads
            ]
        through = f"tl.sum({s.state.name} * {s.d_state.name})"
        through = f"({through} + tl.sum({last}))" if last else through
        lines = [
            f"through = {s.whole.name} * {through}",
            f"{d} = through + before_token(tl.sum({keys.name} * {d_keys.name}, 1))",
        ]
        return lines + [
            f"{d} += from_token_on(tl.sum({x.name} * {d_x.name}, 1), {exclusive})"
            for x, d_x, exclusive in s.reads
        ]

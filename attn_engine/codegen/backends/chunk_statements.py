"""C++ of the statements of a chunk program: calls of include/chunk*.h."""

from __future__ import annotations

import re
from collections.abc import Mapping

from attn_engine.codegen.backends.chunk_rows import RowRenderer
from attn_engine.codegen.backends.chunk_schedule import ScaledProduct, ScaledStateStep, ScheduledStmt
from attn_engine.ir.chunk import (
    STATE,
    CarriedGradient,
    ChunkKernel,
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
    TokenStep,
    Within,
)
from attn_engine.ir.linear import LinearProgram

COLUMNS = {"t": "T_COLUMNS", "d": "D_COLUMNS", "v": "V_COLUMNS"}


def flag_of(condition: bool) -> str:
    return "true" if condition else "false"


def between_name(exclusive: bool) -> str:
    """The matrix of what is left of a token at another."""
    return "decay_before" if exclusive else "decay_between"


class StatementRenderer:
    """Prints statements; the file around them is chunk_cpu.py's."""

    kernel: ChunkKernel
    program: LinearProgram
    rows: RowRenderer
    tiles: Mapping[Tile, str]
    vector: bool  # the decay is one for each dimension
    state_pairs: bool  # the state is also kept as pairs of rows
    phases: tuple[bool, ...]  # of the matrices of decays that the statements at hand need

    def statement(self, s: ScheduledStmt) -> list[str]:
        """The lines of a statement."""
        match s:
            case ScaledProduct(product, by):
                return self._product(product, by)
            case ScaledStateStep(step, by):
                return [self._state_step(step, by)]
            case Section(title):
                return ["", RowRenderer.remark(f"-- {title}")]
            case Rows():
                return self._rows(s)
            case Decays():
                return self._decays(s)
            case Scale(to, x, by):
                return [f"scale_rows({to.name}, {x.name}, {by.name}, rows);"]
            case CarriedGradient():
                return self._carried(s)
            case GramGradient():
                return [self._gram_gradient(s)]
            case DiagonalGradient(d_matrix, x, y, d_x, d_y):
                names = ", ".join(t.name for t in (d_matrix, x, y, d_x, d_y))
                return [f"diagonal_gradient({names}, rows);"]
            case _:
                return self._matrices(s)

    def _matrices(self, s: Gram | Diagonal | Product | Solve | StateStep | TokenStep) -> list[str]:
        match s:
            case Gram():
                return [self._gram(s)]
            case Diagonal(to, x, y):
                return [f"add_diagonal({to.name}, {x.name}, {y.name}, rows);"]
            case Product():
                return self._product(s)
            case Solve(to, matrix, turned):
                return [f"solve_{'upper' if turned else 'lower'}({to.name}, {matrix.name}, rows);"]
            case StateStep():
                return [self._state_step(s)]
            case TokenStep():
                return self._token_step(s)

    def _rows(self, s: Rows) -> list[str]:
        lines = self.rows.rows(s, self.tiles)
        words = set(re.findall(r"\w+", "\n".join(lines)))
        place = (
            "first + length - 1 - chunk_start - row" if self.program.reverse else "first + chunk_start + row"
        )
        position = [f"const int token = {'row' if self.kernel.name == 'linear_step' else place};"]
        position = position if words & {"token", "t"} else []
        if "t" in words:
            position.append(f"const int t = {self._position()};")
        made = [tile.name for tile, _ in s.values]
        found = [
            "for (int row = 0; row < count; ++row) {",
            *(f"  {line}" for line in [*position, *self._ahead(words), *lines]),
            "}",
        ]
        for tile, _ in s.values:
            if tile.axes == ("t",):
                found.append(f"for (int row = count; row < T_COLUMNS; ++row) {tile.name}[row] = 0;")
            else:
                found.append(f"clear_rows({tile.name}, count, rows);")
        if s.fault is not None and s.fault.name in made:
            place = "arguments.faults.data[(int64_t)sequence * arguments.heads + head]"
            found += [
                f"if (const int64_t fault = fault_in({s.fault.name}, count))",
                f"  if (!{place}) {place} = fault + 2 * chunk_start;",
            ]
        return found

    def _ahead(self, words: set[str]) -> list[str]:
        """The rows of tensors that come TOKENS_AHEAD tokens later, asked for now."""
        if self.kernel.name == "linear_step":
            return []
        later = f"token {'-' if self.program.reverse else '+'} TOKENS_AHEAD"
        sizes = {"Q_rows": "D", "K_rows": "D", "V_rows": "DV", "decay_given_rows": "D", "dO_rows": "DV"}
        sizes |= {
            f"{w.tensor}_rows": "D" if "d" in w.axes else "DV"
            for w in self.kernel.outputs
            if len(w.axes) == 2
        }
        return [f"prefetch_row<{size}>({name}, {later});" for name, size in sizes.items() if name in words]

    def _position(self) -> str:
        """Where the token is in its tensors, for the mods: a single step is told."""
        return "arguments.position" if self.kernel.name == "linear_step" else "token"

    def _state_step(self, s: StateStep, by: Tile | None = None) -> str:
        names = f"{s.state.name}, D, {s.keys.name}, {s.values.name}, rows, {self._whole(s.whole)}"
        pairs = self.state_pairs and s.state == STATE
        if by is not None or pairs:
            names += f", {'nullptr' if by is None else by.name}"
        return f"state_step<{flag_of(s.negative)}>({names}{', state_pairs' if pairs else ''});"

    @staticmethod
    def _whole(whole: Tile | None) -> str:
        """What is left of a row of the state, as a function of the row."""
        if whole is None:
            return "[](int) { return Real(1); }"
        return (
            f"[&](int d) {{ return {whole.name}[d]; }}"
            if whole.axes
            else f"[&](int) {{ return {whole.name}; }}"
        )

    def _token_step(self, s: TokenStep) -> list[str]:
        none = "nullptr"
        tiles = [f"{t.name}[0]" if t is not None else none for t in (s.eraser, s.bonus)]
        if s.decay is None:
            factor = "[](int) { return Real(1); }"
        elif self.vector:
            factor = f"[&](int d) {{ return {s.decay.name}[0][d]; }}"
        else:
            factor = f"[&](int) {{ return {s.decay.name}[0]; }}"
        decay = [] if s.decay is None else [f"exponentials<{'D' if self.vector else 'T'}_COLUMNS>"]
        place = (
            f"{s.decay.name}[0]" if s.decay is not None and self.vector else s.decay.name if s.decay else ""
        )
        first = [f"{d}({place}, {place});" for d in decay]
        flag = flag_of(s.exclusive)
        call = (
            f"token_step<{flag}>({s.to.name}[0], state, D, {s.query.name}[0], {s.key.name}[0], "
            f"{s.value.name}[0], {', '.join(tiles)}, {factor});"
        )
        return [*first, call]

    def _decays(self, s: Decays) -> list[str]:
        flag = flag_of(s.exclusive)
        if self.vector:
            tiles = (s.steps, s.reads, s.erases)
            names = ", ".join("(Real(*)[D_COLUMNS])nullptr" if t is None else t.name for t in tiles)
            return [
                f"vector_factors<{flag}>({s.decay.name}, rows, {names}, {s.writes.name}, {s.whole.name});"
            ]
        lines = [f"sum_decays({s.decay.name}, rows, decay_sums, {s.writes.name}, {s.whole.name});"]
        if s.reads is not None:
            lines.append(f"read_factors<{flag}>({s.reads.name}, decay_sums);")
        if s.erases is not None:
            lines.append(f"read_factors<false>({s.erases.name}, decay_sums);")
        lines += [f"decay_matrix<{flag_of(x)}>({between_name(x)}, decay_sums, rows);" for x in self.phases]
        return lines

    def _gram(self, s: Gram) -> str:
        strict, negative = (flag_of(s.strict), flag_of(s.negative))
        dims = self._dims(s.x)
        if s.within is not None and s.within.vector:
            assert s.within.steps is not None
            exclusive = flag_of(s.within.exclusive)
            return (
                f"vector_gram<{strict}, {exclusive}, {negative}>({s.to.name}, {s.x.name}, {s.y.name}, "
                f"{s.within.steps.name}, spare, rows, {dims});"
            )
        return (
            f"gram<{strict}, {negative}>({s.to.name}, {s.x.name}, {s.y.name}, spare_rows, rows, {dims}, "
            f"{self._between(s.within)});"
        )

    @staticmethod
    def _between(within: Within | None) -> str:
        if within is None:
            return "NoDecay{}"
        return f"TokenDecay<T_COLUMNS>{{{between_name(within.exclusive)}}}"

    @staticmethod
    def _dims(x: Tile) -> str:
        return "D" if x.axes[1] == "d" else "STATE_COLUMNS"

    def _product(self, s: Product, by: Tile | None = None) -> list[str]:
        kind = {
            (False, False): "TO", (True, False): "ADD", (True, True): "SUBTRACT", (False, True): "NEGATIVE"
        }[s.add, s.negative]  # fmt: skip
        matrix = s.a.axes == ("t", "t")
        depth = "ALL" if not matrix else "FROM_ROW" if s.upper else "UP_TO_ROW"
        call = f"product<Set::{kind}, Depth::{depth}>({s.to.name}, rows"
        end = ");" if by is None else f", RowFactor{{{by.name}}});"
        if matrix:
            strides = "T_COLUMNS, 1" if s.upper else "1, T_COLUMNS"
            return [f"{call}, rows, {s.a.name}[0], {strides}, {s.b.name}{end}"]
        columns = COLUMNS[s.a.axes[1]]
        if not s.turned:
            b = "state_pairs" if self.state_pairs and s.b == STATE else s.b.name
            return [f"{call}, {self._dims(s.a)}, {s.a.name}[0], {columns}, 1, {b}{end}"]
        assert s.b.axes == ("d", "v")
        return [
            f"transpose_rows(spare_state, {s.b.name}, D_COLUMNS, STATE_COLUMNS);",
            f"{call}, STATE_COLUMNS, {s.a.name}[0], {columns}, 1, spare_state{end}",
        ]

    def _carried(self, s: CarriedGradient) -> list[str]:
        d, (keys, d_keys) = s.d_decay.name, s.write
        lines = [
            f"carried_gradient({d}, {keys.name}, {d_keys.name}, {s.state.name}, {s.d_state.name}, D, "
            f"{s.whole.name}, rows);"
        ]
        for x, d_x, exclusive in s.reads:
            lines.append(f"add_reads<{flag_of(exclusive)}>({d}, {x.name}, {d_x.name}, rows);")
        return lines

    def _gram_gradient(self, s: GramGradient) -> str:
        exclusive = s.within is not None and s.within.exclusive
        strict, flag = (flag_of(s.strict), flag_of(exclusive))
        rows = f"{s.x.name}, {s.y.name}"
        if s.within is not None and s.within.vector:
            assert s.within.steps is not None
            assert s.d_decay is not None
            return (
                f"vector_gram_gradient<{strict}, {flag}>({s.d_matrix.name}, {rows}, {s.within.steps.name}, "
                f"{s.d_x.name}, {s.d_y.name}, {s.d_decay.name}, spare, rows, D);"
            )
        d_decay = "(Real*)nullptr" if s.d_decay is None else s.d_decay.name
        return (
            f"gram_gradient<{strict}, {flag}>({s.d_matrix.name}, {s.matrix.name}, {rows}, {s.d_x.name}, "
            f"{s.d_y.name}, rows, {self._between(s.within)}, {d_decay});"
        )

"""C++ of chunk programs: one function for one head of one sequence. Arithmetic lives in include/chunk*.h."""

from __future__ import annotations

import re
from collections.abc import Mapping

from attn_engine.codegen.backends.chunk_params import SEGMENT_TOKENS, SIZES, ChunkParam, chunk_params
from attn_engine.codegen.backends.chunk_rows import RowRenderer
from attn_engine.codegen.backends.chunk_schedule import phases_between, reads_state_rows, scheduled
from attn_engine.codegen.backends.chunk_statements import COLUMNS, StatementRenderer, between_name
from attn_engine.codegen.backends.cpu import IN_DOUBLE, REGISTERS, TYPES, CpuTarget
from attn_engine.codegen.backends.cpu_names import KEYWORDS, LOCALS, header_names
from attn_engine.ir.chunk import ChunkKernel, ChunkStmt, RowOutput
from attn_engine.ir.linear import LinearProgram, Rank
from attn_engine.ir.ops import DType, Storage


def chunk_registers(program: LinearProgram, target: CpuTarget) -> int:
    """Registers side by side that hold neighbouring columns."""
    lanes = target.lanes(program.element, program.dim_qk, program.state_columns)
    return lanes // target.width(program.element)


def render_chunk_cpu(kernel: ChunkKernel, target: CpuTarget, chunk: int, header: tuple[str, ...] = ()) -> str:
    """The C++ source of a chunk kernel; it exports `attn_engine_<kernel name>(Arguments*)`."""
    return _ChunkRenderer(kernel, target, chunk).render(header)


class _ChunkRenderer(StatementRenderer):
    """Prints one kernel as one file."""

    phases = ()

    def __init__(self, kernel: ChunkKernel, target: CpuTarget, chunk: int) -> None:
        self.kernel, self.program, self.target, self.chunk = kernel, kernel.program, target, chunk
        self.in_double = self.program.element is Storage.FLOAT64
        self.params = chunk_params(kernel)
        self.renamed = self._legal_names()
        self.registers = chunk_registers(self.program, target)
        lanes = self.registers * target.width(self.program.element)
        self.padded = {"d": self.program.dim_qk % lanes != 0, "dv": self.program.dim_v % lanes != 0}
        self.tiles = {tile: tile.name for tile in kernel.tiles()}
        self.rows = RowRenderer(self.program, self._inputs(), self.padded, self.renamed, self.in_double)
        self.vector = self.program.rank is Rank.VECTOR
        self.state_pairs = False

    def render(self, header: tuple[str, ...]) -> str:
        body = self.task()
        lines = [*(RowRenderer.remark(line) for line in header), *self.prologue(), *body, *self.entry()]
        return "\n".join(line.rstrip() for line in lines) + "\n"

    # -- the file

    def prologue(self) -> list[str]:
        p = self.program
        columns = (
            "T_COLUMNS = round_up(CHUNK, WIDTH), D_COLUMNS = round_up(D, LANES), "
            "V_COLUMNS = round_up(STATE_COLUMNS, LANES)"
        )
        return [
            f"#define {REGISTERS} {self.registers}",
            *([f"#define {IN_DOUBLE} 1"] if self.in_double else []),
            *(["#define PAIRED_PRODUCTS"] if self._paired else []),
            '#include "kernel.h"',
            '#include "chunk_vectors.h"',
            "",
            "namespace attention {",
            "",
            f"constexpr int CHUNK = {self.chunk}, SEGMENT = {SEGMENT_TOKENS // self.chunk}, D = {p.dim_qk}, "
            f"DV = {p.dim_v}, STATE_COLUMNS = {p.state_columns};",
            f"constexpr int {columns};",
            "",
            "struct Arguments {  // 8 bytes each: the launcher fills them in this order",
            "  int64_t next_task;  // shared by the threads",
            *(f"  {self._tensor_type(x)} {self.spelled(x.name)};" for x in self.params),
            f"  int64_t {', '.join(SIZES)};",
            *(
                f"  {'double' if v.dtype is DType.FLOAT else 'int64_t'} {self.spelled(v.name)};"
                for v in p.scalars
            ),
            "};",
            "",
            "struct Scratch {  // of one thread",
            *(f"  alignas(64) {line}" for line in self._scratch()),
            "};",
            "",
        ]

    @property
    def _paired(self) -> bool:
        """Whether products multiply pairs of bfloat16; a single token has none."""
        dot = self.target.bfloat16_dot and self.program.element is Storage.BFLOAT16
        return dot and self.kernel.name != "linear_step"

    def _tensor_type(self, p: ChunkParam) -> str:
        return f"Tensor<{'' if p.output else 'const '}{TYPES[p.storage]}, {p.rank}>"

    def _scratch(self) -> list[str]:
        lines: list[str] = []
        for tile in self.tiles:
            if tile.name == "decay_sums":
                if not self.vector:
                    lines.append("RunningSum<T_COLUMNS> decay_sums;")
                    phases = phases_between((*self.kernel.scan, *self.kernel.gradient))
                    lines += [f"Real {between_name(x)}[CHUNK][T_COLUMNS];" for x in phases]
            elif not tile.axes:
                lines.append(f"Real {tile.name};")
            elif tile.axes == ("t",):
                lines.append(f"Real {tile.name}[T_COLUMNS];")
            elif tile.axes == ("d",):
                lines.append(f"Real {tile.name}[D_COLUMNS];")
            else:
                rows = "CHUNK" if tile.axes[0] == "t" else "D_COLUMNS"
                lines.append(f"Real {tile.name}[{rows}][{COLUMNS[tile.axes[1]]}];")
        lines.append("Real spare_rows[D_COLUMNS > V_COLUMNS ? D_COLUMNS : V_COLUMNS][T_COLUMNS];")
        if self._paired and any(map(reads_state_rows, (self.kernel.scan, self.kernel.gradient))):
            lines.append("Pair state_pairs[(D_COLUMNS + 1) / 2][V_COLUMNS];")
        if self.vector:
            lines.append("VectorSpare<T_COLUMNS, D_COLUMNS> spare;")
        if self.kernel.gradient:
            lines += [
                "Real spare_state[V_COLUMNS][D_COLUMNS];",
                "Real states[SEGMENT][D_COLUMNS][V_COLUMNS];",
            ]
        for w in self._sums():
            size = "D_COLUMNS" if "d" in w.axes else "round_up(DV, LANES)" if "dv" in w.axes else "1"
            lines.append(f"Real {w.tensor}_sum[{size}];")
        return lines

    def _sums(self) -> list[RowOutput]:
        """The outputs that are summed over tokens."""
        return [w for w in self.kernel.outputs if "q" not in w.axes]

    def task(self) -> list[str]:
        """What is done for one head of one sequence."""
        name = "gradient" if self.kernel.gradient else "attention"
        loops = self._backward_loops() if self.kernel.gradient else self._forward_loops()
        loops = self._step_loops() if self.kernel.name == "linear_step" else loops
        scan = self._step("scan", self.kernel.scan)
        gradient = self._step("gradient", self.kernel.gradient) if self.kernel.gradient else []
        body = [*scan, *gradient, *loops]
        words = set(re.findall(r"\w+", "\n".join(body)))
        return [
            f"static void {name}_task(const Arguments& arguments, Scratch& scratch, int sequence, int head) {{",
            *(f"  {line}" for line in [*self._declarations(words), *body]),
            "}",
            "",
        ]

    def _declarations(self, words: set[str]) -> list[str]:
        spelled = [self.spelled(p.name) for p in self.params]
        lines = [f"const auto& {n} = arguments.{n};" for n in spelled if n in words or f"{n}_rows" in words]
        lines += [
            f"const {'Real' if v.dtype is DType.FLOAT else 'int'} {n} = arguments.{n};"
            for v in self.program.scalars
            if (n := self.spelled(v.name)) in words
        ]
        names = re.findall(r"(\w+)(?:\[.*\])?;$", "\n".join(self._scratch()), re.M)
        lines += [f"auto& {name} = scratch.{name};" for name in names if name in words]
        lines.append(
            "const int64_t *about = &arguments.sequences.data[sequence * arguments.sequences.strides[0]];"
        )
        lines.append("const int batch = about[0], first = about[1], length = about[2];")
        views = {
            "Q": "batch, floor_div(head, arguments.heads / arguments.q_heads)",
            "K": "batch, floor_div(head, arguments.heads / arguments.k_heads)",
        }
        for p in self.params:
            if f"{p.name}_rows" in words and p.name not in _STATES:
                lines.append(
                    f"const auto {p.name}_rows = matrix(arguments.{p.name}, {views.get(p.name, 'batch, head')});"
                )
        return lines

    def _step(self, name: str, body: tuple[ChunkStmt, ...]) -> list[str]:
        """What is done to a chunk, as a local function."""
        self.phases, self.state_pairs = phases_between(body), self._paired and reads_state_rows(body)
        lines = [line for s in scheduled(body, self._paired) for line in self.statement(s)]
        if self.state_pairs and name == "gradient":
            lines.insert(0, PACK_STATE)
        sums = self._sums() if name == "gradient" else []
        clear = [f"__builtin_memset({w.tensor}_sum, 0, sizeof {w.tensor}_sum);" for w in sums]
        add = [f"add_total<{self._total_size(w)}>({self._total_place(w)}, {w.tensor}_sum);" for w in sums]
        return [
            f"const auto {name} = [&](int chunk_start) __attribute__((noinline)) {{",
            "  const int count = min(CHUNK, length - chunk_start), rows = round_up(count, 16);",
            *(f"  {line}" for line in [*clear, *lines, *add]),
            "};",
        ]

    @staticmethod
    def _total_size(w: RowOutput) -> str:
        return "D" if "d" in w.axes else "DV" if "dv" in w.axes else "1"

    @staticmethod
    def _total_place(w: RowOutput) -> str:
        return f"{w.tensor}.data + sequence * {w.tensor}.strides[0] + head * {w.tensor}.strides[1]"

    def _forward_loops(self) -> list[str]:
        return [
            "",
            "// -- all chunks; the state is kept at the start of each segment, for the backward pass",
            "clear_rows(state, 0, D_COLUMNS);",
            "const auto initial_rows = matrix(initial, sequence, head);",
            "for (int row = 0; row < D; ++row) read_row(state[row], initial_rows, row, STATE_COLUMNS);",
            *self._packed_for_scan(),
            "for (int chunk_start = 0; chunk_start < length; chunk_start += CHUNK) {",
            "  const int chunk = chunk_start / CHUNK;",
            "  if (arguments.keep_states && chunk % SEGMENT == 0) {",
            "    const auto kept_rows = matrix(kept, about[3] + chunk / SEGMENT, head);",
            "    for (int row = 0; row < D; ++row)",
            "      for (int column = 0; column < STATE_COLUMNS; column += LANES)",
            "        write_row<STATE_COLUMNS>(kept_rows, row, column, load(state[row] + column));",
            "  }",
            "  scan(chunk_start);",
            "}",
            "const auto final_rows = matrix(final, sequence, head);",
            "for (int row = 0; row < D; ++row)",
            "  for (int column = 0; column < STATE_COLUMNS; column += LANES)",
            "    write_row<STATE_COLUMNS>(final_rows, row, column, load(state[row] + column));",
        ]

    def _packed_for_scan(self) -> list[str]:
        """The state in pairs of rows, where the chunks that follow read it so; they keep both up to date."""
        return [PACK_STATE] if self._paired and reads_state_rows(self.kernel.scan) else []

    @staticmethod
    def _step_loops() -> list[str]:
        return [
            "",
            "// -- the state before the token, the token, the state after it in its place",
            "const auto state_rows = matrix(final, sequence, head);",
            "for (int row = 0; row < D; ++row) read_row(state[row], state_rows, row, STATE_COLUMNS);",
            "scan(0);",
            "for (int row = 0; row < D; ++row)",
            "  for (int column = 0; column < STATE_COLUMNS; column += LANES)",
            "    write_row<STATE_COLUMNS>(state_rows, row, column, load(state[row] + column));",
        ]

    def _backward_loops(self) -> list[str]:
        return [
            "",
            "// -- all segments from the last to the first: their states again, then their chunks backwards",
            "clear_rows(state, 0, D_COLUMNS);",
            "clear_rows(d_state, 0, D_COLUMNS);",
            "const auto d_final_rows = matrix(d_final, sequence, head);",
            "for (int row = 0; row < D; ++row) read_row(d_state[row], d_final_rows, row, STATE_COLUMNS);",
            "const int chunks = (length + CHUNK - 1) / CHUNK;",
            "for (int segment = (chunks - 1) / SEGMENT; segment >= 0 && chunks; --segment) {",
            "  const int begin = segment * SEGMENT, end = min(begin + SEGMENT, chunks);",
            "  const auto kept_rows = matrix(kept, about[3] + segment, head);",
            "  for (int row = 0; row < D; ++row) read_row(state[row], kept_rows, row, STATE_COLUMNS);",
            *(f"  {line}" for line in self._packed_for_scan()),
            "  for (int chunk = begin; chunk < end; ++chunk) {",
            "    __builtin_memcpy(states[chunk - begin], state, sizeof state);",
            "    if (chunk + 1 < end) scan(chunk * CHUNK);",
            "  }",
            "  for (int chunk = end - 1; chunk >= begin; --chunk) {",
            "    __builtin_memcpy(state, states[chunk - begin], sizeof state);",
            "    gradient(chunk * CHUNK);",
            "  }",
            "}",
            "const auto d_initial_rows = matrix(d_initial, sequence, head);",
            "for (int row = 0; row < D; ++row)",
            "  for (int column = 0; column < STATE_COLUMNS; column += LANES)",
            "    write_row<STATE_COLUMNS>(d_initial_rows, row, column, load(d_state[row] + column));",
        ]

    def entry(self) -> list[str]:
        name = "gradient" if self.kernel.gradient else "attention"
        return [
            "// Any number of threads may run this on the same arguments; each takes the next task.",
            f'extern "C" void attn_engine_{self.kernel.name}(Arguments* arguments) {{',
            "  const int64_t tasks = arguments->sequence_count * arguments->heads;",
            "  Scratch* scratch = (Scratch*)aligned_alloc(64, (sizeof(Scratch) + 63) / 64 * 64);",
            "  for (;;) {",
            "    const int64_t task = __atomic_fetch_add(&arguments->next_task, 1, __ATOMIC_RELAXED);",
            "    if (task >= tasks) break;",
            f"    {name}_task(*arguments, *scratch, task / arguments->heads, task % arguments->heads);",
            "  }",
            "  free(scratch);",
            "}",
            "",
            "}  // namespace attention",
        ]

    # -- names

    def spelled(self, name: str) -> str:
        return self.renamed.get(name, name)

    def _legal_names(self) -> dict[str, str]:
        """Captured names that the file or C++ has taken, with an underscore behind them."""
        own = {t.name for t in self.kernel.tiles()} | {p.name for p in self.params} | _FIXED
        captured = [c.name for c in self.program.captures] + [v.name for v in self.program.scalars]
        taken = (own - set(captured)) | KEYWORDS | LOCALS | header_names() | _FIXED
        found: dict[str, str] = {}
        for name in captured:
            legal = name
            while legal in taken or legal.endswith(("_rows", "_sum", "_last", "_lanes")):
                legal += "_"
            if legal != name:
                found[name] = legal
            taken = taken | {legal}
        return found

    def _inputs(self) -> Mapping[str, tuple[str, str]]:
        """How a token's variables are read."""
        given = self.program.decay_given
        decay = {
            Rank.HEAD: "decay_given(head)",
            Rank.TOKEN: "decay_given(batch, head, token)",
            Rank.VECTOR: "row_lanes<D>(decay_given_rows, token, column)",
            Rank.NONE: "",
        }[given]
        found = {
            "query": "row_lanes<D>(Q_rows, token, column)",
            "key": "row_lanes<D>(K_rows, token, column)",
            "value": "row_lanes<DV>(V_rows, token, column)",
            "d_output": "row_lanes<DV>(dO_rows, token, column)",
            "beta": "beta_given(batch, head, token)",
            "decay": decay,
        }
        inputs = {name: (name, text) for name, text in found.items()}
        for tile in self.kernel.tiles():
            row = f"{tile.name}_row"
            if tile.axes == ("t",):
                inputs[tile.name] = (row, f"{tile.name}[row]")
            elif tile.axes in (("t", "d"), ("t", "v")):
                inputs[tile.name] = (row, f"load({tile.name}[row] + column)")
                inputs[f"{tile.name}_last"] = (f"{tile.name}_last", f"{tile.name}[row][DV]")
        return inputs


PACK_STATE = "pack_pairs(state_pairs[0], V_COLUMNS, state[0], V_COLUMNS, D_COLUMNS, V_COLUMNS);"
_STATES = ("initial", "final", "kept", "d_initial", "d_final")
_FIXED = frozenset(
    """sequence head batch first length count rows row column chunk_start chunk segment begin end chunks about
    scan decay_between decay_before gradient initial final kept fault query key value beta decay t d_idx
    dv_idx spare spare_rows spare_state state_pairs states CHUNK SEGMENT D DV STATE_COLUMNS T_COLUMNS D_COLUMNS
    V_COLUMNS d_output place sequences faults heads""".split()
)

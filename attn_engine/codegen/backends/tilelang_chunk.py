"""TileLang of chunk programs: one file for each direction, a function for each phase (codegen/lower/chunk_phases.py).

Every tile of a chunk lies in shared memory, where all threads reach it; what a product adds up is in registers until it
is done. The same text without threads runs on the CPU.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace

from attn_engine.codegen.backends.device_library import device_functions, functions_called
from attn_engine.codegen.backends.tilelang_chunk_file import (
    Argument,
    argument_of,
    constants,
    dynamic_names,
)
from attn_engine.codegen.backends.tilelang_chunk_rows import BLOCKS
from attn_engine.codegen.backends.tilelang_chunk_statements import ChunkCalls
from attn_engine.codegen.backends.tilelang_types import TileLangOptions, dtype_name
from attn_engine.codegen.backends.triton_chunk_params import (
    GROUPS,
    ChunkOptions,
    ChunkTensor,
    phase_tensors,
)
from attn_engine.codegen.lower.chunk_phases import ChunkPhase, names_read
from attn_engine.codegen.lower.columns import padded
from attn_engine.codegen.lower.emit import Names
from attn_engine.codegen.lower.placed import Buffer, Scope
from attn_engine.ir.chunk import D_STATE, STATE, Decays, Gram, GramGradient, Rows, Scale, Tile, tiles_of
from attn_engine.ir.ops import DType, Storage
from attn_engine.ir.tile import Kernel, Param

LIBRARY = "chunk.tilelang"
THREADS = 128
NO_FAULT = 2**31 - 1
_AXES = {"t": "q", "d": "d", "v": "dv"}
_OWN = frozenset(
    """T each memory registers CHUNK LEVELS ELEMENT COMPUTE BLOCK_D BLOCK_DV DIM_QK DIM_V PARTS THREADS program part
    sequence chunk head batch first first_chunk length chunk_count place turn chunk_start count token t d_idx dv_idx
    qi ki di vi one query key value d_output beta decay sequences chunks faults fault through q_group k_group batches
    heads q_heads k_heads tokens sequence_count chunk_total parts float range min max abs bool""".split()
)


def render_chunk_tilelang(
    phases: Sequence[ChunkPhase], options: Sequence[ChunkOptions], cpu: bool, header: tuple[str, ...] = ()
) -> str:
    """The text of a Python file that defines a `T.prim_func` for each phase; options: one for each."""
    renderers = [TileLangPhase(p, o, cpu) for p, o in zip(phases, options, strict=True)]
    kernels = [r.kernel_lines() for r in renderers]
    text = "\n".join(line for lines in kernels for line in lines)
    library = functions_called(LIBRARY, text)
    lines = [
        *(f"# {line}" for line in header),
        "import tilelang.language as T",
        "",
        *constants(phases[0], options[0], cpu, "\n".join([text, *library])),
        "",
        *dynamic_names([a for r in renderers for a in r.arguments]),
        "",
        "",
        *library,
        *(line for kernel in kernels for line in [*kernel, "", ""]),
    ]
    return "\n".join(line.rstrip() for line in lines).rstrip() + "\n"


class TileLangPhase(ChunkCalls):
    """Prints the function of one phase; use a fresh one for each."""

    arguments: tuple[Argument, ...]  # the tensors that the text reads, in order
    numbers: tuple[str, ...]  # and the numbers behind them

    def __init__(self, phase: ChunkPhase, options: ChunkOptions, cpu: bool) -> None:
        super().__init__(TileLangOptions(cpu=cpu))
        self.phase, self.program, self.chunk_options = phase, phase.program, options
        self.element = self.program.element
        self.compute = "float64" if self.element is Storage.FLOAT64 else "float32"
        self.tensors = {t.name: t for t in self._tensors()}
        columns = options.columns_of(self.program)
        self.masked = {
            "d": padded(self.program.dim_qk) != self.program.dim_qk,
            "dv": self.program.dim_v % columns != 0,
        }
        self.firsts, self.doubles, self.buffers = {}, set(), {}
        tiles = phase.tiles()
        taken = {n for t in tiles for n in (t.name, t.last.name, f"{t.name}_rounded", f"{t.name}_before")}
        taken |= _OWN | set(device_functions(LIBRARY))
        taken |= {
            n for t in self.tensors.values() if not t.captured for n in (t.name, f"{t.name}_sum", *t.strides)
        }
        self.spelled = _legal(
            [c.name for c in self.program.captures] + [v.name for v in self.program.scalars], taken
        )
        self.reserved = Names(taken | set(self.spelled.values()))
        self.kernel = self._frame()
        self.live = self._live()
        self.buffers |= {b.name: b for b in self._tile_buffers(tiles)}
        self.depth = 1 if phase.carried is not None else 0

    def _tensors(self) -> Iterator[ChunkTensor]:
        """The output is of the elements' type; everything else that is written is of the compute type."""
        for t in phase_tensors(self.phase):
            yield replace(t, storage=self.element) if t.name == "O" else t

    def _frame(self) -> Kernel:
        """What the expressions of captured tensors need to know of the kernel."""
        params = tuple(
            Param(self.spelled[t.name], t.storage, tuple(f"{self.spelled[t.name]}_size_{d}" for d in t.dims))
            for t in self.tensors.values()
            if t.captured
        )
        self.sizes = {"d": padded(self.program.dim_qk), "dv": self.chunk_options.columns_of(self.program)}
        tile = (("q", self.chunk_options.chunk), ("d", self.program.dim_qk), ("dv", self.program.dim_v))
        return Kernel(
            name=self.phase.name,
            params=params,
            scalars=(),
            grid=("head", "batch"),
            order=("q", "kv", "d", "dv"),
            tile=tile,
            body=(),
        )

    def _live(self) -> set[str]:
        """What statements other than those that make it read."""
        found: set[str] = set()
        for s in self.phase.body:
            if not isinstance(s, Decays):
                found |= {t.name for t in tiles_of(s)}
            if isinstance(s, Gram | GramGradient) and s.within is not None and s.within.exclusive:
                found.add(f"{s.within.sums.name}_before")
        return found

    def _tile_buffers(self, tiles: Sequence[Tile]) -> Iterator[Buffer]:
        """A buffer for each tile: of elements where only rows and factors of rows make it, as products read it."""
        made: dict[str, set[type]] = {}
        for s in self.phase.body:
            for name in _changed_by(s):
                made.setdefault(name, set()).add(type(s))
        for tile in tiles:
            if tile.name == "decay_sums":
                continue
            axes = tuple(_AXES[a] for a in tile.axes)
            axes = ("q", "kv") if axes == ("q", "q") else axes
            plain = made.get(tile.name, {object}) <= {Rows, Scale} and len(axes) == 2
            short = plain and not tile.name.startswith("d_") and tile.name != "decays"
            yield Buffer(tile.name, Scope.SHARED, axes, DType.ELEMENT if short else DType.FLOAT)
            if self.has_last(tile):
                yield Buffer(tile.last.name, Scope.SHARED, axes[:1], DType.FLOAT)

    # -- the function

    def kernel_lines(self) -> list[str]:
        body = self._loop() if self.phase.carried is not None else self._single()
        body = [*self._position(), *self._allocations("\n".join(body)), *body]
        self._argue("\n".join(body))
        grid = "sequence_count" if self.phase.carried is not None else "chunk_total"
        threads = "" if self.options.cpu else ", threads=THREADS"
        parts = " * PARTS" if self.parted else ""
        return [
            "@T.prim_func",
            f"def {self.phase.name}(",
            *(f"    {line}" for line in self._argument_lines()),
            "):  # fmt: skip",
            f"    with T.Kernel({grid}{parts}, heads{threads}) as (program, head):",
            *(f"        {line}" if line else "" for line in body),
        ]

    @property
    def parted(self) -> bool:
        return self.chunk_options.parts(self.program) > 1

    def _argue(self, text: str) -> None:
        """What the text reads, and the table that says how many programs there are."""
        words = set(re.findall(r"\w+", text))
        words |= {"sequences" if self.phase.carried is not None else "chunks", *self._sized()}
        self.arguments = tuple(
            argument_of(self._spelled(t), self.phase.outputs)
            for t in self.tensors.values()
            if self._spelled(t).name in words
        )
        scalars = [self.spelled[v.name] for v in self.program.scalars]
        self.numbers = tuple(n for n in (*scalars, *GROUPS) if n in words)

    def _sized(self) -> set[str]:
        """A tensor that says how many heads there are."""
        return {"states"}

    def _spelled(self, t: ChunkTensor) -> ChunkTensor:
        return replace(t, name=self.spelled[t.name]) if t.captured else t

    def _argument_lines(self) -> list[str]:
        lines: list[str] = []
        for a in self.arguments:
            shape = ", ".join(a.shape) + "," * (len(a.shape) == 1)
            own = f"{a.tensor.name}_strides"
            strides = "(4, 1)" if not a.strides else own if len(a.strides) > 1 else f"({own},)"
            lines.append(
                f'{a.tensor.name}: T.StridedTensor(({shape}), {strides}, "{a.tensor.storage.value}"),'
            )
        kinds = {
            self.spelled[v.name]: dtype_name(v.dtype, self.element, self.compute)
            for v in self.program.scalars
        }
        return [*lines, *(f"{n}: T.{kinds.get(n, 'int32')}," for n in self.numbers)]

    def _position(self) -> list[str]:
        """What a program works on."""
        what = "sequence" if self.phase.carried is not None else "chunk"
        if not self.parted:
            return [f"{what} = program"]
        return [f"{what} = T.truncdiv(program, PARTS)", "part = T.truncmod(program, PARTS)"]

    def _allocations(self, text: str) -> list[str]:
        lines: list[str] = []
        for b in self.buffers.values():
            if not re.search(rf"\b{b.name}\b", text):
                continue
            shape = ", ".join(BLOCKS[a] for a in b.axes) or "1"
            dtype = (
                '"float64"'
                if b.name in self.doubles
                else "ELEMENT"
                if b.dtype is DType.ELEMENT
                else "COMPUTE"
            )
            dtype = '"int32"' if b.dtype is DType.INT else dtype
            lines.append(f"{b.name} = memory(({shape}{',' * (len(b.axes) < 2)}), {dtype})")
        return lines

    def _number(self, name: str, value: str) -> str:
        """A number of a table: named once, or TileLang writes the table's entry wherever it is read."""
        return f"{name} = {value}" if self.options.cpu else f'{name} = T.alloc_var("int32", init={value})'

    def _tokens(self) -> list[str]:
        place = "first + length - 1 - chunk_start" if self.program.reverse else "first + chunk_start"
        return [f"token = {place}", "count = length - chunk_start"]

    def _statements(self) -> list[str]:
        """The phase's statements; a state that was written down is read just before it is needed."""
        lines, waiting = list[str](), list(self.phase.given)
        for s in self.phase.body:
            for tile in [t for t in waiting if t.name in names_read(s)]:
                waiting.remove(tile)
                lines += self._kept(tile, "load", "chunk")
            lines += self.lines_of(s)
        return lines

    def _single(self) -> list[str]:
        names = ("batch", "first", "length", "chunk_start")
        return [
            *(self._number(n, f"chunks[chunk, {i}]") for i, n in enumerate(names)),
            *self._tokens(),
            *self._statements(),
        ]

    def _loop(self) -> list[str]:
        assert self.phase.carried is not None
        state, forward = self.phase.carried, self.phase.carried is STATE
        first, last = ("initial", "final") if forward else ("d_final", "d_initial")
        inner = [
            *([] if forward else ["place = chunk_count - 1 - turn"]),
            "chunk = first_chunk + place",
            "chunk_start = place * CHUNK",
            *self._tokens(),
            *self._kept(state, "store", "chunk"),
            *self._statements(),
            *(self._report() if self.phase.reports else []),
        ]
        names = ("batch", "first", "length", "first_chunk")
        return [
            *(self._number(n, f"sequences[sequence, {i}]") for i, n in enumerate(names)),
            *(self._begin_faults() if self.phase.reports else []),
            *self._kept(state, "load", "sequence", first),
            "chunk_count = T.ceildiv(length, CHUNK)",
            f"for {'place' if forward else 'turn'} in T.serial(chunk_count):",
            *(f"    {line}" if line else "" for line in inner),
            "",
            *self._kept(state, "store", "sequence", last),
            *(self._write_faults() if self.phase.reports else []),
        ]

    # -- states that are written down

    def _kept(self, state: Tile, what: str, dim: str, tensor: str = "") -> list[str]:
        """A state from a tensor of them, or to it."""
        name = tensor or {STATE: "states", D_STATE: "d_states"}[state]
        here = f"{name}[{dim}, head, di, dv_idx]"
        inside = " & ".join(self.inside(("d", "dv")))
        store = (
            [f"if {inside}:", f"    {here} = {state.name}[di, vi]"]
            if inside
            else [f"{here} = {state.name}[di, vi]"]
        )
        load = [f"{state.name}[di, vi] = {f'T.if_then_else({inside}, {here}, 0.0)' if inside else here}"]
        lines = self.nest_of(("d", "dv"), [], lambda _: load if what == "load" else store, {})
        if self.has_last(state):
            lines += self._kept_last(state, what, name, dim, tensor)
        depth, self.depth = self.depth, 0 if tensor else self.depth
        lines = self.folded(lines)
        self.depth = depth
        return lines

    def _kept_last(self, state: Tile, what: str, name: str, dim: str, tensor: str) -> list[str]:
        """The column beyond those of v. Its gradient has one for each program; a call's own is the first's."""
        shared = state is STATE or tensor == "d_final"
        column = "DIM_V" if shared or not self.parted else "DIM_V + part"
        first_only = not (state is D_STATE and tensor != "d_final") and self.parted
        if what == "load" and tensor != "d_final":
            first_only = False
        inside = [*self.inside(("d",)), *(["part == 0"] if first_only else [])]
        condition = " & ".join(f"({c})" for c in inside) if len(inside) > 1 else "".join(inside)
        element, here = f"{state.last.name}[di]", f"{name}[{dim}, head, di, {column}]"
        store = [f"if {condition}:", f"    {here} = {element}"] if condition else [f"{here} = {element}"]
        value = f"T.if_then_else({condition}, {here}, 0.0)" if condition else here
        return self.nest_of(("d",), [], lambda _: [f"{element} = {value}"] if what == "load" else store, {})

    # -- decays that are none

    def _begin_faults(self) -> list[str]:
        self.buffer("fault", ("q",), DType.INT)
        return ["for qi in each(CHUNK):", f"    fault[qi] = {NO_FAULT}"]

    def _report(self) -> list[str]:
        (g,) = {s.fault.name for s in self.phase.body if isinstance(s, Rows) and s.fault is not None}
        rows = "row_" if self.vector else ""
        return ["", "# -- decays that are none", f"note_{rows}faults(fault, {g}, chunk_start, count)"]

    def _write_faults(self) -> list[str]:
        head = "if part == 0:" if self.parted else ""
        body = [
            "for _ in each(1):",
            "    for qi in T.serial(1, CHUNK):",
            "        fault[0] = T.min(fault[0], fault[qi])",
            "    faults[sequence, head] = fault[0]",
        ]
        return [head, *(f"    {line}" for line in body)] if head else body


def _changed_by(s: object) -> set[str]:
    """Names of the tiles that a statement sets or adds to."""
    match s:
        case Rows(values):
            return {t.name for t, _ in values}
        case Gram(to) | Scale(to):
            return {to.name}
        case _:
            return {
                t.name
                for name in ("to", "state", "d_x", "d_y", "d_decay", "d_matrix")
                if isinstance(t := getattr(s, name, None), Tile)
            }


def _legal(names: Sequence[str], taken: set[str]) -> dict[str, str]:
    """Captured names that the file has taken, with an underscore behind them."""
    found, taken = dict[str, str](), set(taken)
    for name in names:
        legal = name
        while legal in taken:
            legal += "_"
        found[name] = legal
        taken.add(legal)
    return found

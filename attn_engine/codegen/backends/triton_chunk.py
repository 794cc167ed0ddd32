"""Triton of chunk programs: one file for each direction, a kernel for each phase (codegen/lower/chunk_phases.py)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

from attn_engine.codegen.backends.device_library import device_functions, functions_called
from attn_engine.codegen.backends.triton_chunk_params import (
    GROUPS,
    ChunkOptions,
    ChunkTensor,
    phase_tensors,
)
from attn_engine.codegen.backends.triton_chunk_rows import written_by
from attn_engine.codegen.backends.triton_chunk_statements import ChunkStatements
from attn_engine.codegen.backends.triton_functions import HELPERS, helper_lines
from attn_engine.codegen.backends.triton_layout import WIDTH, wrapped
from attn_engine.codegen.backends.triton_types import TYPES
from attn_engine.codegen.lower.chunk_phases import ChunkPhase, names_read
from attn_engine.codegen.lower.columns import padded
from attn_engine.ir.chunk import D_STATE, STATE, Decays, Gram, GramGradient, Rows, Tile, Within, tiles_of
from attn_engine.ir.ops import Storage

LIBRARY = "chunk.triton"
_OWN = frozenset(
    """tl triton float row step inside d_idx dv_idx part sequence head batch first length chunk turn
    chunk_start count token t about query key value d_output beta decay chunks sequences faults
    fault bad place chunk_count on_token through q_group k_group CHUNK
    LEVELS ELEMENT PRODUCTS EXACT SUMS COMPUTE D BLOCK_D DV BLOCK_DV PARTS NO_FAULT
    decay_sums_before decay_sums_end erased_inverse""".split()
)


def render_chunk_triton(
    phases: Sequence[ChunkPhase], options: Sequence[ChunkOptions], header: tuple[str, ...] = ()
) -> str:
    """The text of a Python file that defines a `@triton.jit` function for each phase; options: one for each."""
    renderers = [PhaseRenderer(p, o) for p, o in zip(phases, options, strict=True)]
    kernels = [r.kernel_lines() for r in renderers]
    text = "\n".join(line for lines in kernels for line in lines)
    library = functions_called(LIBRARY, text)
    text = "\n".join([text, *library])
    used = {name for name in HELPERS if re.search(rf"\b{name}\(", text)}
    launches = [
        f"launch {p.name} with num_warps={o.num_warps}, num_stages={o.num_stages}"
        for p, o in zip(phases, options, strict=True)
    ]
    lines = [
        *(f"# {line}" for line in (*header, *launches)),
        "import triton",
        "import triton.language as tl",
        "",
        *_constants(phases[0], options, text),
        "",
        "",
        *library,
        *helper_lines(used, phases[0].program.element),
        *(line for kernel in kernels for line in [*kernel, "", ""]),
    ]
    return "\n".join(line.rstrip() for line in lines).rstrip() + "\n"


def _constants(phase: ChunkPhase, options: Sequence[ChunkOptions], text: str) -> list[str]:
    program, option = phase.program, options[0]
    element = TYPES[program.element]
    compute = "float64" if program.element is Storage.FLOAT64 else "float32"
    short = element not in ("float32", "float64")
    values = {
        "CHUNK": option.chunk,
        "LEVELS": option.chunk.bit_length() - 1,
        "BLOCK_D": padded(program.dim_qk),
        "BLOCK_DV": option.columns_of(program),
        "PARTS": option.parts(program),
        "ELEMENT": f"tl.{element}",
        "COMPUTE": f"tl.{compute}",
        "PRODUCTS": '"tf32"' if short else '"ieee"',
        "EXACT": f'"{option.exact if short else "ieee"}"',
        "SUMS": '"tf32"' if short and option.exact != "ieee" else '"ieee"',
        "NO_FAULT": 2**31 - 1,
    }
    return [f"{n} = tl.constexpr({x})" for n, x in values.items() if re.search(rf"\b{n}\b", text)]


@lru_cache(maxsize=1024)
def chunk_arguments(phase: ChunkPhase, options: ChunkOptions) -> tuple[str, ...]:
    """The rendered kernel's arguments in order: tensors, strides, sizes of captured tensors, numbers."""
    renderer = PhaseRenderer(phase, options)
    renderer.kernel_lines()
    return tuple(name for group in renderer.groups for name in group)


class PhaseRenderer(ChunkStatements):
    """Prints the kernel of one phase; use a fresh one for each."""

    groups: list[list[str]]  # the arguments, one line of the signature each

    def __init__(self, phase: ChunkPhase, options: ChunkOptions) -> None:
        super().__init__()
        self.phase, self.program, self.options = phase, phase.program, options
        self.tensors = {t.name: t for t in phase_tensors(phase)}
        self.spelled = self._legal_names()
        self._inverses = {}
        self.live = self._live()
        self.prepare(self._names() | set(self.spelled.values()))
        self._depth = 2 if phase.carried is not None else 1

    def _live(self) -> set[str]:
        """What statements other than those that make it read."""
        found: set[str] = set()
        for s in self.phase.body:
            if not isinstance(s, Decays):
                found |= {t.name for t in tiles_of(s)}
            if isinstance(s, Gram | GramGradient) and isinstance(s.within, Within) and s.within.exclusive:
                found.add(f"{s.within.sums.name}_before")
        return found

    def _names(self) -> set[str]:
        """Names that belong to the file."""
        own = {
            n for t in self.tensors.values() if not t.captured for n in (t.name, f"{t.name}_rows", *t.strides)
        }
        return own | _OWN | set(HELPERS) | set(device_functions(LIBRARY)) | written_by(self.phase.tiles())

    def _legal_names(self) -> dict[str, str]:
        """Captured names that the file has taken, with an underscore behind them."""
        captured = [c.name for c in self.program.captures] + [v.name for v in self.program.scalars]
        taken, found = self._names(), dict[str, str]()
        for name in captured:
            legal = name
            while legal in taken:
                legal += "_"
            found[name] = legal
            taken = taken | {legal}
        return found

    # -- the kernel

    def kernel_lines(self) -> list[str]:
        body = self._loop() if self.phase.carried is not None else self._single()
        position = _read([*self._position(), *body])
        self.groups = self._grouped("\n".join(position))
        return [
            *self._decorator(),
            f"def {self.phase.name}(",
            *(f"    {line}" for group in self.groups for line in _listed(group)),
            "):  # fmt: skip",
            *(f"    {line}" if line else "" for line in position),
        ]

    def _decorator(self) -> list[str]:
        """Strides of states and sizes change from call to call: no recompilation for their values."""
        numbers = {n for t in self.tensors.values() for n in t.sizes} | {
            self.spelled[v.name] for v in self.program.scalars
        }
        fixed = [n for group in self.groups for n in group if n in numbers]
        names = ", ".join(f'"{n}"' for n in fixed)
        return [f"@triton.jit(do_not_specialize=[{names}])" if fixed else "@triton.jit"]

    def _grouped(self, text: str) -> list[list[str]]:
        words = set(re.findall(r"\w+", text))
        tensors = [spelled for _, spelled in self.spelled_tensors()]
        groups = [
            [t.name for t in tensors],
            *(list(t.strides) for t in tensors),
            *(list(t.sizes) for t in tensors),
            [*(self.spelled[v.name] for v in self.program.scalars), *GROUPS],
        ]
        return [kept for group in groups if (kept := [n for n in group if n in words])]

    def spelled_tensors(self) -> list[tuple[ChunkTensor, ChunkTensor]]:
        """Every tensor of the phase, and beside it the same as the file calls it."""
        return [
            (t, replace(t, name=self.spelled[t.name]) if t.captured else t) for t in self.tensors.values()
        ]

    def _position(self) -> list[str]:
        """What a program instance works on."""
        lines = [
            f"# -- a {'sequence' if self.phase.carried else 'chunk'}, a head, and a part of the columns of v",
            "part = (tl.program_id(0) % PARTS).to(tl.int64)",
            f"{'sequence' if self.phase.carried else 'chunk'} = (tl.program_id(0) // PARTS).to(tl.int64)",
            "head = tl.program_id(1).to(tl.int64)",
            "row = tl.arange(0, CHUNK)",
        ]
        lines.append(
            f"step = {'-row  # tokens are taken from the last to the first' if self.program.reverse else 'row'}"
        )
        lines += [
            "d_idx = tl.arange(0, BLOCK_D)",
            "dv_idx = part.to(tl.int32) * BLOCK_DV + tl.arange(0, BLOCK_DV)",
        ]
        return lines

    def _tokens(self) -> list[str]:
        """The tokens of a chunk: which there are, and where the first of them lies."""
        place = "first + length - 1 - chunk_start" if self.program.reverse else "first + chunk_start"
        return ["inside = row < length - chunk_start", f"token = {place}", "t = token.to(tl.int32) + step"]

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
        statements = self._statements()
        return [
            "about = chunks + chunk * 4",
            "batch, first = tl.load(about).to(tl.int64), tl.load(about + 1).to(tl.int64)",
            "length, chunk_start = tl.load(about + 2), tl.load(about + 3)",
            *self._tokens(),
            *statements,
        ]

    def _loop(self) -> list[str]:
        assert self.phase.carried is not None
        state, forward = self.phase.carried, self.phase.carried is STATE
        counter = "place" if forward else "turn"
        first, last = ("initial", "final") if forward else ("d_final", "d_initial")
        statements = self._statements()
        inner = [
            *([] if forward else ["place = chunk_count - 1 - turn"]),
            "chunk, chunk_start = first_chunk + place, place * CHUNK",
            *self._tokens(),
            *self._kept(state, "store", "chunk"),
            *statements,
            *(self._report() if self.phase.reports else []),
        ]
        inner = _read(inner)
        return [
            "about = sequences + sequence * 4",
            "batch, first = tl.load(about).to(tl.int64), tl.load(about + 1).to(tl.int64)",
            "length, first_chunk = tl.load(about + 2), tl.load(about + 3).to(tl.int64)",
            *self._kept(state, "load", "sequence", first),
            *(["fault = NO_FAULT"] if self.phase.reports else []),
            "chunk_count = tl.cdiv(length, CHUNK)",
            f"for {counter} in tl.range(0, chunk_count):",
            *(f"    {line}" if line else "" for line in inner),
            "",
            *self._kept(state, "store", "sequence", last),
            *(self._write_fault() if self.phase.reports else []),
        ]

    def _kept(self, state: Tile, what: str, dim: str, tensor: str = "") -> list[str]:
        """A state from a tensor of them, or to it."""
        name = tensor or {STATE: "states", D_STATE: "d_states"}[state]
        base = f"{name} + {dim} * {name}_{dim}_stride + head * {name}_head_stride"
        rows = f"{name}_base + d_idx * {name}_row_stride"
        place = f"{name}_base + (d_idx[:, None] * {name}_row_stride + dv_idx[None, :] * {name}_column_stride)"
        mask, row_mask = self.mask(("d", "dv")), self.mask(("d",))
        lines = [f"{name}_base = {base}"]
        last = self.has_last(state)
        if what == "load":
            other = f", mask={mask}, other=0.0" if mask else ""
            lines.append(f"{state.name} = tl.load({place}{other}){self._widen}")
        else:
            lines.append(f"tl.store({place}, {state.name}{f', mask={mask}' if mask else ''})")
        if last:
            lines += self._kept_last(state, what, tensor, rows, row_mask)
        depth = 1 if tensor or self.phase.carried is None else 2
        return [piece for line in lines for piece in wrapped(line, depth)]

    @property
    def _widen(self) -> str:
        return f".to(tl.{self.compute})"

    def _kept_last(self, state: Tile, what: str, tensor: str, rows: str, mask: str) -> list[str]:
        """The column beyond those of v. Its gradient has one for each program; a call's own is the first's."""
        name = tensor or {STATE: "states", D_STATE: "d_states"}[state]
        shared = state is STATE or tensor == "d_final"
        column = f"{self.program.dim_v}" if shared else f"({self.program.dim_v} + part)"
        place = f"{rows} + {column} * {name}_column_stride"
        only = "" if state is D_STATE and tensor != "d_final" else "part == 0"
        if what == "load":
            only = only if tensor == "d_final" else ""
            conditions = " & ".join(f"({c})" for c in (mask, only) if c)
            other = f", mask={conditions}, other=0.0" if conditions else ""
            return [f"{state.last.name} = tl.load({place}{other}){self._widen}"]
        conditions = " & ".join(f"({c})" for c in (mask, only) if c)
        return [f"tl.store({place}, {state.last.name}{f', mask={conditions}' if conditions else ''})"]

    # -- decays that are none

    def _report(self) -> list[str]:
        (g,) = {s.fault.name for s in self.phase.body if isinstance(s, Rows) and s.fault is not None}
        inside, each = ("inside[:, None]", "[:, None]") if self.vector else ("inside", "")
        if self.vector:
            inside = self.mask(("q", "d"))
        return [
            "",
            "# -- decays that are none: twice the token's place, and 1 more for -inf",
            f'bad = ({inside}) & (({g} <= 0.0) & ({g} > float("-inf")) == 0)',
            f'places = 2 * (chunk_start + row{each}) + ({g} == float("-inf")).to(tl.int32)',
            "fault = tl.minimum(fault, tl.min(tl.where(bad, places, NO_FAULT)))",
        ]

    def _write_fault(self) -> list[str]:
        return [
            "tl.store(faults + sequence * faults_sequence_stride + head * faults_head_stride, fault, mask=part == 0)"
        ]

    def fold(self, line: str) -> list[str]:
        return wrapped(line, self._depth)


def _listed(names: Sequence[str]) -> list[str]:
    """Arguments on lines of the file's width."""
    lines, line = list[str](), ""
    for name in names:
        if line and len(line) + len(name) + 2 > WIDTH - 4:
            lines.append(line.rstrip())
            line = ""
        line += f"{name}, "
    return [*lines, line.rstrip()]


def _read(lines: list[str]) -> list[str]:
    """The lines without those that name something which nobody reads."""
    while True:
        text = "\n".join(lines)
        kept = [line for line in lines if not _unread(line, text)]
        if len(kept) == len(lines):
            return lines
        lines = kept


def _unread(line: str, text: str) -> bool:
    found = re.match(r"\s*(t|step|d_idx|dv_idx|token|batch|part) = ", line)
    return found is not None and len(re.findall(rf"\b{found[1]}\b", text)) == 1

"""What a generated Triton chunk kernel is given: the contract between its text and its launcher."""

from __future__ import annotations

from dataclasses import dataclass

from attn_engine.codegen.lower.chunk_phases import ChunkPhase, columns_are_independent
from attn_engine.codegen.lower.columns import padded
from attn_engine.ir.chunk import STATE, RowOutput
from attn_engine.ir.linear import LinearProgram, Rank
from attn_engine.ir.ops import Storage

# Numbers behind the tensors: heads of v for one of q, and of k.
GROUPS = ("q_group", "k_group")


@dataclass(frozen=True, slots=True)
class ChunkOptions:
    """How a phase is spelled, compiled and launched.

    chunk: tokens. columns: of the state that one program has, a power of two; None: all. num_warps, num_stages: of the
    compiler. exact: input precision of products that must not round their float32 operands.
    """

    chunk: int = 64
    columns: int | None = None
    num_warps: int = 4
    num_stages: int = 1
    exact: str = "ieee"

    def columns_of(self, program: LinearProgram) -> int:
        """Columns of the state that one program has; all where a function reads whole rows of v."""
        every = padded(program.dim_v)
        return min(self.columns or every, every) if columns_are_independent(program) else every

    def parts(self, program: LinearProgram) -> int:
        """Programs that share the columns of one state."""
        return -(-program.dim_v // self.columns_of(program))


@dataclass(frozen=True, slots=True)
class ChunkTensor:
    """A tensor argument. dims: what its dimensions count, outermost first: their strides are arguments too. Captured
    tensors have numbered dimensions, whose sizes are arguments as well."""

    name: str
    storage: Storage
    dims: tuple[str, ...]
    output: bool = False
    captured: bool = False

    @property
    def strides(self) -> tuple[str, ...]:
        middle = "stride_" if self.captured else ""
        return tuple(f"{self.name}_{middle}{d}{'' if self.captured else '_stride'}" for d in self.dims)

    @property
    def sizes(self) -> tuple[str, ...]:
        return tuple(f"{self.name}_size_{d}" for d in self.dims) if self.captured else ()


ROWS = ("batch", "head", "token", "column")
SEQUENCE_STATES = ("sequence", "head", "row", "column")
CHUNK_STATES = ("chunk", "head", "row", "column")


def phase_tensors(phase: ChunkPhase) -> tuple[ChunkTensor, ...]:
    """The tensors of a phase in order; its text leaves out those that it does not read."""
    program, element = phase.program, phase.program.element
    compute = Storage.FLOAT64 if element is Storage.FLOAT64 else Storage.FLOAT32
    found = [ChunkTensor(name, element, ROWS) for name in "QKV"]
    found.append(ChunkTensor("dO", element, ROWS))
    if program.decay_given is not Rank.NONE:
        dims = {Rank.HEAD: ("head",), Rank.TOKEN: ROWS[:3], Rank.VECTOR: ROWS}[program.decay_given]
        found.append(ChunkTensor("decay_given", program.decay_storage, dims))
    if program.beta_storage is not None:
        found.append(ChunkTensor("beta_given", program.beta_storage, ROWS[:3]))
    for c in program.captures:
        found.append(ChunkTensor(c.name, c.storage, tuple(map(str, range(c.rank))), captured=True))
    if phase.carried is not None:
        first, last = ("initial", "final") if phase.carried is STATE else ("d_final", "d_initial")
        found.append(ChunkTensor(first, compute, SEQUENCE_STATES))
        found.append(ChunkTensor(last, compute, SEQUENCE_STATES, output=True))
    found += [ChunkTensor("states", compute, CHUNK_STATES), ChunkTensor("d_states", compute, CHUNK_STATES)]
    for w in phase.outputs:
        found.append(ChunkTensor(w.tensor, compute, output_dims(w), output=True))
    found.append(ChunkTensor("sequences", Storage.INT32, ()))
    found.append(ChunkTensor("chunks", Storage.INT32, ()))
    found.append(ChunkTensor("faults", Storage.INT32, ("sequence", "head"), output=True))
    return tuple(found)


def output_dims(w: RowOutput) -> tuple[str, ...]:
    """A sum over the columns of v is written in parts, one for each program that has some of them; a sum over tokens is
    written chunk by chunk."""
    part = () if "dv" in w.axes else ("part",)
    rows = ("batch", "head", "token") if "q" in w.axes else ("chunk", "head")
    return (*part, *rows, *(("column",) if set(w.axes) & {"d", "dv"} else ()))

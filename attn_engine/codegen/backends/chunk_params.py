"""What a generated chunk kernel is given: the contract between its text and its launcher."""

from __future__ import annotations

from dataclasses import dataclass

from attn_engine.ir.chunk import ChunkKernel, RowOutput
from attn_engine.ir.linear import Rank
from attn_engine.ir.ops import Storage

# Tokens between two states that the forward pass keeps for the backward: a multiple of every chunk.
SEGMENT_TOKENS = 512
# Numbers behind the tensors, in order. `sequences` holds (batch element, first token, length, first segment) of each.
SIZES = ("sequence_count", "heads", "q_heads", "k_heads", "keep_states", "position")


@dataclass(frozen=True, slots=True)
class ChunkParam:
    """A tensor argument of a chunk kernel."""

    name: str
    storage: Storage
    rank: int
    output: bool = False


def chunk_params(kernel: ChunkKernel) -> tuple[ChunkParam, ...]:
    """The tensors of a kernel, in order: what its `Arguments` hold."""
    program, element = kernel.program, kernel.program.element
    compute = Storage.FLOAT64 if element is Storage.FLOAT64 else Storage.FLOAT32
    found = [ChunkParam(name, element, 4) for name in "QKV"]
    if program.decay_given is not Rank.NONE:
        rank = {Rank.HEAD: 1, Rank.TOKEN: 3, Rank.VECTOR: 4}[program.decay_given]
        found.append(ChunkParam("decay_given", program.decay_storage, rank))
    if program.beta_storage is not None:
        found.append(ChunkParam("beta_given", program.beta_storage, 3))
    found += [ChunkParam(c.name, c.storage, c.rank) for c in program.captures]
    if kernel.gradient:
        found += [ChunkParam("dO", element, 4), ChunkParam("d_final", compute, 4)]
    else:
        found.append(ChunkParam("initial", compute, 4))
    found.append(ChunkParam("kept", compute, 4, output=not kernel.gradient))
    found.append(ChunkParam("d_initial" if kernel.gradient else "final", compute, 4, output=True))
    for w in kernel.outputs:
        found.append(ChunkParam(w.tensor, output_storage(kernel, w), 2 + len(w.axes), output=True))
    found.append(ChunkParam("sequences", Storage.INT64, 2))
    found.append(ChunkParam("faults", Storage.INT64, 2, output=True))
    return tuple(found)


def output_storage(kernel: ChunkKernel, w: RowOutput) -> Storage:
    """How rows are stored: o as v, gradients in the compute type, sums over tokens in double."""
    if w.tensor == "O":
        return kernel.program.element
    if "q" not in w.axes:
        return Storage.FLOAT64
    return Storage.FLOAT64 if kernel.program.element is Storage.FLOAT64 else Storage.FLOAT32

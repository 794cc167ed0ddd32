"""How chunk kernels are cut and launched on a GPU: tokens of a chunk, columns of the state for one program, warps."""

from __future__ import annotations

from dataclasses import dataclass, replace

from attn_engine.codegen.backends.triton_chunk_params import ChunkOptions
from attn_engine.codegen.targets import Target
from attn_engine.ir.linear import LinearProgram, Rank


@dataclass(frozen=True, slots=True)
class ChunkSchedule:
    """Options of the two phases of the forward pass, and of the three of the backward pass.

    A direction's phases agree on chunks and columns.
    """

    forward: tuple[ChunkOptions, ChunkOptions]
    backward: tuple[ChunkOptions, ChunkOptions, ChunkOptions]


def chunk_schedule(program: LinearProgram, target: Target, chunk: int | None) -> ChunkSchedule:
    """The default for a target; chunk: tokens, where the user says how many.

    The largest chunks whose kernels the compilers keep in registers: fewer chunks are fewer states to write and read.
    What every pair of tokens needs (a vector decay, an inverse) takes more of them than the products themselves.
    """
    exact = "ieee" if target.amd else "tf32x3"
    wide, vector = program.dim_qk > 64, program.rank is Rank.VECTOR
    pairs = program.corrected or vector
    warps = 8 if pairs or wide else 4
    tokens = chunk or (16 if program.corrected else 32 if vector else 64)
    forward = ChunkOptions(tokens, 64, warps, 1, exact)
    tokens = chunk or (16 if pairs else 64 if program.rank is Rank.NONE else 32)
    backward = ChunkOptions(tokens, 32 if program.corrected and wide else 64, warps, 1, exact)
    return ChunkSchedule((forward, forward), (backward, backward, replace(backward, num_warps=8)))


def interpreter_schedule(schedule: ChunkSchedule) -> ChunkSchedule:
    """The interpreter's cost is per step, nearly whatever the tile: one program has all columns."""
    first, second = schedule.forward
    a, b, c = schedule.backward
    return ChunkSchedule(
        (replace(first, columns=None), replace(second, columns=None)),
        (replace(a, columns=None), replace(b, columns=None), replace(c, columns=None)),
    )


def tilelang_chunk_schedule(program: LinearProgram, chunk: int | None) -> ChunkSchedule:
    """The default of TileLang's kernels, whose tiles all lie in shared memory, of which an H100 has 227 KiB a block."""
    tokens = chunk or (64 if program.dim_qk <= 64 and not program.corrected else 32)
    forward = ChunkOptions(tokens, 64, 4)
    crowded = program.corrected and program.rank is Rank.VECTOR and program.dim_qk > 64
    backward = ChunkOptions(chunk or 32, 32 if crowded else 64, 4)
    return ChunkSchedule((forward, forward), (backward, backward, backward))

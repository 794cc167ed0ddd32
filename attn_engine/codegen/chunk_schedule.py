"""How chunk kernels are cut and launched on a GPU: tokens of a chunk, columns of the state for one program, warps."""

from __future__ import annotations

from dataclasses import dataclass, replace

from attn_engine.codegen.backends.triton_chunk_params import ChunkOptions
from attn_engine.codegen.targets import Target
from attn_engine.ir.linear import LinearProgram


@dataclass(frozen=True, slots=True)
class ChunkSchedule:
    """Options of the two phases of the forward pass, and of the three of the backward pass.

    A direction's phases agree on chunks and columns.
    """

    forward: tuple[ChunkOptions, ChunkOptions]
    backward: tuple[ChunkOptions, ChunkOptions, ChunkOptions]


def chunk_schedule(program: LinearProgram, target: Target, chunk: int | None) -> ChunkSchedule:
    """The default for a target; chunk: tokens, where the user says how many."""
    exact = "ieee" if target.amd else "tf32x3"
    forward = ChunkOptions(chunk or 64, 64, 4, 2, exact)
    backward = ChunkOptions(chunk or 64, 64, 4, 1, exact)
    heavy = replace(backward, num_warps=8)
    return ChunkSchedule((forward, forward), (backward, backward, heavy))


def interpreter_schedule(schedule: ChunkSchedule) -> ChunkSchedule:
    """The interpreter's cost is per step, nearly whatever the tile: one program has all columns."""
    first, second = schedule.forward
    a, b, c = schedule.backward
    return ChunkSchedule(
        (replace(first, columns=None), replace(second, columns=None)),
        (replace(a, columns=None), replace(b, columns=None), replace(c, columns=None)),
    )

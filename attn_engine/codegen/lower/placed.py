"""Placed programs: a kernel whose tiles live in buffers of a named memory, every copy and product a statement.

    stmt   = Section(title) | Let(name, value, source)
           | Steps(var, first, stop, body, pipelined) | Branch(condition, body)
           | Fill(buffer, value) | CopyIn(buffer, load) | CopyOut(tensor, indices, buffer) | Copy(target, source)
           | Gemm(target, left, right, transpose_left, transpose_right, clear) | ReduceInto(target, kind, source, axis)
           | Map(axes, steps)
    step   = Let | StoreTile | Accumulate
    kernel = PlacedKernel(kernel, buffers, body, waits)

Names of buffers are read as tiles in a Map and as whole buffers elsewhere; a Let outside a Map holds one number. A Let
in a Map writes an element of the buffer of that name, or a number of that trip where there is no such buffer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from attn_engine.ir.expr import Expr, Load
from attn_engine.ir.ops import DType
from attn_engine.ir.tile import Accumulate, Kernel, Let, Section, StoreTile


class Scope(Enum):
    """Where a buffer lies."""

    SHARED = "shared"  # memory of the block: what copies fill and products read
    FRAGMENT = "fragment"  # registers, spread over the threads: accumulators, rows, everything computed


@dataclass(frozen=True, slots=True)
class Buffer:
    """A tile's place. axes: its dimensions, in order."""

    name: str
    scope: Scope
    axes: tuple[str, ...]
    dtype: DType


@dataclass(frozen=True, slots=True)
class Steps:
    """`var` counts from first to stop. pipelined: its copies into shared memory run ahead of the products."""

    var: str
    first: Expr
    stop: Expr
    body: tuple[Placed, ...]
    pipelined: bool


@dataclass(frozen=True, slots=True)
class Branch:
    """A branch that the whole block takes."""

    condition: Expr
    body: tuple[Placed, ...]


@dataclass(frozen=True, slots=True)
class Fill:
    buffer: str
    value: float


@dataclass(frozen=True, slots=True)
class CopyIn:
    """A tile of a tensor; what lies outside the tensor reads zero. ahead: inside a pipelined loop."""

    buffer: str
    load: Load
    ahead: bool


@dataclass(frozen=True, slots=True)
class CopyOut:
    """A tile to a tensor; what lies outside the tensor is not written."""

    tensor: str
    indices: tuple[Expr, ...]
    buffer: str


@dataclass(frozen=True, slots=True)
class Copy:
    """Buffer to buffer, rounding to the target's type."""

    target: str
    source: str


@dataclass(frozen=True, slots=True)
class Gemm:
    """target += left @ right, each transposed or not; `clear`: target = left @ right."""

    target: str
    left: str
    right: str
    transpose_left: bool
    transpose_right: bool
    clear: bool


@dataclass(frozen=True, slots=True)
class ReduceInto:
    """target = the "max", "min" or "sum" of source along `axis`."""

    target: str
    kind: str
    source: str
    axis: str


Step = Let | StoreTile | Accumulate


@dataclass(frozen=True, slots=True)
class Map:
    """One loop nest over `axes`: every step in order, element by element."""

    axes: tuple[str, ...]
    steps: tuple[Step, ...]


Placed = Section | Let | Steps | Branch | Fill | CopyIn | CopyOut | Copy | Gemm | ReduceInto | Map


@dataclass(frozen=True, slots=True)
class PlacedKernel:
    """The kernel that it was made from says parameters, grid and block sizes.

    waits: whether every loop over tiles runs a trip, which waits for what was copied before it.
    """

    kernel: Kernel
    buffers: tuple[Buffer, ...]
    body: tuple[Placed, ...]
    waits: bool = True

    def buffer(self, name: str) -> Buffer:
        return next(b for b in self.buffers if b.name == name)


def walk_placed(body: tuple[Placed, ...]) -> Iterator[Placed]:
    """Every statement, outer before inner."""
    for s in body:
        yield s
        if isinstance(s, Steps | Branch):
            yield from walk_placed(s.body)

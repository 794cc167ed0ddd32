"""Gradients of captured tensors: where each read of a tensor sends its gradient.

A read `bias[index]` contributes d_bias[index] += d(loss)/d(read), summed over every (batch, head, q, kv) with that
index. How the index depends on the position decides the route, and none needs atomics:
- not on q: one sum per key, made beside dK; the runtime adds keys of equal index in order;
- on q but not on kv: one sum per query row, made beside dQ;
- on both, but only through their distance: one sum per diagonal, added up in memory beside dQ; the runtime sends each
  through the index;
- on both otherwise: every pair in a fixed order, parallel only over axes that are themselves coordinates of the
  index, so no two program instances share an element: in the main kernel where that owns keys, makes all gradients,
  and the key is a coordinate; else in a kernel of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from attn_engine.codegen.lower.score import captured_loads
from attn_engine.codegen.lower.values import (
    COLUMN_SHAPE,
    DIAGONAL_SHAPE,
    KV_LEN,
    Q_LEN,
    Q_ROW,
    ROW_SHAPE,
    SPLIT,
    compute_storage,
    tile,
)
from attn_engine.ir.expr import Expr, Load, Reduce, Var
from attn_engine.ir.passes.distance import by_distance
from attn_engine.ir.program import BATCH, HEAD, KV_IDX, Q_IDX, Attention
from attn_engine.ir.tile import Accumulate, Param


class Route(Enum):
    ROW = "row"
    COLUMN = "column"
    DIAGONAL = "diagonal"
    PAIR = "pair"


@dataclass(frozen=True, slots=True)
class CaptureGradient:
    """One read of a captured tensor: `buffer` receives its gradient in the shape that the route says.

    read: which of the tensor's reads this is, from 1; those by pairs share one buffer.
    """

    load: Load
    route: Route
    buffer: str
    read: int = 1

    @property
    def total(self) -> Var:
        """The running sum of a row or column route."""
        return tile(f"{self.buffer}_sum", "q" if self.route is Route.ROW else "kv")

    @property
    def value(self) -> Var:
        """The name of d(loss)/d(read) in the kernels."""
        ending = f"_{self.read}" if self.route is Route.PAIR and self.read > 1 else ""
        return tile(f"{self.buffer}_tile{ending}", "q", "kv")


def capture_gradients(program: Attention, learned: tuple[str, ...]) -> tuple[CaptureGradient, ...]:
    """Every read of the tensors in `learned`, with its route."""
    found: list[CaptureGradient] = []
    for name in learned:
        for i, load in enumerate(captured_loads(program, name)):
            route = route_of(load)
            ending = "" if route is Route.PAIR else f"_{route.value}s" + (f"_{i + 1}" if i else "")
            found.append(CaptureGradient(load, route, f"d_{name}{ending}", i + 1))
    return tuple(found)


def route_of(load: Load) -> Route:
    if "q" not in load.axes:
        return Route.COLUMN  # also where it depends on neither: a CPU's backward pass has a key per lane
    if "kv" not in load.axes:
        return Route.ROW
    return Route.PAIR if any(by_distance(i) is None for i in load.indices) else Route.DIAGONAL


def diagonal(lanes_axis: str) -> Expr:
    """The place of a pair's diagonal among all of them; neighbouring lanes have neighbouring places."""
    return KV_IDX - Q_IDX + (Q_LEN - 1) if lanes_axis == "kv" else Q_IDX - KV_IDX + (KV_LEN - 1)


def buffer_param(program: Attention, gradient: CaptureGradient, *, parts: bool = False) -> Param:
    """The kernel parameter that a gradient is written to; `parts`: one slice per split of the kv axis."""
    storage = compute_storage(program)
    match gradient.route:
        case Route.ROW:
            return Param(gradient.buffer, storage, ("splits", *ROW_SHAPE) if parts else ROW_SHAPE, True)
        case Route.COLUMN:
            return Param(gradient.buffer, storage, COLUMN_SHAPE, True)
        case Route.DIAGONAL:
            return Param(gradient.buffer, storage, DIAGONAL_SHAPE, True)
        case Route.PAIR:
            rank = len(gradient.load.indices)
            sizes = tuple(f"{gradient.load.tensor}_size_{i}" for i in range(rank))
            return Param(gradient.buffer, storage, sizes, True)


def parallel_axes(load: Load, wanted: str) -> tuple[str, ...]:
    """Grid axes along which program instances write disjoint elements: coordinates of the index itself.

    One of "q" and "kv" is enough; `wanted` where there are both.
    """
    axes = [axis for axis, position in (("kv", KV_IDX), ("q", Q_IDX)) if position in load.indices]
    axes = [wanted] if wanted in axes else axes
    return (*axes, *(axis for axis, var in (("head", HEAD), ("batch", BATCH)) if var in load.indices))


def distinct_within_tile(load: Load) -> bool:
    """Whether the pairs of one tile all write different elements (needed where additions run side by side)."""
    positions: list[Expr] = [Q_IDX, KV_IDX]
    return all(p in load.indices for p in positions)


def runs_side_by_side(captures: tuple[CaptureGradient, ...]) -> CaptureGradient | None:
    """A pair gradient whose tile may write one element twice: only a backend that adds in order can compute it."""
    clashes = (
        c.route is Route.DIAGONAL or (c.route is Route.PAIR and not distinct_within_tile(c.load))
        for c in captures
    )
    return next((c for c, clash in zip(captures, clashes, strict=True) if clash), None)


def added_beside_keys(c: CaptureGradient) -> bool:
    """Whether a kernel that owns keys and makes all gradients can add this one up in memory.

    Each split has its own slice of sums per row and per diagonal; pairs need a key as a coordinate of the index.
    """
    match c.route:
        case Route.ROW | Route.DIAGONAL:
            return True
        case Route.COLUMN:
            return False
        case Route.PAIR:
            return KV_IDX in c.load.indices


def shared_axes(parts: list[CaptureGradient]) -> tuple[str, ...]:
    """Axes along which pairs meet in one element of a gradient: a program instance runs over them, in order."""
    reads = [c.load for c in parts if c.route is Route.PAIR]
    coordinates = (("kv_head", HEAD), ("batch", BATCH))
    return tuple(axis for axis, var in coordinates if any(var not in load.indices for load in reads))


def add_part(c: CaptureGradient, lanes_axis: str) -> Accumulate:
    """Add a tile's part of a gradient; sums per row and per diagonal have a slice for each split."""
    match c.route:
        case Route.ROW:
            return Accumulate(c.buffer, (SPLIT, *Q_ROW), Reduce("sum", c.value, "kv"))
        case Route.DIAGONAL:
            return Accumulate(c.buffer, (SPLIT, BATCH, HEAD, diagonal(lanes_axis)), c.value)
        case Route.PAIR | Route.COLUMN:
            return Accumulate(c.buffer, c.load.indices, c.value)

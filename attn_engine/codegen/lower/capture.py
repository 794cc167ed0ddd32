"""Gradients of captured tensors: where each read of a tensor sends its gradient.

A read `bias[index]` contributes d_bias[index] += d(loss)/d(read), summed over every (batch, head, q, kv) with that
index. How the index depends on the position decides the route, and none needs atomics:
- not on q: one sum per key, made beside dK; the runtime adds keys of equal index in order;
- on q but not on kv: one sum per query row, made beside dQ;
- on both: a kernel of its own that adds every pair in a fixed order, parallel only over axes that are themselves
  coordinates of the index, so no two program instances share an element.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from attn_engine.codegen.lower.score import captured_loads
from attn_engine.codegen.lower.values import COLUMN_SHAPE, ROW_SHAPE, compute_storage, tile
from attn_engine.ir.expr import Expr, Load, Var
from attn_engine.ir.program import BATCH, HEAD, KV_IDX, Q_IDX, Attention
from attn_engine.ir.tile import Param


class Route(Enum):
    ROW = "row"
    COLUMN = "column"
    PAIR = "pair"


@dataclass(frozen=True, slots=True)
class CaptureGradient:
    """One read of a captured tensor: `buffer` receives its gradient in the shape that the route says.

    per_pair: what is summed, for a read by the row rule; None: what score_mod's derivative says.
    """

    load: Load
    route: Route
    buffer: str
    per_pair: Expr | None = None

    @property
    def total(self) -> Var:
        """The running sum of a row or column route."""
        return tile(f"{self.buffer}_sum", "q" if self.route is Route.ROW else "kv")

    @property
    def value(self) -> Var:
        """The name of d(loss)/d(read) in the kernels."""
        return tile(f"{self.buffer}_tile", "q", "kv")


def capture_gradients(program: Attention, learned: tuple[str, ...]) -> tuple[CaptureGradient, ...]:
    """Every read of the tensors in `learned`, with its route."""
    found: list[CaptureGradient] = []
    for name in learned:
        for i, load in enumerate(captured_loads(program, name)):
            route = route_of(load)
            ending = "" if route is Route.PAIR else f"_{route.value}s" + (f"_{i + 1}" if i else "")
            found.append(CaptureGradient(load, route, f"d_{name}{ending}"))
    for i, p in enumerate(program.rule.parameters):
        if p.load.tensor in learned and p.per_pair is not None:
            route = route_of(p.load)
            buffer = f"d_{p.load.tensor}_rule_{route.value}s" + (f"_{i + 1}" if i else "")
            found.append(CaptureGradient(p.load, route, buffer, per_pair=p.per_pair))
    return tuple(found)


def route_of(load: Load) -> Route:
    if "q" not in load.axes:
        return Route.COLUMN  # also where it depends on neither: a CPU's backward pass has a key per lane
    return Route.ROW if "kv" not in load.axes else Route.PAIR


def buffer_param(program: Attention, gradient: CaptureGradient, *, parts: bool = False) -> Param:
    """The kernel parameter that a gradient is written to; `parts`: one slice per split of the kv axis."""
    storage = compute_storage(program)
    match gradient.route:
        case Route.ROW:
            return Param(gradient.buffer, storage, ("splits", *ROW_SHAPE) if parts else ROW_SHAPE, True)
        case Route.COLUMN:
            return Param(gradient.buffer, storage, COLUMN_SHAPE, True)
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

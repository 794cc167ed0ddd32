"""Whether every index of a captured tensor stays inside it, and every integer inside 32 bits, in one call.

Kernels clamp indices, so memory is safe whatever a function does; this check is what makes a wrong index an error
instead of a wrong number. In order of cost:

1. ranges from the sizes of the call, the captured numbers and the contents of captured integer tensors;
2. where a mask hides pairs: what its linear conditions imply for the visible ones (a causal mask and `q_idx - kv_idx`);
3. the index itself, evaluated at every visible pair, a block at a time. This is exact, and left out where it would take
   more than MOST_ELEMENTS evaluations (positions on which neither index nor mask depends count once): then only an
   index that is a position itself is refused.

A pair counts as visible for a tensor read by score_mod where the mask keeps it; for one that the mask reads, where the
rest of the mask's `&`-terms keep it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from attn_engine.errors import IndexNegative, IndexOutOfRange, IntegerOverflow
from attn_engine.ir.expr import Expr, Load, Var, loads, postorder, variables
from attn_engine.ir.ops import DType, Number
from attn_engine.ir.passes.bounds import (
    INT_LIMITS,
    Bounds,
    conjuncts,
    index_bounds,
    integer_bounds,
    proved_inside,
)
from attn_engine.ir.printer import format_expr
from attn_engine.ir.program import BATCH, HEAD, KV_IDX, Q_IDX, Captured, ScalarFn
from attn_engine.locations import Location
from attn_engine.runtime.dense import evaluate_dense

MOST_ELEMENTS = 2**22
BLOCK_ELEMENTS = 2**18
POSITIONS = {BATCH: "batches", HEAD: "heads", Q_IDX: "q_len", KV_IDX: "kv_len"}


@dataclass(frozen=True, slots=True)
class CallValues:
    """What is known of one call: its captured tensors and numbers, and its sizes."""

    tensors: Mapping[str, Tensor]
    scalars: Mapping[str, Number]
    sizes: Mapping[str, int]

    @property
    def empty(self) -> bool:
        return any(self.sizes[name] == 0 for name in POSITIONS.values())

    def contents(self, name: str) -> Bounds | None:
        """The smallest and largest element of an integer tensor."""
        x = self.tensors[name]
        if x.is_floating_point() or x.dtype is torch.bool or not x.numel():
            return None
        low, high = torch.aminmax(x)
        return int(low), int(high)


class Functions(Protocol):
    """What is checked: a program, or a mask by itself."""

    @property
    def mask(self) -> ScalarFn | None: ...
    @property
    def functions(self) -> tuple[ScalarFn, ...]: ...
    @property
    def captures(self) -> tuple[Captured, ...]: ...


def check_indices(program: Functions, values: CallValues) -> None:
    """Raise IndexOutOfRange or IntegerOverflow for the first index or integer that leaves its range."""
    if values.empty:
        return
    mask = conjuncts(program.mask.result if program.mask is not None else None)
    for fn in program.functions:
        bounds = integer_bounds(fn.result, values.sizes, values.scalars, values.contents)
        _check_overflow(fn, bounds)
        for load in loads(fn.result):
            demands = mask
            if fn is program.mask:
                demands = tuple(d for d in mask if load not in postorder(d))
            _check_load(fn, load, demands, bounds, values)


def _check_overflow(fn: ScalarFn, bounds: Mapping[Expr, Bounds | None]) -> None:
    for node, found in bounds.items():
        if found is None or node.dtype is not DType.INT:
            continue
        if found[0] < INT_LIMITS[0] or found[1] > INT_LIMITS[1]:
            value = found[0] if found[0] < INT_LIMITS[0] else found[1]
            raise IntegerOverflow(
                expression=format_expr(node), value=value, location=location_of_node(fn, node)
            )


def _check_load(
    fn: ScalarFn,
    load: Load,
    demands: tuple[Expr, ...],
    bounds: Mapping[Expr, Bounds | None],
    values: CallValues,
) -> None:
    shape = values.tensors[load.tensor].shape
    for position, (index, size) in enumerate(zip(load.indices, shape, strict=True)):
        found = bounds[index]
        if found is not None and found[0] >= 0 and found[1] < size:
            continue
        reached = None
        if index in POSITIONS or not demands:
            reached = _outside(index_bounds(index, values.sizes, values.scalars), size)
        if reached is None and not proved_inside(index, size, demands, values.sizes, values.scalars):
            reached = _outside(_visible_range(index, demands, values), size)
        if reached is not None:
            kind = IndexNegative if reached < 0 else IndexOutOfRange
            where = location_of_node(fn, load)
            raise kind(position=position, tensor=load.tensor, index=reached, size=size, location=where)


def _outside(bounds: Bounds | None, size: int) -> int | None:
    """The end of a range that lies outside of a tensor."""
    if bounds is None:
        return None
    return bounds[0] if bounds[0] < 0 else bounds[1] if bounds[1] >= size else None


def _visible_range(index: Expr, demands: tuple[Expr, ...], values: CallValues) -> Bounds | None:
    """The smallest and largest index at a visible pair, exactly; None where nothing is visible or it costs too much."""
    used = {v for e in (index, *demands) for v in variables(e)}
    numbers = {**values.sizes, **values.scalars}
    if any(v not in POSITIONS and v.name not in numbers for v in used):
        return None  # computed from the score itself
    known: dict[Var, Tensor | Number] = {v: numbers[v.name] for v in used if v not in POSITIONS}
    lengths = {v: values.sizes[name] for v, name in POSITIONS.items() if v in used}
    total = math.prod(lengths.values())
    if total > MOST_ELEMENTS:
        return None
    device = next(iter(values.tensors.values())).device
    low = high = None
    for start in range(0, total, BLOCK_ELEMENTS):
        rest = torch.arange(start, min(start + BLOCK_ELEMENTS, total), device=device)
        block = dict(known)
        for variable, length in reversed(lengths.items()):
            block[variable] = rest % length
            rest = rest // length
        found = _block_range(index, demands, block, values.tensors)
        if found is not None:
            low = found[0] if low is None else min(low, found[0])
            high = found[1] if high is None else max(high, found[1])
    return None if low is None or high is None else (low, high)


@torch.no_grad()
def _block_range(
    index: Expr,
    demands: tuple[Expr, ...],
    block: Mapping[Var, Tensor | Number],
    tensors: Mapping[str, Tensor],
) -> Bounds | None:
    reached = evaluate_dense(index, block, tensors)
    visible = torch.ones((), dtype=torch.bool, device=reached.device)
    for demand in demands:
        visible = visible & evaluate_dense(demand, block, tensors)
    reached, visible = torch.broadcast_tensors(reached, visible)
    reached = reached[visible]
    if not reached.numel():
        return None
    low, high = torch.aminmax(reached)
    return int(low), int(high)


def location_of_node(fn: ScalarFn, node: Expr) -> Location | None:
    """The user's line of a node: its own, else that of the smallest expression around it that has one."""
    for around in postorder(fn.result):
        text = fn.sources.get(around)
        if text and (around is node or node in postorder(around)):
            found = re.match(r"(.*?):(\d+): (.*)", text)
            if found is not None:
                return Location(found[1], int(found[2]), fn.name, known_text=found[3])
    return None

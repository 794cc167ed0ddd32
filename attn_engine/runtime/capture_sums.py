"""From sums per row, key or diagonal to the gradient of a captured tensor: add equal indices in a fixed order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from attn_engine.codegen.lower.capture import CaptureGradient, Route
from attn_engine.ir.expr import Var, variables
from attn_engine.ir.ops import DType, Number
from attn_engine.ir.passes.distance import DISTANCE, by_distance
from attn_engine.ir.program import BATCH, HEAD, KV_IDX, Q_IDX
from attn_engine.runtime.dense import evaluate_dense

POSITIONS = (BATCH, HEAD, Q_IDX, KV_IDX)
PLACES = {Route.ROW: Q_IDX, Route.COLUMN: KV_IDX, Route.DIAGONAL: DISTANCE}


def captured_gradient(
    name: str,
    captures: Sequence[CaptureGradient],
    tensors: Mapping[str, Tensor],
    numbers: Mapping[str, Number],
    per_row: Sequence[tuple[CaptureGradient, Tensor]] = (),
) -> Tensor:
    """Everything that was collected for one captured tensor, summed in a fixed order, in its shape and dtype."""
    tensor = tensors[name]
    reads = [c for c in captures if c.load.tensor == name]
    # Several reads by pairs share one buffer: count it once.
    pairs = [tensors[buffer] for buffer in {c.buffer: None for c in reads if c.route is Route.PAIR}]
    sums = [c for c in reads if c.route is not Route.PAIR]
    once = [(c, x) for c, x in per_row if c.load.tensor == name]
    if len(pairs) == 1 and not sums and not once:
        return pairs[0].to(tensor.dtype)
    total = torch.zeros(tensor.shape, dtype=torch.float64, device=tensor.device)
    for c in sums:
        buffer = tensors[c.buffer]
        scatter_sums(total, c, buffer.sum(0) if buffer.ndim == 4 else buffer, tensors, numbers)
    for c, x in once:
        scatter_sums(total, c, x, tensors, numbers)
    for buffer in pairs:
        total += buffer
    return total.to(tensor.dtype)


def scatter_sums(
    total: Tensor,
    gradient: CaptureGradient,
    sums: Tensor,
    tensors: Mapping[str, Tensor],
    numbers: Mapping[str, Number],
) -> None:
    """total[index] += sums (B, H, places), where the index is that of the captured read.

    A place is a row, a key or a diagonal; diagonals come in order of q_idx - kv_idx, from 1 - kv_len on.
    `total` is float64: torch adds float64 by index one after the other, float32 with atomics on several threads.
    """
    position, indices = PLACES[gradient.route], gradient.load.indices
    if gradient.route is Route.DIAGONAL:
        indices = tuple(i for index in indices if (i := by_distance(index)) is not None)
    used = {v for i in indices for v in variables(i)}
    reduced = sums.to(torch.float64)
    axes = (BATCH, HEAD, position)
    for dimension, var in enumerate(axes):
        if var not in used:
            reduced = reduced.sum(dimension, keepdim=True)
    if reduced.numel() == 0:
        return
    if total.ndim == 0:
        total += reduced.sum()
        return
    if len(used) == total.ndim and all(i in POSITIONS for i in indices):
        _add_positions(total, reduced, [axes.index(i) for i in indices])
        return
    grid = torch.meshgrid(*(torch.arange(n, device=sums.device) for n in reduced.shape), indexing="ij")
    places: dict[Var, Tensor | Number] = dict(zip(axes, (g.reshape(-1) for g in grid), strict=True))
    if position is DISTANCE:
        places[DISTANCE] = places[DISTANCE] - (int(numbers["kv_len"]) - 1)
    for name, number in numbers.items():
        places[Var(name, DType.FLOAT if isinstance(number, float) else DType.INT)] = number
    index: list[Tensor] = []
    for axis, expression in enumerate(indices):
        where = evaluate_dense(expression, places, tensors, torch.float64)
        where = torch.as_tensor(where, device=sums.device).to(torch.int64).expand(reduced.numel())
        index.append(where.clamp(0, total.shape[axis] - 1))
    total.index_put_(tuple(index), reduced.reshape(-1), accumulate=True)


def _add_positions(total: Tensor, reduced: Tensor, axes: list[int]) -> None:
    """Every index is a position, each another: nothing is added twice. Positions beyond the tensor were never read."""
    others = [axis for axis in range(3) if axis not in axes]
    sums = reduced.permute(*axes, *others).reshape([reduced.shape[axis] for axis in axes])
    shared = tuple(slice(min(n, m)) for n, m in zip(total.shape, sums.shape, strict=True))
    total[shared] += sums[shared]

"""Whether the mods' indices of captured tensors stay inside them, in one call.

Kernels clamp indices, so memory is safe whatever a mod does; this makes a wrong index an error, not a wrong number. An
index that is linear in the positions has an exact range; another that positions and captured tensors decide is
evaluated at all of them, unless that is more than MOST_ELEMENTS; one computed from rows of the call is left alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from attn_engine.errors import IndexNegative, IndexOutOfRange
from attn_engine.ir.expr import Expr, Var, loads, substitute, variables
from attn_engine.ir.linear import D_IDX, DV_IDX, T_IDX, LinearProgram
from attn_engine.ir.ops import Number
from attn_engine.ir.passes.bounds import Bounds, index_bounds
from attn_engine.ir.program import BATCH, HEAD, KV_IDX, Q_IDX, ScalarFn
from attn_engine.runtime.captured_indices import location_of_node
from attn_engine.runtime.dense import evaluate_dense
from attn_engine.runtime.linear_inputs import LinearInputs

MOST_ELEMENTS = 2**20
MOST_REMEMBERED = 256
# The positions that bounds.py knows: a token is a query there, a column a key.
_KNOWN_POSITIONS: dict[Expr, Expr] = {T_IDX: Q_IDX, D_IDX: KV_IDX, DV_IDX: KV_IDX}


def check_linear_indices(
    program: LinearProgram, inputs: LinearInputs, passed: set[tuple[object, ...]]
) -> None:
    """Raise IndexOutOfRange for the first index that leaves its tensor. passed: the calls that were checked before."""
    if not program.captures or not inputs.v.numel():
        return
    indexed = [(x.data_ptr(), x._version) for x in inputs.captured.values() if not x.is_floating_point()]
    shapes = [x.shape for x in inputs.captured.values()]
    signature = (inputs.v.shape[:3], *shapes, *indexed, *inputs.scalars.values())
    if signature in passed:
        return
    _check(program, inputs)
    if len(passed) >= MOST_REMEMBERED:
        passed.clear()
    passed.add(signature)


def _check(program: LinearProgram, inputs: LinearInputs) -> None:
    batch, heads, tokens = inputs.v.shape[:3]
    lengths: dict[Var, int] = {
        BATCH: batch, HEAD: heads, T_IDX: tokens, D_IDX: program.dim_qk, DV_IDX: program.dim_v
    }  # fmt: skip
    for root in program.functions:
        fn = ScalarFn(program.name, root, sources=program.sources)
        for load in loads(root):
            shape = inputs.captured[load.tensor].shape
            for position, (index, size) in enumerate(zip(load.indices, shape, strict=True)):
                found = _range_of(index, lengths, inputs.scalars, inputs.captured)
                if found is None or (found[0] >= 0 and found[1] < size):
                    continue
                reached = found[0] if found[0] < 0 else found[1]
                kind = IndexNegative if reached < 0 else IndexOutOfRange
                where = location_of_node(fn, load)
                raise kind(position=position, tensor=load.tensor, index=reached, size=size, location=where)


def _range_of(
    index: Expr, lengths: Mapping[Var, int], scalars: Mapping[str, Number], tensors: Mapping[str, Tensor]
) -> Bounds | None:
    """The smallest and largest value; None where it is not known."""
    used = variables(index)
    columns = lengths[DV_IDX] if DV_IDX in used else lengths[D_IDX]
    sizes = {"batches": lengths[BATCH], "heads": lengths[HEAD], "q_len": lengths[T_IDX], "kv_len": columns}
    exact = index_bounds(substitute(index, _KNOWN_POSITIONS), sizes, scalars)
    if exact is not None:
        return exact
    spans = {v: n for v, n in lengths.items() if v in used}
    if math.prod(spans.values()) > MOST_ELEMENTS or any(
        v not in spans and v.name not in scalars for v in used
    ):
        return None
    known: dict[Var, Tensor | Number] = {v: scalars[v.name] for v in used if v not in spans}
    for place, (v, n) in enumerate(spans.items()):
        known[v] = torch.arange(n).reshape(-1, *[1] * (len(spans) - 1 - place))
    with torch.no_grad():
        reached = evaluate_dense(index, known, {n: x.detach().cpu() for n, x in tensors.items()})
    low, high = torch.aminmax(reached)
    return int(low), int(high)

"""Gradients of a row rule's own parameters that are made once per row: a sink in the sum, a gate on the output.

They are elementwise in what a row has saved, so they need no kernel; sums over pairs are the kernels' affair.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from attn_engine.codegen.lower.capture import CaptureGradient, Route
from attn_engine.codegen.lower.row_values import adjoint_param, row_gradient_param
from attn_engine.codegen.lower.values import saved_param
from attn_engine.ir.expr import Expr, Var, postorder
from attn_engine.ir.ops import DType, Number
from attn_engine.ir.passes.row_gradients import differentiable_rows
from attn_engine.ir.passes.rule_analysis import saved_of_empty_row
from attn_engine.ir.program import BATCH, DELTA, HEAD, Q_IDX, OnlineRule, d_saved_var, saved_var
from attn_engine.runtime.dense import evaluate_dense


def row_sums(
    rule: OnlineRule, learned: tuple[str, ...], tensors: Mapping[str, Tensor], numbers: Mapping[str, Number]
) -> list[tuple[CaptureGradient, Tensor]]:
    """What each row adds to each read of the tensors in `learned`: (B, H, Sq) in float64, 0 in rows without keys."""
    found: list[tuple[CaptureGradient, Tensor]] = []
    for p in rule.parameters:
        if p.load.tensor in learned and p.per_row is not None:
            x = _evaluated(rule, p.per_row, tensors, numbers)
            found.append((CaptureGradient(p.load, Route.ROW, ""), torch.where(_empty(rule, tensors), 0.0, x)))
    return found


def _evaluated(
    rule: OnlineRule, e: Expr, tensors: Mapping[str, Tensor], numbers: Mapping[str, Number]
) -> Tensor:
    """A row value of every row of the call."""
    rows = tensors["Q"].shape[:3]
    device = tensors["Q"].device
    known: dict[Var, Tensor | Number] = {
        Var(name, DType.FLOAT if isinstance(x, float) else DType.INT): x for name, x in numbers.items()
    }
    for dimension, var in enumerate((BATCH, HEAD, Q_IDX)):
        shape = [1] * 6
        shape[dimension] = rows[dimension]
        known[var] = torch.arange(rows[dimension], device=device).view(shape)
    zero = torch.zeros((), dtype=torch.float64, device=device)
    stored = {DELTA: "Delta"}
    stored |= {saved_var(name): saved_param(name) for name, _ in rule.saved}
    stored |= {saved_var(name): adjoint_param(name) for p in rule.adjoints for name, _ in p.values}
    stored |= {d_saved_var(name): row_gradient_param(name) for name in differentiable_rows(rule)}
    for var in postorder(e):
        if isinstance(var, Var) and var in stored:
            value = tensors.get(stored[var], zero)  # row values that no loss uses have no gradient tensor
            known[var] = value[..., None, None, None].double() if value.ndim else value
    return evaluate_dense(e, known, tensors, torch.float64)[..., 0, 0, 0].expand(rows)


def _empty(rule: OnlineRule, tensors: Mapping[str, Tensor]) -> Tensor:
    """Rows that have seen no key: all their saved values are still the initial ones."""
    empty = torch.ones(tensors["Q"].shape[:3], dtype=torch.bool, device=tensors["Q"].device)
    if not rule.saved:
        return ~empty
    for name, initial in saved_of_empty_row(rule).items():
        empty = empty & (tensors[saved_param(name)] == (-math.inf if math.isnan(initial) else initial))
    return empty

"""Row values that the backward kernels load with a q tile: saved ones, delta, and gradients that users gave them."""

from __future__ import annotations

import math

from attn_engine.codegen.lower.values import load_rows, rows, saved_param
from attn_engine.ir.expr import postorder, where
from attn_engine.ir.passes.row_gradients import backward_roots, differentiable_rows
from attn_engine.ir.passes.rule_analysis import saved_of_empty_row
from attn_engine.ir.program import DELTA, Attention, d_saved_var, saved_var
from attn_engine.ir.tile import Let, Param, Stmt


def row_gradient_param(name: str) -> str:
    """The tensor of d(loss)/d(saved row value); in kernels the value itself is d_<name>."""
    return f"d_{saved_param(name)}"


def uses_delta(program: Attention) -> bool:
    return DELTA in postorder(*backward_roots(program.rule))


def read_rows(program: Attention) -> list[str]:
    """The saved row values that the backward pass reads; others are for the user."""
    rule = program.rule
    read = set(postorder(*backward_roots(rule)))
    return [name for name, _ in rule.saved if saved_var(name) in read]


def row_params(program: Attention) -> list[Param]:
    """The tensors of `row_loads`."""
    found = [rows(program, saved_param(name)) for name in _loaded(program)]
    found += [rows(program, row_gradient_param(name)) for name in differentiable_rows(program.rule)]
    return [*found, *([rows(program, "Delta")] if uses_delta(program) else [])]


def row_loads(program: Attention) -> list[Stmt]:
    """The row values of a q tile; -inf in an empty row reads as 0, so that it cannot make a NaN."""
    lets: list[Stmt] = []
    empty = saved_of_empty_row(program.rule)
    for name in _loaded(program):
        lets.append(Let(name, load_rows(saved_param(name))))
        if empty[name] == -math.inf and name in read_rows(program):
            lets.append(Let(f"safe_{name}", where(saved_var(name).equals(-math.inf), 0.0, saved_var(name))))
    for name in differentiable_rows(program.rule):
        arriving, d_value = load_rows(row_gradient_param(name)), d_saved_var(name)
        if empty[name] == -math.inf:  # whatever a loss makes of -inf, nothing can move it
            arriving = where(saved_var(name).equals(-math.inf), 0.0, arriving)
        lets.append(Let(d_value.name, arriving))
    if uses_delta(program):
        lets.append(Let("delta", load_rows("Delta")))
    return lets


def _loaded(program: Attention) -> list[str]:
    """Saved row values that are read, by the rule or to tell an empty row from others."""
    empty, wanted = saved_of_empty_row(program.rule), set(read_rows(program))
    wanted |= {name for name in differentiable_rows(program.rule) if empty[name] == -math.inf}
    return [name for name, _ in program.rule.saved if name in wanted]

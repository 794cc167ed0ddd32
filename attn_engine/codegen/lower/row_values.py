"""Row values that the backward kernels load with a q tile: saved ones, delta, those of passes before the gradient, and
gradients that users gave them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from attn_engine.codegen.lower.values import load_rows, rows, saved_param, tile
from attn_engine.ir.expr import Expr, postorder, where
from attn_engine.ir.ops import Number
from attn_engine.ir.passes.row_gradients import backward_roots
from attn_engine.ir.passes.rule_analysis import saved_of_empty_row
from attn_engine.ir.program import DELTA, Attention, OnlineRule, d_saved_var, saved_var
from attn_engine.ir.tile import Let, Param, Stmt


def row_gradient_param(name: str) -> str:
    """The tensor of d(loss)/d(saved row value); in kernels the value itself is d_<name>."""
    return f"d_{saved_param(name)}"


def adjoint_param(name: str) -> str:
    """The tensor of a row value that a pass before the gradient leaves; in kernels the value has the bare name."""
    return f"adjoint_{name}"


def uses_delta(program: Attention) -> bool:
    return DELTA in postorder(*backward_roots(program.rule))


@dataclass(frozen=True, slots=True)
class RowReads:
    """What expressions of the backward pass read of a row: names of saved values, of their gradients, of adjoints."""

    saved: tuple[str, ...]
    arriving: tuple[str, ...]
    adjoints: tuple[str, ...]
    delta: bool
    unset: frozenset[str]  # saved values that are -inf in an empty row

    def params(self, program: Attention) -> list[Param]:
        """The tensors of `loads`."""
        tensors = [saved_param(name) for name in self.saved]
        tensors += [row_gradient_param(name) for name in self.arriving]
        tensors += [adjoint_param(name) for name in self.adjoints]
        return [rows(program, name) for name in (*tensors, *(["Delta"] if self.delta else []))]

    def loads(self) -> list[Stmt]:
        """The values of a q tile; -inf in an empty row reads as 0, so that it cannot make a NaN."""
        lets: list[Stmt] = []
        for name in self.saved:
            lets.append(Let(name, load_rows(saved_param(name))))
            if name in self.unset:
                safe = where(saved_var(name).equals(-math.inf), 0.0, saved_var(name))
                lets.append(Let(f"safe_{name}", safe))
        for name in self.arriving:
            given = load_rows(row_gradient_param(name))
            if name in self.unset:  # whatever a loss makes of -inf, nothing can move it
                given = where(saved_var(name).equals(-math.inf), 0.0, given)
            lets.append(Let(d_saved_var(name).name, given))
        lets += [Let(name, load_rows(adjoint_param(name))) for name in self.adjoints]
        return [*lets, *([Let("delta", load_rows("Delta"))] if self.delta else [])]


def read_rows(rule: OnlineRule, roots: Sequence[Expr]) -> RowReads:
    """What `roots` read of a row."""
    read = set(postorder(*roots))
    unset = frozenset(name for name, value in saved_of_empty_row(rule).items() if is_unset(value))
    arriving = tuple(name for name, _ in rule.saved if d_saved_var(name) in read)
    saved = (n for n, _ in rule.saved if saved_var(n) in read or (n in arriving and n in unset))
    left = (name for p in rule.adjoints for name, _ in p.values if saved_var(name) in read)
    return RowReads(tuple(saved), arriving, tuple(left), DELTA in read, unset)


def main_rows(program: Attention) -> RowReads:
    """What the kernels of the gradients read of a row."""
    rule = program.rule
    pairs = [p.per_pair for p in rule.parameters if p.per_pair is not None]
    return read_rows(rule, [rule.recompute, rule.gradient, *pairs])


def row_bindings(rule: OnlineRule) -> dict[Expr, Expr]:
    """Saved values, and where `RowReads.loads` has left them."""
    return {
        saved_var(name): tile(f"safe_{name}" if is_unset(empty) else name, "q")
        for name, empty in saved_of_empty_row(rule).items()
    }


def is_unset(value_of_empty_row: Number) -> bool:
    """Whether an empty row keeps -inf: also what has no value there at all is stored like that."""
    return value_of_empty_row == -math.inf or math.isnan(value_of_empty_row)

"""Normalisers in powers of two: the same numbers, row by row and in whole kernels; refused where nothing is gained."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch

from attn_engine.codegen.pipeline import lower
from attn_engine.codegen.schedule import Edges, Gradients, Schedule
from attn_engine.ir.evaluate import evaluate
from attn_engine.ir.expr import Expr, Var, call, postorder
from attn_engine.ir.ops import DType, Op, Storage
from attn_engine.ir.passes.powers_of_two import LOG2_E, backward_in_powers_of_two, forward_in_powers_of_two
from attn_engine.ir.passes.try_rule import finished, fold, placeholders
from attn_engine.ir.program import (
    KV_IDX,
    LOGIT,
    Q_IDX,
    SCORE,
    OnlineRule,
    saved_var,
)
from attn_engine.library import OnlineRelu, OnlineRetention, OnlineSigmoid, OnlineSoftmax
from attn_engine.runtime.backends import backend_named
from attn_engine.runtime.compiled import CompiledAttention
from tests.runtime import rules


def traced(online_func: object) -> OnlineRule:
    from attn_engine import AttentionEngine, meta_tensor

    engine = AttentionEngine([meta_tensor(None, None, None, 8)] * 3, online_func=online_func, backend="torch")
    return engine.program.rule


GAINING = {
    "softmax": lambda: traced(OnlineSoftmax()),
    "softmax that saves lse": rules.softmax,
    "softmax with a sink": rules.softmax_with_sink,
    "sigmoid": lambda: traced(OnlineSigmoid()),
}
UNCHANGED = {
    "relu": lambda: traced(OnlineRelu()),
    "retention": lambda: traced(OnlineRetention()),
    "two passes": rules.centred,
}


@pytest.mark.parametrize("name", GAINING)
def test_rows_come_out_the_same(name: str) -> None:
    rule = GAINING[name]()
    source = random.Random(5)
    changed, backward = forward_in_powers_of_two(rule), backward_in_powers_of_two(rule)
    assert changed.powers_of_two
    assert backward.powers_of_two == (not rule.parameters)  # a learned temperature reads the logit itself
    roots = (
        rule.weights,
        rule.out_scale,
        rule.output,
        *rule.new_states,
        *(e for _, e in rule.saved),
        rule.recompute,
    )
    others = placeholders(source, roots, (*(s.var for s in rule.states), *rule.saved_vars))
    tiles = [[(source.gauss(0, 4), source.gauss(0, 1)) for _ in range(3)] for _ in range(3)]
    counted = [[(s * LOG2_E, v) for s, v in tile] for tile in tiles]
    output, saved = finished(rule, fold(rule, tiles, others))
    found, found_saved = finished(changed, fold(changed, counted, others))
    assert found == pytest.approx(output, rel=1e-12)
    assert found_saved == pytest.approx(saved, rel=1e-12)
    rows = {**others, **{saved_var(n): x for n, x in saved.items()}}
    for s, _ in tiles[1] if backward.powers_of_two else []:
        weight = evaluate(rule.recompute, {**rows, LOGIT: s})
        assert evaluate(backward.recompute, {**rows, LOGIT: s * LOG2_E}) == pytest.approx(weight, rel=1e-12)


def test_a_pair_of_softmax_costs_one_multiply_add_and_one_power() -> None:
    rule = GAINING["softmax"]()
    forward, backward = forward_in_powers_of_two(rule), backward_in_powers_of_two(rule)
    assert forward.weights is call(Op.EXP2, LOGIT - rule_max(forward))
    lse = Var("lse", DType.FLOAT, ("q",))
    assert backward.recompute is call(
        Op.EXP2, LOGIT - lse * LOG2_E
    )  # no bound, no factor: they are in the sum
    assert backward.gradient is rule.gradient


def rule_max(rule: OnlineRule) -> Expr:
    return next(e for e, name in rule.names.items() if name == "new_max")


@pytest.mark.parametrize("name", UNCHANGED)
def test_rules_that_gain_nothing_stay_as_they_are(name: str) -> None:
    rule = UNCHANGED[name]()
    assert forward_in_powers_of_two(rule) == rule
    assert backward_in_powers_of_two(rule) == rule


def test_a_factor_that_may_be_negative_stays_outside() -> None:
    rule = rules.softmax()
    shifted = replace(rule, recompute=rule.recompute * saved_var("lse"))
    assert Op.LOG2 not in {
        getattr(n, "op", None) for n in postorder(backward_in_powers_of_two(shifted).recompute)
    }
    assert backward_in_powers_of_two(shifted).powers_of_two


@pytest.mark.parametrize("name", ["softmax", "softmax that saves lse", "sigmoid"])
@pytest.mark.parametrize("scale", [0.4, -0.3, 0.0])
@pytest.mark.parametrize("modified", [False, True])
def test_kernels_compute_the_same(name: str, scale: float, modified: bool) -> None:
    """The same numbers as without, in float64: rows without keys, grouped heads, any sign of the scale."""
    score = rules.function(SCORE - 0.1 * (Q_IDX - KV_IDX)) if modified else None
    mask = rules.function((KV_IDX <= Q_IDX) & (Q_IDX - KV_IDX < 70))
    program = rules.program(score, mask, GAINING[name](), Storage.FLOAT64)
    schedule = Schedule(32, 16, 16, 32, Edges.BRANCH, Gradients.TWO_KERNELS)
    kinds = [schedule, replace(schedule, folded=True)]
    want, got = (everything(CompiledAttention(program, backend_named("torch"), s), scale) for s in kinds)
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-11)


def everything(compiled: CompiledAttention, scale: float) -> list[torch.Tensor]:
    """o, the saved row values and the gradients of one random call."""
    generator = torch.Generator().manual_seed(3)

    def random_tensor(heads: int, rows: int, columns: int) -> torch.Tensor:
        return torch.randn(1, heads, rows, columns, generator=generator, dtype=torch.float64)

    q, k, v, d_out = (random_tensor(*s) for s in ((2, 150, 8), (1, 50, 8), (1, 50, 5), (2, 150, 5)))
    out = torch.full_like(d_out, math.nan)
    saved = compiled.forward(q, k, v, {}, {"scale": scale}, out)
    gradients = (torch.full_like(q, math.nan), torch.full_like(k, math.nan), torch.full_like(v, math.nan))
    compiled.backward(d_out, (q, k, v), out, saved, {}, {"scale": scale}, gradients, ())
    return [out, *saved, *gradients]


def test_only_folded_schedules_change_kernels() -> None:
    program = rules.program()
    schedule = Schedule(32, 32, 32, 32, Edges.BRANCH, Gradients.TWO_KERNELS)
    kernel = lower(program, schedule, "forward").kernels[0]
    assert "scale_log2" not in str(kernel.body)
    assert "scale_log2" in str(lower(program, replace(schedule, folded=True), "forward").kernels[0].body)


def test_a_factor_made_of_a_saved_maximum_stays_outside() -> None:
    rule = GAINING["softmax"]()
    shifted = replace(rule, recompute=call(Op.EXP, LOGIT - saved_var("lse")) * saved_var("row_max"))
    found = backward_in_powers_of_two(shifted)
    assert found.recompute is call(Op.EXP2, LOGIT - saved_var("lse") * LOG2_E) * saved_var("row_max")

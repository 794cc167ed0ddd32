"""Weights that rise with their logit, as far as the form of a rule shows it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from attn_engine.frontend import trace_online
from attn_engine.frontend.names import KernelNames
from attn_engine.ir.evaluate import evaluate
from attn_engine.ir.expr import Const, Expr, call
from attn_engine.ir.ops import Op
from attn_engine.ir.passes.monotone import weight_of_largest_logit
from attn_engine.ir.program import HEAD, LOGIT, OnlineRule, saved_var
from attn_engine.library import OnlineRetention, OnlineSigmoid, OnlineSoftmax

SOFTMAX: OnlineRule = trace_online(OnlineSoftmax(), KernelNames()).rule
TOP, INVERSE = saved_var("row_max"), saved_var("inverse_sum")
POWER = call(Op.EXP, LOGIT - TOP)


def of(weight: Expr) -> OnlineRule:
    """A rule whose final weights are these, with softmax's states."""
    return replace(SOFTMAX, recompute=weight)


def test_softmax_and_sigmoid_rise() -> None:
    for rule in (SOFTMAX, trace_online(OnlineSigmoid(), KernelNames()).rule):
        weight = weight_of_largest_logit(rule)
        assert weight is not None
        row = {TOP: 1.5, INVERSE: 0.25}
        values = [float(evaluate(weight, {**row, LOGIT: x})) for x in (-math.inf, -3.0, 0.5, 1.5)]
        assert values == sorted(values) and values[0] == 0 < values[1]


RISING: dict[str, Expr] = {
    "twice turned": call(Op.EXP, -(TOP - LOGIT)),
    "of two": POWER * INVERSE + call(Op.EXP, LOGIT * 2.0),
    "over a sum": POWER / call(Op.EXP, TOP),
}
NOT_RISING: dict[str, Expr] = {
    "falls": call(Op.EXP, TOP - LOGIT),
    "times what may be negative": POWER * TOP,
    "product of two": POWER * call(Op.SIGMOID, LOGIT),
    "rises and falls": POWER - call(Op.EXP, LOGIT),
    "not 0 without a key": POWER + Const(1.0),
    "not 0 where it never ends": LOGIT - TOP,
    "its head": POWER * call(Op.ABS, HEAD * 1.0),
    "of its size": call(Op.ABS, LOGIT),
}


@pytest.mark.parametrize("name", RISING)
def test_rising(name: str) -> None:
    assert weight_of_largest_logit(of(RISING[name])) is RISING[name]


@pytest.mark.parametrize("name", NOT_RISING)
def test_not_certainly_rising(name: str) -> None:
    assert weight_of_largest_logit(of(NOT_RISING[name])) is None


def test_retention_does_not_vanish() -> None:
    assert weight_of_largest_logit(trace_online(OnlineRetention(), KernelNames()).rule) is None

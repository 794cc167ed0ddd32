"""The derived merge against each normaliser's definition: states and outputs of whole rows, computed in one piece."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attn_engine.frontend import OnlineFunc, trace_online
from attn_engine.frontend.names import KernelNames
from attn_engine.ir.evaluate import evaluate
from attn_engine.ir.expr import Const, call
from attn_engine.ir.ops import Op
from attn_engine.ir.passes.merge_rule import MergeRule, NotMergeable, derive_merge, part_var
from attn_engine.ir.program import OnlineRule, RowState
from attn_engine.library import OnlineRelu, OnlineRetention, OnlineSigmoid, OnlineSoftmax
from tests.ir.user_rules import EuclideanNorm, LogLinear, LogSum, RunningNorm, SoftmaxWithMinimum

Keys = Sequence[tuple[float, float]]  # (score, value) pairs
Part = tuple[list[float], float]  # row states in the rule's order, un-normalised output


def softmax(keys: Keys) -> Part:
    top = max((s for s, _ in keys), default=-math.inf)
    weights = [math.exp(s - top) for s, _ in keys]
    return [top, sum(weights)], sum(w * v for w, (_, v) in zip(weights, keys, strict=True))


def softmax_with_minimum(keys: Keys) -> Part:
    (top, total), out = softmax(keys)
    return [top, min((s for s, _ in keys), default=math.inf), total], out


def running_norm(keys: Keys) -> Part:
    squares = sum(s * s for s, _ in keys)
    return [squares], sum(s * v for s, v in keys) / max(math.sqrt(squares), 1e-15)


def log_linear(keys: Keys) -> Part:
    weights = [1 + s + s * s / 2 for s, _ in keys]
    return [sum(weights)], sum(w * v for w, (_, v) in zip(weights, keys, strict=True))


MERGEABLE: dict[type[OnlineFunc], Callable[[Keys], Part]] = {
    OnlineSoftmax: softmax,
    OnlineSigmoid: lambda keys: ([], sum(v / (1 + math.exp(-s)) for s, v in keys)),
    OnlineRelu: lambda keys: ([], sum(max(s, 0) * v for s, v in keys)),
    OnlineRetention: lambda keys: ([sum(abs(s) for s, _ in keys)], sum(s * v for s, v in keys)),
    SoftmaxWithMinimum: softmax_with_minimum,
    EuclideanNorm: lambda keys: ([sum(s * s for s, _ in keys)], sum(s * v for s, v in keys)),
    RunningNorm: running_norm,
    LogLinear: log_linear,
}
numbers = st.floats(-30, 30).map(lambda x: round(x, 4))  # squares do not underflow
keys = st.lists(st.tuples(numbers, numbers), max_size=6)


@cache
def rule_of(function: type[OnlineFunc]) -> OnlineRule:
    return trace_online(function(), KernelNames()).rule


def merged(rule: OnlineRule, a: Part, b: Part) -> Part:
    merge = derive_merge(rule)
    assert isinstance(merge, MergeRule), merge
    known = dict(zip([s.var for s in rule.states], a[0], strict=True))
    known |= dict(zip([part_var(s) for s in rule.states], b[0], strict=True))
    states = [float(evaluate(e, known)) for e in merge.states]
    left, right = (float(evaluate(e, known)) for e in (merge.left_scale, merge.right_scale))
    return states, a[1] * left + b[1] * right


def assert_same(got: Part, want: Part, keys: Keys) -> None:
    size = 1e-9 * (1 + sum(abs(v) * (1 + s * s) for s, v in keys))  # what cancellation may leave of the terms
    assert got[0] == pytest.approx(want[0], rel=1e-9, abs=1e-12)
    assert got[1] == pytest.approx(want[1], rel=1e-9, abs=size)


@pytest.mark.parametrize("function", MERGEABLE)
@settings(max_examples=40, deadline=None)
@given(a=keys, b=keys, c=keys)
def test_merging_parts_gives_the_row(function: type[OnlineFunc], a: Keys, b: Keys, c: Keys) -> None:
    """In any order and any grouping; a part without keys changes nothing."""
    rule, whole = rule_of(function), MERGEABLE[function]
    x, y, z = whole(a), whole(b), whole(c)
    assert_same(merged(rule, x, y), whole([*a, *b]), [*a, *b])
    assert_same(merged(rule, y, x), whole([*a, *b]), [*a, *b])
    every = [*a, *b, *c]
    assert_same(merged(rule, merged(rule, x, y), z), whole(every), every)
    assert_same(merged(rule, x, merged(rule, y, z)), whole(every), every)
    empty = ([s.initial for s in rule.states], 0.0)
    assert_same(merged(rule, x, empty), x, a)
    assert_same(merged(rule, empty, x), x, a)
    assert merged(rule, empty, empty) == empty


def test_a_state_that_is_neither_extremum_nor_sum_is_not_merged() -> None:
    found = derive_merge(rule_of(LogSum))
    assert isinstance(found, NotMergeable)
    assert "'log_sum'" in found.reason


def test_a_start_that_would_count_twice_is_not_merged() -> None:
    """A sink in the initial state: every part would bring its own."""
    rule = rule_of(LogLinear)
    sink = replace(rule, states=(RowState("total", 1.0),))
    found = derive_merge(sink)
    assert isinstance(found, NotMergeable)
    assert "row value 'total'" in found.reason


def test_an_update_that_forgets_is_not_merged() -> None:
    """Half of the old sum at every tile: the result depends on the tiles."""
    rule = rule_of(LogLinear)
    (state,) = rule.states
    (new,) = rule.new_states
    fading = call(Op.ADD, new, call(Op.MUL, state.var, Const(-0.5)))
    assert isinstance(derive_merge(replace(rule, new_states=(fading,))), NotMergeable)

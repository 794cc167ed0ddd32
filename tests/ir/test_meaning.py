"""What expressions mean, and that no rewriting, derivative or mask analysis changes it: property tests."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from attn_engine import ir
from attn_engine.ir import expr as expr_module
from attn_engine.ir import tile as tile_module
from attn_engine.ir.evaluate import evaluate
from attn_engine.ir.expr import Call, Const, Expr, Var, call, postorder, where
from attn_engine.ir.ops import INFO, DType, Op
from attn_engine.ir.passes.autodiff import GRADIENTS, NOT_DIFFERENTIABLE, derivative
from attn_engine.ir.passes.mask_range import Interval, NoneKnown, plan_mask
from attn_engine.ir.passes.simplify import simplify
from attn_engine.ir.program import KV_IDX, Q_IDX

X, Y = Var("x", DType.FLOAT), Var("y", DType.FLOAT)
QUICK = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])

small = st.integers(-4, 4)
ints = st.recursive(
    st.sampled_from([Q_IDX, KV_IDX]) | small.map(Const),
    lambda inner: st.one_of(
        st.builds(call, st.sampled_from([Op.ADD, Op.SUB, Op.MUL, Op.MAX, Op.MIN]), inner, inner),
        st.builds(
            lambda op, a, n: call(op, a, n),
            st.sampled_from([Op.FLOORDIV, Op.MOD]),
            inner,
            st.sampled_from([-3, -2, 1, 2, 5]),
        ),
        st.builds(lambda a: -a, inner),
    ),
    max_leaves=6,
)
factors = st.sampled_from([-2, -1, 0, 1, 1, 2, 3])
linear = st.builds(lambda a, b, c: Q_IDX * a + KV_IDX * b + c, factors, factors, st.integers(-9, 9))
# Quotients by a positive number: rows that hold several heads, masks of chunks.
stepped = st.builds(lambda e, n, c: e // n + c, linear, st.sampled_from([1, 2, 3, 5]), st.integers(-3, 3))
comparisons = st.sampled_from([Op.LE, Op.LT, Op.EQ, Op.NE])
masks = st.recursive(
    st.one_of(
        st.builds(call, comparisons, linear, st.just(Const(0))),
        st.builds(call, comparisons, linear, linear),
        st.builds(call, comparisons, stepped, linear),
        st.builds(call, comparisons, stepped, stepped),
        st.builds(call, comparisons, ints, ints),
        st.booleans().map(Const),
    ),
    lambda inner: st.one_of(
        st.builds(lambda a, b: a & b, inner, inner),
        st.builds(lambda a, b: a | b, inner, inner),
        st.builds(lambda a: ~a, inner),
    ),
    max_leaves=5,
)
floats = st.recursive(
    st.sampled_from([X, Y]) | st.sampled_from([0.5, -1.5, 2.0, 1.0, 0.0, -1.0]).map(Const),
    lambda inner: st.one_of(
        st.builds(call, st.sampled_from([Op.ADD, Op.SUB, Op.MUL, Op.MAX, Op.MIN]), inner, inner),
        st.builds(lambda a, b: a / (b * b + 0.5), inner, inner),
        st.builds(
            call, st.sampled_from([Op.NEG, Op.TANH, Op.SIGMOID, Op.SIN, Op.COS, Op.EXP, Op.ABS]), inner
        ),
        st.builds(lambda a, b, c: where(a < 0.3, b, c), inner, inner, inner),
    ),
    max_leaves=8,
)


def test_the_grammar_in_the_docstrings_is_the_classes() -> None:
    for doc, rule, module, base in (
        (expr_module.__doc__, "expr", expr_module, expr_module.Expr),
        (tile_module.__doc__, "stmt", tile_module, None),
    ):
        assert doc
        body = re.split(r"\n    \w+ +=|\n\n", doc.split(f"{rule} ", 1)[1].split("=", 1)[1])[0]
        for name, fields in re.findall(r"(\w+)\(([^)]*)\)", body):
            cls = getattr(module, name)
            wanted = [f.strip() for f in fields.split(",")]
            own = [n for n, f in cls.__dataclass_fields__.items() if f.init]
            own = [
                {"kind": "dtype", "spans": "axes"}.get(f, f) if base and name != "Reduce" else f for f in own
            ]
            assert own == wanted, name
        if base:
            assert {c.__name__ for c in base.__subclasses__()} == set(re.findall(r"(\w+)\(", body))
    listed = set(re.findall(r"\w+", ir.__doc__.split("expr     =")[1].split("(expr.py)")[0]))
    assert listed == {c.__name__ for c in Expr.__subclasses__()}


def test_every_operation_has_a_meaning_and_a_gradient_or_none() -> None:
    assert set(INFO) == set(Op)
    assert set(GRADIENTS) | NOT_DIFFERENTIABLE == set(Op)
    assert not set(GRADIENTS) & NOT_DIFFERENTIABLE


@pytest.mark.parametrize(("a", "b"), [(-7, 2), (7, -2), (-7, -2), (7, 2), (-1, 5)])
def test_floor_division_and_remainder_follow_python(a: int, b: int) -> None:
    assert evaluate(Q_IDX // KV_IDX, {Q_IDX: a, KV_IDX: b}) == math.floor(a / b)
    assert evaluate(Q_IDX % KV_IDX, {"q_idx": a, "kv_idx": b}) == a - b * math.floor(a / b)


@QUICK
@given(masks, st.integers(-6, 9), st.integers(-6, 9))
def test_simplify_keeps_integer_and_logical_values(mask: Expr, q: int, kv: int) -> None:
    env = {Q_IDX: q, KV_IDX: kv}
    assert evaluate(simplify(mask), env) == evaluate(mask, env)


@QUICK
@given(floats, st.floats(-3, 3), st.floats(-3, 3))
def test_simplify_keeps_float_values(e: Expr, x: float, y: float) -> None:
    before, after = (evaluate(v, {X: x, Y: y}) for v in (e, simplify(e)))
    assert before == pytest.approx(after, rel=1e-9, abs=1e-9, nan_ok=True)


def ties(node: Expr, env: dict[Expr, float]) -> bool:
    """Whether a maximum, minimum or absolute value stands on its kink."""
    if not isinstance(node, Call) or node.op not in (Op.MAX, Op.MIN, Op.ABS):
        return False
    values = [float(evaluate(x, env)) for x in node.args]
    return values[0] == (values[1] if len(values) == 2 else 0)


@QUICK
@given(floats, st.floats(-2, 2), st.floats(-2, 2))
def test_derivative_is_the_finite_difference(e: Expr, x: float, y: float) -> None:
    def f(at: float) -> float:
        return float(evaluate(e, {X: at, Y: y}))

    if any(ties(node, {X: x, Y: y}) for node in postorder(e)):
        return  # several subgradients: their sum need not be the derivative, even where there is one
    at_x = (float(evaluate(node, {X: x, Y: y})) for node in postorder(e))
    if any(abs(value) > 1e6 for value in at_x):
        return  # 0 * infinity on the way
    slopes: list[float] = []
    for h in (1e-4, 1e-5):
        left, here, right = f(x - h), f(x), f(x + h)
        if not all(math.isfinite(v) and abs(v) < 1e3 for v in (left, here, right)):
            return
        slopes += [(right - here) / h, (here - left) / h]
    if max(slopes) - min(slopes) > 1e-3 * max(1.0, abs(slopes[0])):
        return  # a kink or a pole: no derivative here
    found = evaluate(derivative(e, X), {X: x, Y: y}) if e.axes == () and e.dtype is DType.FLOAT else 0.0
    assert found == pytest.approx(sum(slopes[2:]) / 2, rel=5e-3, abs=5e-3)


@settings(QUICK, max_examples=400)
@given(masks, st.sampled_from(["kv", "q"]), st.integers(0, 12), st.integers(1, 5), st.integers(0, 14))
def test_mask_plan_is_sound(mask: Expr, loop: str, start: int, block: int, length: int) -> None:
    plan = plan_mask(mask, loop)
    tile = "q" if loop == "kv" else "kv"
    ends = {f"{tile}_start": start, f"{tile}_last": start + block - 1, f"{loop}_len": length}
    ends |= {f"{tile}_len": start + block}

    def inside(interval: Interval, j: int) -> bool:
        lo = -math.inf if interval.lo is None else evaluate(interval.lo, ends)
        hi = math.inf if interval.hi is None else evaluate(interval.hi, ends)
        return lo <= j < hi

    for j in range(length):
        for i in range(start, start + block):
            visible = evaluate(mask, {f"{tile}_idx": i, f"{loop}_idx": j})
            assert not visible or inside(plan.hull, j), "a visible pair is dropped"
            if not isinstance(plan.full, NoneKnown) and inside(plan.full, j):
                assert visible, "a tile seen in part is called full"

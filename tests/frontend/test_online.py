"""Online functions: tracing, upstream's way of writing them, and deriving the backward methods."""

from __future__ import annotations

import math
import random
from types import MappingProxyType

import pytest
import torch

from attn_engine import errors
from attn_engine.frontend import CustomIO, KernelNames, OnlineFunc, SymbolScalar, Var, trace_online
from attn_engine.ir.evaluate import evaluate
from attn_engine.ir.expr import Reduce, postorder, substitute
from attn_engine.ir.expr import Var as IrVar
from attn_engine.ir.ops import DType
from attn_engine.ir.passes.try_rule import gradients_of
from attn_engine.ir.program import LOGIT, OUT
from attn_engine.library import OnlineRelu, OnlineRetention, OnlineSigmoid, OnlineSoftmax
from tests.ir.user_rules import LogSum


class UpstreamSoftmax(OnlineFunc):
    """Written as in AttentionEngine's scripts."""

    def __init__(self):
        online_rowscales = {"m": SymbolScalar("m", Var("-inf")), "r": SymbolScalar("r", Var("0.0"))}
        final_rowscales = {"lse": SymbolScalar("lse", Var("0.0"))}
        super().__init__(online_rowscales, final_rowscales, CustomIO())

    @staticmethod
    def online_fwd(scores, online_rowscales, b, h, q_idx):
        m, r = online_rowscales["m"], online_rowscales["r"]
        m_new = m.max(scores.get_reduce("max"))
        m_scale = (m - m_new).exp()
        r = r * m_scale
        scores = (scores - m_new).exp()
        r = r + scores.get_reduce("sum")
        return scores, {"m": m_new, "r": r}, m_scale

    @staticmethod
    def online_fwd_epilogue(o, online_rowscales, b, h, q_idx):
        o_new = o / online_rowscales["r"]
        lse = (online_rowscales["r"]).log() + online_rowscales["m"]
        return o_new, {"lse": lse}

    @staticmethod
    def forward(scores, final_rowscales, b, h, q_idx, kv_idx):
        return (scores - final_rowscales["lse"]).exp()

    @staticmethod
    def backward(dp, scores, final_rowscales, doosum, b, h, q_idx, kv_idx):
        return (dp - doosum) * scores


class UpstreamIdentity(OnlineFunc):
    def __init__(self):
        super().__init__({}, {}, CustomIO())

    @staticmethod
    def online_fwd(scores, online_rowscales, b, h, q_idx):
        o_scale = SymbolScalar("o_scale", Var("1"))
        return scores, online_rowscales, o_scale

    @staticmethod
    def online_fwd_epilogue(o, online_rowscales, b, h, q_idx):
        return o, {}

    @staticmethod
    def forward(scores, final_rowscales, b, h, q_idx, kv_idx):
        return scores

    @staticmethod
    def backward(dp, scores, final_rowscales, doosum, b, h, q_idx, kv_idx):
        return dp


class UpstreamRetention(OnlineFunc):
    """The rescaling form: the accumulator is normalised at every tile."""

    online_rowscales = MappingProxyType({"r_wo_clamp": 0.0, "r": 1.0})

    def online_fwd(self, scores, online_rowscales, b, h, q_idx):
        r_wo_clamp = online_rowscales["r_wo_clamp"] + scores.get_reduce("abssum")
        r_new = r_wo_clamp.max(1.0)
        return scores / r_new, {"r_wo_clamp": r_wo_clamp, "r": r_new}, online_rowscales["r"] / r_new

    def online_fwd_epilogue(self, o, online_rowscales, b, h, q_idx):
        return o, {}


def row(rule, scores, parts=1):
    """The rule's weights of a row of scores, seen in `parts` tiles, and its saved values. Independent of any kernel."""
    state = {s.var: s.initial for s in rule.states}
    weights: list[float] = []
    size = math.ceil(len(scores) / parts)
    for start in range(0, len(scores), size):
        tile = scores[start : start + size]
        reduced = reductions(rule, state, tile)
        scale = at(rule.out_scale, reduced, state)
        weights = [w * scale for w in weights] + [
            at(rule.weights, reduced, {**state, LOGIT: s}) for s in tile
        ]
        state = {s.var: at(new, reduced, state) for s, new in zip(rule.states, rule.new_states, strict=True)}
    weights = [evaluate(rule.output, {**state, OUT: w}) for w in weights]
    return weights, {name: evaluate(e, state) for name, e in rule.saved}


def at(expr, reduced, env):
    """The value of an expression with its reductions known."""
    stand_ins = {node: IrVar(f"reduced {n}", DType.FLOAT) for n, node in enumerate(reduced)}
    known = {stand_ins[node]: value for node, value in reduced.items()}
    return evaluate(substitute(expr, stand_ins), {**env, **known})


def reductions(rule, state, tile):
    reduced = {}
    for node in postorder(rule.weights, rule.out_scale, *rule.new_states):
        if isinstance(node, Reduce):
            items = [at(node.x, dict(reduced), {**state, LOGIT: s}) for s in tile]
            reduced[node] = {"max": max, "min": min, "sum": sum}[node.kind](items)
    return reduced


def without_backward(cls):
    return type(f"{cls.__name__}Derived", (cls,), {"forward": None, "backward": None})


def softmax(s):
    return torch.softmax(s, -1)


def retention(s):
    return s / s.abs().sum().clamp(min=1)


RULES = {
    "softmax": (OnlineSoftmax, softmax),
    "softmax derived": (without_backward(OnlineSoftmax), softmax),
    "upstream softmax": (UpstreamSoftmax, softmax),
    "upstream softmax derived": (without_backward(UpstreamSoftmax), softmax),
    "sigmoid": (OnlineSigmoid, torch.sigmoid),
    "sigmoid derived": (without_backward(OnlineSigmoid), torch.sigmoid),
    "relu": (OnlineRelu, torch.relu),
    "relu derived": (without_backward(OnlineRelu), torch.relu),
    "retention": (OnlineRetention, retention),
    "retention derived": (without_backward(OnlineRetention), retention),
    "upstream retention derived": (UpstreamRetention, retention),
    "identity": (UpstreamIdentity, lambda s: s),
}


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("spread", [0.05, 3.0])
def test_rule_against_autograd(name, spread):
    cls, reference = RULES[name]
    rule = trace_online(cls).rule
    source = random.Random(name)
    scores = torch.tensor(
        [source.uniform(-spread, spread) for _ in range(7)], dtype=torch.float64, requires_grad=True
    )
    d_probs = torch.randn(7, dtype=torch.float64)
    expected = reference(scores)
    (d_scores,) = torch.autograd.grad(expected, scores, d_probs)
    for parts in (1, 3, 7):
        weights, saved = row(rule, scores.tolist(), parts)
        assert torch.allclose(torch.tensor(weights, dtype=torch.float64), expected, rtol=1e-10)
    known = {v: saved[v.name] for v in rule.saved_vars}
    for s, p in zip(scores.tolist(), expected.tolist(), strict=True):
        again = evaluate(rule.recompute, {**known, LOGIT: s})
        assert math.isclose(again, p, rel_tol=1e-9, abs_tol=1e-12)
    found, _ = gradients_of(rule, list(zip(scores.tolist(), d_probs.tolist(), strict=True)), {}, 1.0, {})
    for got, ds in zip(found, d_scores.tolist(), strict=True):
        assert math.isclose(got, ds, rel_tol=1e-8, abs_tol=1e-10)


def test_derived_softmax_survives_large_scores():
    rule = trace_online(without_backward(OnlineSoftmax)).rule
    weights, _ = row(rule, [1000.0, 999.0])
    found, _ = gradients_of(rule, [(1000.0, 1.0), (999.0, 0.0)], {}, 1.0, {})
    assert math.isclose(found[0], weights[0] * (1 - weights[0]), rel_tol=1e-9)


def test_a_maximum_that_matters_gets_its_gradient():
    class Relative(OnlineFunc):
        online_rowscales = MappingProxyType({"m": float("-inf")})

        def online_fwd(self, scores, online_rowscales, b, h, q_idx):
            m = online_rowscales["m"].max(scores.get_reduce("max"))
            return scores, {"m": m}, 1.0

        def online_fwd_epilogue(self, o, online_rowscales, b, h, q_idx):
            return o / online_rowscales["m"], {}

    rule = trace_online(Relative).rule
    keys = [(0.5, 1.0), (2.0, -1.0), (-1.0, 0.25)]
    scores, values = (torch.tensor(x, dtype=torch.float64) for x in zip(*keys, strict=True))
    scores.requires_grad_()
    (want,) = torch.autograd.grad((scores / scores.max()) @ values, scores)
    found, _ = gradients_of(rule, keys, {}, 1.0, {})
    torch.testing.assert_close(torch.tensor(found, dtype=torch.float64), want)


def test_an_epilogue_that_adds_is_refused():
    class Shifted(OnlineSigmoid):
        forward = backward = None

        def online_fwd_epilogue(self, o, online_rowscales, b, h, q_idx):
            return o + 1, {}

    with pytest.raises(errors.RuleNotDerivable, match="epilogue"):
        trace_online(Shifted)


def test_names_of_states_and_saved_values():
    rule = trace_online(UpstreamSoftmax).rule
    assert [s.name for s in rule.states] == ["m", "r"] and [n for n, _ in rule.saved] == ["lse"]
    assert {s.name for s in trace_online(OnlineSoftmax).rule.states} == {"row_max", "row_sum"}
    assert {"m_new", "m_scale", "lse"} <= set(rule.names.values())
    assert all("test_online.py:" in text for text in rule.sources.values())
    assert trace_online(UpstreamSoftmax()).rule == trace_online(UpstreamSoftmax).rule
    names = KernelNames()
    names.assign("a tensor", "m")
    assert trace_online(UpstreamSoftmax, names).rule.states[0].name == "m_1"


def _with(**methods):
    return type("Broken", (OnlineSoftmax,), {k: staticmethod(v) for k, v in methods.items()})


BROKEN = {
    "missing state": (
        _with(online_fwd=lambda s, r, b, h, q: (s, {"row_max": 1.0}, 1.0)),
        errors.OnlineStateMismatch,
    ),
    "not a tuple": (_with(online_fwd=lambda s, r, b, h, q: s), errors.OnlineWrongResult),
    "not a row": (_with(online_fwd=lambda s, r, b, h, q: (s, r, s)), errors.OnlineWrongResult),
    "saved name": (
        _with(online_fwd_epilogue=lambda o, r, b, h, q: (o, {"x": 1.0})),
        errors.OnlineStateMismatch,
    ),
    "not traced": (_with(forward=lambda s, r, b, h, q, k: None), errors.OnlineWrongResult),
    "branch": (_with(forward=lambda s, r, b, h, q, k: s if s > 0 else 0), errors.ControlFlowOnTraced),
    "reduction": (_with(online_fwd=lambda s, r, b, h, q: s.get_reduce("mean")), errors.UnknownReduction),
    "reduced twice": (
        _with(online_fwd=lambda s, r, b, h, q: s.get_reduce("max").get_reduce("max")),
        errors.WrongOperands,
    ),
    "unknown row value": (
        _with(online_fwd=lambda s, r, b, h, q: (s, {"row_max": r["x"]}, 1.0)),
        errors.UnknownRowValue,
    ),
    "unknown saved value": (_with(forward=lambda s, r, b, h, q, k: s - r["x"]), errors.UnknownRowValue),
    "tensor": (_with(forward=lambda s, r, b, h, q, k: s * TABLE[h]), errors.UnknownOperation),
}
TABLE = torch.ones(4)


@pytest.mark.parametrize("name", BROKEN)
def test_broken_online_function(name):
    cls, error = BROKEN[name]
    with pytest.raises(error) as caught:
        trace_online(cls)
    assert caught.value.location is not None and caught.value.location.path == __file__


@pytest.mark.parametrize("missing", ["forward", "backward"])
@pytest.mark.parametrize("base", [OnlineSoftmax, OnlineRetention, OnlineSigmoid, UpstreamSoftmax])
def test_one_of_forward_and_backward_alone(base, missing):
    rule = trace_online(type("Half", (base,), {missing: None})).rule
    keys = [(0.5, 1.0), (2.0, -1.0), (-1.0, 0.25)]
    whole = trace_online(base).rule
    want, _ = gradients_of(whole, keys, {}, 0.8, {})
    found, _ = gradients_of(rule, keys, {}, 0.8, {})
    assert found == pytest.approx(want, rel=1e-9)
    assert [n for n, _ in rule.saved][: len(whole.saved)] == [n for n, _ in whole.saved]


def test_states_that_do_not_tell_the_reductions():
    """The logarithm of the sum is the state; the sum itself, which the gradient needs, is derived."""
    rule = trace_online(type("Derived", (LogSum,), {"forward": None, "backward": None})).rule
    keys = [(0.5, 1.0), (2.0, -1.0), (-1.0, 0.25)]
    want, _ = gradients_of(trace_online(OnlineSoftmax).rule, keys, {}, 0.8, {})
    found, _ = gradients_of(rule, keys, {}, 0.8, {})
    assert found == pytest.approx(want, rel=1e-9)


def test_an_update_that_depends_on_the_tiles_is_refused():
    class Fading(OnlineFunc):
        online_rowscales = MappingProxyType({"total": 0.0})

        def online_fwd(self, scores, online_rowscales, b, h, q_idx):
            return scores, {"total": online_rowscales["total"] * 0.5 + scores.get_reduce("abssum")}, 1.0

        def online_fwd_epilogue(self, o, online_rowscales, b, h, q_idx):
            return o / online_rowscales["total"], {}

    with pytest.raises(errors.RuleNotDerivable, match="in 2 tiles"):
        trace_online(Fading)


def test_missing_methods():
    with pytest.raises(errors.OnlineMethodMissing):
        trace_online(OnlineFunc)


def test_substituted_states_are_rows():
    rule = trace_online(OnlineSoftmax).rule
    assert all(set(e.axes) <= {"q"} for e in (*rule.new_states, rule.out_scale))
    assert substitute(rule.recompute, {LOGIT: IrVar("x", DType.FLOAT)}) is not rule.recompute


@pytest.mark.parametrize(
    "returned, got",
    [
        (lambda s, r: s, "a traced value"),
        (lambda s, r: (s, r), r"2 values \(a traced value, a dict\)"),
        (lambda s, r: None, "return"),
        (lambda s, r: 3, "an int"),
    ],
)
def test_wrong_result_is_named(returned, got):
    with pytest.raises(errors.OnlineWrongResult, match=got):
        trace_online(_with(online_fwd=lambda s, r, b, h, q: returned(s, r)))


@pytest.mark.parametrize("func", ["softmax", object(), int])
def test_something_else_than_an_online_function(func):
    with pytest.raises(errors.NotAnOnlineFunc):
        trace_online(func)


TEMPERATURE = 0.5


def _scaled(score):
    return score * TEMPERATURE


class Settings:
    """A class whose attributes are read."""

    temperature = 0.5


def _weighted(factor):
    class Weighted(OnlineFunc):
        temperature = 0.5

        def online_fwd(self, scores, online_rowscales, b, h, q_idx):
            return torch.sigmoid(factor(self, scores)), {}, 1.0

        def online_fwd_epilogue(self, o, online_rowscales, b, h, q_idx):
            return o, {}

    return Weighted


def test_numbers_of_library_rules_are_not_watched_in_vain():
    for rule in (
        OnlineSoftmax,
        OnlineSigmoid,
        OnlineRelu,
        OnlineRetention,
        UpstreamSoftmax,
        UpstreamRetention,
    ):
        trace = trace_online(rule())
        assert not trace.opaque and not trace.stale()


@pytest.mark.parametrize(
    "where", ["global", "inner function", "class", "object", "added to the object", "closure"]
)
def test_a_changed_number_is_noticed(where, monkeypatch):
    factor = 0.5
    read = {
        "global": lambda self, s: s * TEMPERATURE,
        "inner function": lambda self, s: _scaled(s),
        "closure": lambda self, s: s * factor,
    }.get(where, lambda self, s: s * self.temperature)
    cls = _weighted(read)
    func = cls()
    if where == "object":
        func.temperature = 0.5
    trace = trace_online(func)
    assert not trace.opaque and not trace.stale()
    if where == "class":
        cls.temperature = 0.9
    elif where == "closure":
        factor = 0.9
    elif "object" in where:
        func.temperature = 0.9
    else:
        monkeypatch.setitem(globals(), "TEMPERATURE", 0.9)
    assert trace.stale()
    again = trace_online(func)
    assert not again.stale() and again.rule != trace.rule


def test_what_cannot_be_watched_is_traced_again():
    box = [0.5]
    assert trace_online(_weighted(lambda self, s: s * box[0])).opaque
    assert trace_online(_weighted(lambda self, s: s * Settings.temperature)).opaque
    func = _weighted(lambda self, s: s * self.table["a"])()
    func.table, func.unused = {"a": 0.5}, []
    assert trace_online(func).opaque
    func = _weighted(lambda self, s: s)()
    func.unused = []
    assert not trace_online(func).opaque


def test_changed_methods_and_row_values_are_noticed():
    func = _weighted(lambda self, s: s)()
    trace = trace_online(func)
    func.online_fwd = lambda scores, online_rowscales, b, h, q_idx: (scores, {}, 1.0)
    assert trace.stale()
    func = UpstreamSoftmax()
    trace = trace_online(func)
    func.online_rowscales = {**func.online_rowscales, "r": SymbolScalar("r", Var("1.0"))}
    assert trace.stale()

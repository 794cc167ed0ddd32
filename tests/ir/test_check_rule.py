"""engine.check names the method of an OnlineFunc that disagrees with the others, and by how much."""

from __future__ import annotations

import pytest
import torch

from attn_engine import AttentionEngine, OnlineFunc, meta_tensor
from attn_engine.frontend import given_methods, trace_combine, trace_online
from attn_engine.ir.passes.check_rule import MethodReport, check_methods
from attn_engine.library import OnlineRelu, OnlineRetention, OnlineSigmoid, OnlineSoftmax
from tests.ir.user_rules import EuclideanNorm, LogSum, RunningNorm, Softmin
from tests.row_functions import CASES


def natural(final_rowscales):
    lse = final_rowscales["lse"]
    top = lse.get_reduce("max")
    total = torch.log((lse - top).exp().get_reduce("sum")) + top
    return (lse - total).exp()


def base_two(final_rowscales):
    """As AttentionEngine's example ships it: the lse is natural, the powers are of two."""
    lse = final_rowscales["lse"]
    top = lse.get_reduce("max")
    total = (lse - top).exp2().get_reduce("sum").log2() + top
    return (lse - total).exp2()


def variant(base=OnlineSoftmax, **methods):
    return type("Variant", (base,), {n: staticmethod(m) for n, m in methods.items()})


def reports(func) -> dict[str, MethodReport]:
    rule = trace_online(func).rule
    return {m.method: m for m in check_methods(rule, given_methods(func), trace_combine(func, rule))}


@pytest.mark.parametrize(
    "func",
    [OnlineSoftmax, OnlineSigmoid, OnlineRelu, OnlineRetention, EuclideanNorm, RunningNorm, Softmin, LogSum],
)
def test_right_methods_agree(func):
    found = reports(func)
    assert all(m.ok for m in found.values()), found
    assert set(found) == {"online_fwd", *given_methods(func)}


def test_row_functions_agree():
    for name in ("softmax", "retention", "relu of centred"):
        assert [m.ok for m in reports(CASES[name].make({})).values()] == [True]


def test_combine_in_the_wrong_base():
    good, bad = variant(combine=natural), variant(combine=base_two)
    assert reports(good)["combine"].ok
    found = reports(bad)
    assert [m for m, r in found.items() if not r.ok] == ["combine"]
    assert found["combine"].error > 1e-3


WRONG = {
    "forward": lambda s, r, b, h, q, k: torch.exp2(s - r["row_max"]) * r["inverse_sum"],
    "backward": lambda dp, p, r, doosum, b, h, q, k: p * dp,
}


@pytest.mark.parametrize("method", WRONG)
def test_a_wrong_method_is_named(method):
    found = reports(variant(**{method: WRONG[method]}))
    assert not found[method].ok and found["online_fwd"].ok
    assert found[method].error > 1e-3


@pytest.mark.parametrize("method", WRONG)
def test_a_wrong_method_is_named_where_the_other_is_left_out(method):
    """The other one is derived without it."""
    left_out = {"forward": "backward", "backward": "forward"}[method]
    func = type("Half", (OnlineSoftmax,), {method: staticmethod(WRONG[method]), left_out: None})
    assert left_out not in given_methods(func)
    found = reports(func)
    assert not found[method].ok and found["online_fwd"].ok


class Fading(OnlineFunc):
    """Half of the sum at every tile: it depends on how the row is cut."""

    def __init__(self):
        super().__init__({"total": 0.0}, {"total": 0.0})

    @staticmethod
    def online_fwd(scores, online_rowscales, b, h, q_idx):
        return scores, {"total": online_rowscales["total"] * 0.5 + scores.get_reduce("abssum")}, 1.0

    @staticmethod
    def online_fwd_epilogue(o, online_rowscales, b, h, q_idx):
        return o / online_rowscales["total"], online_rowscales

    @staticmethod
    def forward(scores, final_rowscales, b, h, q_idx, kv_idx):
        return scores / final_rowscales["total"]

    @staticmethod
    def backward(dp, scores, final_rowscales, doosum, b, h, q_idx, kv_idx):
        return dp / final_rowscales["total"]


def test_an_update_that_depends_on_the_tiles_is_named():
    assert not reports(Fading)["online_fwd"].ok


def test_the_engine_reports_it():
    meta = meta_tensor(None, 2, None, 8, dtype=torch.float32)
    q, k, v = (torch.randn(1, 5, 2, 8) for _ in range(3))
    engine = AttentionEngine([meta] * 3, online_func=variant(combine=base_two)(), backend="torch")
    report = engine.check(q, k, v)
    assert not report.ok and "combine: differs" in str(report) and "WRONG" in str(report)
    with pytest.raises(AssertionError, match="combine"):
        report.raise_if_failed()
    assert AttentionEngine([meta] * 3, backend="torch").check(q, k, v).ok

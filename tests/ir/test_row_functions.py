"""Derived rules in plain numbers: any tiles, any grouping of parts, gradients against torch's autograd."""

from __future__ import annotations

import inspect
import math
import random
from functools import cache

import pytest
import torch
from torch import Tensor

from attn_engine.frontend import RowFunction, trace_online
from attn_engine.ir.expr import Expr, Load, postorder
from attn_engine.ir.ops import Number
from attn_engine.ir.passes.merge_rule import MergeRule, NotMergeable, derive_merge, merged
from attn_engine.ir.passes.try_rule import finished, fold, forward_roots, gradients_of
from attn_engine.ir.program import BATCH, HEAD, Q_IDX, OnlineRule, d_saved_var
from tests.row_functions import CASES, Tensors

H = 1


@cache
def case(name: str) -> tuple[RowFunction, OnlineRule, Tensors]:
    tensors = CASES[name].learned()
    function = CASES[name].make(tensors)
    return function, trace_online(function).rule, tensors


def environment(rule: OnlineRule, tensors: Tensors) -> dict[Expr, Number]:
    """Positions, and the elements of the learned tensors at head H."""
    loads = {n for n in postorder(*forward_roots(rule)) if isinstance(n, Load)}
    elements = {n: tensors[n.tensor][H if n.indices else ()].item() for n in loads}
    return {BATCH: 0, HEAD: H, Q_IDX: 3, **elements}


def call(function: RowFunction, scores: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    where = {"h": H} if "h" in inspect.signature(function.function).parameters else {}
    found = function(scores, **where)
    return found if isinstance(found, tuple) else (found, {})


def row_of(name: str, size: int, spread: float = 2.0) -> list[tuple[float, float]]:
    source = random.Random(f"{name} {size}")
    return [(source.uniform(-spread, spread), source.uniform(-2, 2)) for _ in range(size)]


def expected(function: RowFunction, keys: list[tuple[float, float]]) -> tuple[float, dict[str, float]]:
    scores, values = (torch.tensor(x, dtype=torch.float64) for x in zip(*keys, strict=True))
    weights, rows = call(function, scores)
    return (weights @ values).item(), {n: x.item() for n, x in rows.items()}


@pytest.mark.parametrize("name", CASES)
def test_passes_and_lse(name: str) -> None:
    _, rule, _ = case(name)
    assert len(rule.earlier) + 1 == CASES[name].passes
    assert ("lse" in dict(rule.saved)) == CASES[name].lse
    assert [n for n, _ in rule.saved][: len(CASES[name].outputs)] == list(CASES[name].outputs)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("size", [1, 2, 9])
def test_any_tiles_give_the_row(name: str, size: int) -> None:
    function, rule, tensors = case(name)
    keys = row_of(name, size)
    o, rows = expected(function, keys)
    for width in (1, 2, 4, 9):
        tiles = [keys[i : i + width] for i in range(0, size, width)]
        got, saved = finished(rule, fold(rule, tiles, environment(rule, tensors)))
        assert math.isclose(got, o, rel_tol=1e-10, abs_tol=1e-12)
        for n, x in rows.items():
            assert math.isclose(saved[n], x, rel_tol=1e-9, abs_tol=1e-12), n


@pytest.mark.parametrize("name", [n for n in CASES if CASES[n].lse])
def test_lse_is_what_the_weights_divide_by(name: str) -> None:
    function, rule, tensors = case(name)
    keys = row_of(name, 5)
    _, saved = finished(rule, fold(rule, [keys], environment(rule, tensors)))
    scores = torch.tensor([s for s, _ in keys], dtype=torch.float64)
    torch.testing.assert_close(call(function, scores)[0].detach(), torch.exp(scores - saved["lse"]))


@pytest.mark.parametrize("name", CASES)
def test_merging_in_any_grouping(name: str) -> None:
    function, rule, tensors = case(name)
    merge, others = derive_merge(rule), environment(rule, tensors)
    if CASES[name].passes > 1:
        assert isinstance(merge, NotMergeable) and "passes" in merge.reason
        return
    assert isinstance(merge, MergeRule), merge
    keys = row_of(name, 8)
    parts = [fold(rule, [p] if p else [], others) for p in (keys[:3], keys[3:4], keys[4:], [])]
    a, b, c, empty = parts
    want, _ = expected(function, keys)
    for whole in (
        merged(rule, merge, merged(rule, merge, a, b), c),
        merged(rule, merge, c, merged(rule, merge, b, merged(rule, merge, empty, a))),
        merged(rule, merge, merged(rule, merge, b, empty), merged(rule, merge, a, c)),
    ):
        assert math.isclose(finished(rule, whole)[0], want, rel_tol=1e-10, abs_tol=1e-12)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("size", [1, 7])
def test_gradients_against_autograd(name: str, size: int) -> None:
    """Of the output and of every row output at once, to the scores and to the learned tensors."""
    function, rule, tensors = case(name)
    keys = row_of(name, size)
    scores = torch.tensor([s for s, _ in keys], dtype=torch.float64, requires_grad=True)
    values = torch.tensor([v for _, v in keys], dtype=torch.float64)
    source = random.Random(name)
    weights, rows = call(function, scores)
    seeds = {n: source.uniform(-1, 1) for n in rows}
    loss = 0.7 * (weights @ values) + sum(seeds[n] * x for n, x in rows.items()) + 0 * scores.sum()
    wanted = torch.autograd.grad(loss, [scores, *tensors.values()], allow_unused=True)
    wanted = [torch.zeros(()) if g is None else g for g in wanted]
    d_scores, d_reads = gradients_of(rule, keys, environment(rule, tensors), 0.7, seeds)
    for got, want in zip(d_scores, wanted[0].expand(size).tolist(), strict=True):
        assert math.isclose(got, want, rel_tol=1e-8, abs_tol=1e-10)
    for (tensor, x), want in zip(tensors.items(), wanted[1:], strict=True):
        found = [g for load, g in d_reads.items() if load.tensor == tensor]
        assert found or want.abs().sum().item() == 0
        assert math.isclose(sum(found), (want[H] if x.ndim else want).item(), rel_tol=1e-8, abs_tol=1e-10)


def test_ties_share_a_gradient_evenly() -> None:
    _, rule, tensors = case("by largest")
    keys = [(2.0, 1.0), (-2.0, 0.5), (1.0, -1.0), (2.0, 3.0)]
    scores = torch.tensor([s for s, _ in keys], dtype=torch.float64, requires_grad=True)
    values = torch.tensor([v for _, v in keys], dtype=torch.float64)
    loss = (scores / scores.abs().amax()) @ values  # amax shares; max() of a whole tensor does too
    (want,) = torch.autograd.grad(loss, scores)
    got, _ = gradients_of(rule, keys, environment(rule, tensors), 1.0, {})
    torch.testing.assert_close(torch.tensor(got, dtype=torch.float64), want)


@pytest.mark.parametrize("name", ["softmax", "softmax by lse", "softmax + 1", "sink"])
@pytest.mark.parametrize("offset", [-1000.0, 1000.0, 1e6])
def test_huge_scores_stay_exact(name: str, offset: float) -> None:
    _, rule, tensors = case(name)
    keys = [(s + offset, v) for s, v in row_of(name, 5)]
    scores = torch.tensor([s for s, _ in keys], dtype=torch.float64)
    want = (torch.softmax(scores, -1) * torch.tensor([v for _, v in keys], dtype=torch.float64)).sum()
    if name in ("softmax + 1", "sink") and offset < 0:
        want = torch.zeros(())  # everything goes to the constant term
    for tiles in ([keys], [[k] for k in keys]):
        got, _ = finished(rule, fold(rule, tiles, environment(rule, tensors)))
        assert math.isclose(got, float(want), rel_tol=1e-9, abs_tol=1e-12)
    found, _ = gradients_of(rule, keys, environment(rule, tensors), 1.0, {})
    assert all(math.isfinite(x) for x in found)


def test_stabilisers_have_no_gradient() -> None:
    """The maximum of softmax needs no pass of its own backward, unless it is itself a row output."""
    for name in ("softmax", "softmax + 1", "sink", "temperature", "softmax by lse"):
        assert not case(name)[1].adjoints, name
    with_rows = case("softmax with rows")[1]
    (adjoint,) = with_rows.adjoints
    assert [
        d_saved_var(n) in postorder(*(e for _, e in adjoint.values)) for n in ("top", "spread", "entropy")
    ] == [
        True,
        True,
        False,
    ]

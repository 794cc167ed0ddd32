"""What is allowed follows from the data, and what is not allowed is seen."""

from __future__ import annotations

import math

import pytest
import torch

from attn_engine.gpu_check.judge import by_chance, judge

EXACT = torch.randn(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
NOISE = torch.randn(1000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def verdict(name: str, found: torch.Tensor, plain: torch.Tensor, dtype: torch.dtype = torch.bfloat16):
    (only,) = judge(dtype, {name: found}, {name: EXACT[: found.numel()]}, {name: plain})
    return only


@pytest.mark.parametrize(("times", "ok"), [(0.9, True), (1.05, True), (1.5, False)])
def test_errors_like_those_of_plain_code(times: float, ok: bool) -> None:
    v = verdict("dq", (EXACT + 0.1 * times * NOISE).float(), (EXACT + 0.1 * NOISE).float())
    assert v.ok == ok
    assert (v.worst <= 1) == ok


def test_float32_may_have_ten_times_the_error() -> None:
    plain = (EXACT + 1e-5 * NOISE).float()
    assert verdict("o", (EXACT + 9e-5 * NOISE).float(), plain, torch.float32).ok
    assert not verdict("o", (EXACT + 2e-4 * NOISE).float(), plain, torch.float32).ok


def test_rounding_of_the_result_is_always_allowed() -> None:
    v = verdict("o", EXACT.bfloat16(), EXACT)
    assert v.ok, v
    assert not verdict("o", EXACT.bfloat16() * 1.02, EXACT).ok


def test_one_wrong_element_does_not_hide() -> None:
    found, plain = (EXACT + 0.01 * NOISE).float(), (EXACT + 0.01 * NOISE).float()
    found[5] += 0.3
    v = verdict("o", found, plain)
    assert v.mean <= v.mean_limit
    assert not v.ok


@pytest.mark.parametrize("strange", [math.nan, math.inf, -math.inf])
def test_nan_and_infinities(strange: float) -> None:
    found = EXACT.float()
    found[5] = strange
    v = verdict("o", found, EXACT.float() + 1)
    assert not v.ok
    assert math.isnan(v.worst) or v.worst > 1


def test_equal_infinities_agree() -> None:
    exact = torch.tensor([1.0, -math.inf], dtype=torch.float64)
    (v,) = judge(torch.float32, {"lse": exact.float()}, {"lse": exact}, {"lse": exact})
    assert v.ok, v


def test_shapes_must_agree() -> None:
    with pytest.raises(AssertionError, match="o has shape"):
        judge(torch.float32, {"o": EXACT[:5]}, {"o": EXACT}, {"o": EXACT})


@pytest.mark.parametrize("count", [4, 8, 16, 64])
def test_chance(count: int) -> None:
    """Of ten thousand pairs of equally distributed samples one or two exceed the factor."""
    samples = torch.randn(2, 50_000, count, generator=torch.Generator().manual_seed(2))
    sizes = samples.square().mean(-1).sqrt()
    exceeded = int((sizes[0] > by_chance(count) * sizes[1]).sum())
    assert exceeded <= 50 * (1 if count >= 8 else 4), exceeded
    assert by_chance(10**8) == pytest.approx(1, abs=1e-3)

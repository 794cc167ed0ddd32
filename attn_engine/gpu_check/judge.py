"""How far a result may be from float64: as far as plain PyTorch code of the same type is, measured on the same inputs.

The rule of PyTorch's own tests of flex_attention: the mean error is at most 1.1 times that of straightforward code
where elements have 16 bits, 10 times in float32; the root mean square error of gradients of captured tensors 1.35
times. The largest error is bounded as well, so that one wrong element cannot hide among many right ones. Nobody can be
closer than the result's own rounding: half a unit in the last place is always allowed. And where a tensor has few
elements, two equally exact computations differ by chance: see by_chance.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

MEAN = {torch.float16: 1.1, torch.bfloat16: 1.1, torch.float32: 10.0}
LEARNED = 1.35
# The largest of millions of errors varies more than their mean: as in tests/conformance.
LARGEST = {torch.float16: 3.0, torch.bfloat16: 3.0, torch.float32: 10.0}


ONE_IN_TEN_THOUSAND = 3.72  # standard deviations of a normal distribution


def by_chance(count: int) -> float:
    """By what factor the sizes of two equally distributed samples of `count` errors differ once in ten thousand times.

    Fisher's z: the logarithm of the ratio of their root mean squares is nearly normal, with variance 1 / count.
    """
    return math.exp(ONE_IN_TEN_THOUSAND / math.sqrt(count)) if count else 1.0


@dataclass(frozen=True, slots=True)
class Verdict:
    """Errors of one tensor, ours and straightforward code's, and what is allowed. NaN is never within a limit."""

    name: str
    mean: float
    mean_limit: float
    largest: float
    largest_limit: float

    @property
    def ok(self) -> bool:
        return self.mean <= self.mean_limit and self.largest <= self.largest_limit

    @property
    def worst(self) -> float:
        """The larger part of what is allowed that the errors take up; above 1: too much. NaN where something is NaN."""
        parts = [
            0.0 if error == 0 else error / limit if limit > 0 else torch.inf
            for error, limit in ((self.mean, self.mean_limit), (self.largest, self.largest_limit))
        ]
        return max(parts, key=lambda x: (x != x, x))

    def __str__(self) -> str:
        return (
            f"{self.name}: mean error {self.mean:.2e} of {self.mean_limit:.2e} allowed, "
            f"largest {self.largest:.2e} of {self.largest_limit:.2e}"
        )


def judge(
    dtype: torch.dtype,
    found: Mapping[str, Tensor],
    exact: Mapping[str, Tensor],
    straightforward: Mapping[str, Tensor],
) -> list[Verdict]:
    """A verdict for every result of a case whose q is of `dtype`."""
    return [_verdict(name, dtype, found[name], want, straightforward[name]) for name, want in exact.items()]


def _verdict(name: str, dtype: torch.dtype, found: Tensor, exact: Tensor, plain: Tensor) -> Verdict:
    if found.shape != exact.shape:
        raise AssertionError(f"{name} has shape {tuple(found.shape)}, expected {tuple(exact.shape)}")
    errors, plain_errors = _errors(found, exact), _errors(plain, exact)
    learned = name.startswith("d ")
    mean, plain_mean = (_size(x, learned) for x in (errors, plain_errors))
    size = exact.double().abs()
    size = torch.where(torch.isfinite(size), size, 0.0)
    half_unit, chance = torch.finfo(found.dtype).eps / 2, by_chance(exact.numel())
    return Verdict(
        name,
        mean,
        max(chance * (LEARNED if learned else MEAN[dtype]) * plain_mean, half_unit * _size(size, learned)),
        _top(errors),
        max(chance * LARGEST[dtype] * _top(plain_errors), half_unit * _top(size)),
    )


def _errors(found: Tensor, exact: Tensor) -> Tensor:
    """Absolute errors; equal infinities agree, and an infinity or a NaN on one side only is a NaN."""
    found, exact = found.double(), exact.double()
    errors = (found - exact).abs()
    return torch.where(found == exact, 0.0, torch.where(torch.isfinite(errors), errors, torch.nan))


def _size(x: Tensor, root_mean_square: bool) -> float:
    if x.numel() == 0:
        return 0.0
    return float(x.square().mean().sqrt() if root_mean_square else x.mean())


def _top(x: Tensor) -> float:
    return float(x.max()) if x.numel() else 0.0

"""What a call may return besides the output."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class AuxRequest(NamedTuple):
    """Which row values flex_attention returns."""

    lse: bool = False
    max_scores: bool = False


class AuxOutput(NamedTuple):
    """The row values asked for, each (B, H, Sq) float32 (float64 for float64 inputs); None for the others.

    lse: logarithm (natural) of the sum of exp(score); differentiable. max_scores: the largest score; no gradient.
    Both are of the scores after score_mod and mask, and -inf in a row that sees no key.
    """

    lse: Tensor | None = None
    max_scores: Tensor | None = None

"""Weights in the tiled order of Ascend's cube units ("NZ"), to plain matrices and back.

NZ keeps 16 columns together: a matrix (k, n) lies as (n / 16, k, 16), or, cut along the rows too, as
(n / 16, k / 16, 16, 16).
"""

from __future__ import annotations

from torch import Tensor

from attn_engine.errors import ShapeMismatch

COLUMNS = 16


def to_nz(weight: Tensor) -> Tensor:
    """(n / 16, k, 16) of a matrix (k, n), contiguous; n is a multiple of 16."""
    if weight.ndim != 2 or weight.shape[1] % COLUMNS:
        reason = "16 columns lie together"
        raise ShapeMismatch(
            argument="weight", got=tuple(weight.shape), expected="(k, a multiple of 16)", reason=reason
        )
    return weight.unflatten(1, (-1, COLUMNS)).transpose(0, 1).contiguous()


def from_nz(weight: Tensor) -> Tensor:
    """The matrix (k, n), contiguous, of one that lies as (n / 16, k, 16) or (n / 16, k / 16, 16, 16)."""
    if weight.ndim == 4 and weight.shape[2] == COLUMNS:
        weight = weight.flatten(1, 2)
    if weight.ndim != 3 or weight.shape[2] != COLUMNS:
        reason = "16 columns lie together"
        expected = "(n / 16, k, 16) or (n / 16, k / 16, 16, 16)"
        raise ShapeMismatch(argument="weight", got=tuple(weight.shape), expected=expected, reason=reason)
    return weight.transpose(0, 1).flatten(1).contiguous()

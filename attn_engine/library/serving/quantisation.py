"""What narrow formats leave of queries and keys, simulated: the numbers behind fp8 and int8 indexers and caches.

Every function gives the dequantised values in the type of x and the scales, so that value = code * scale.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from attn_engine.errors import ShapeMismatch, WrongArgument
from attn_engine.runtime.scaled import dequantised

E4M3_LARGEST = 448.0
BLOCK = 128
LEAST = 1e-4  # of a block's largest magnitude: zeros have a scale too


class Quantised(NamedTuple):
    """values: what is left of x, in its shape and type. codes: float8_e4m3fn or int8. scales: float32, a number for
    each block of the last dimension (..., blocks)."""

    values: Tensor
    codes: Tensor
    scales: Tensor


def hadamard(x: Tensor) -> Tensor:
    """x H / sqrt(D) over the last dimension D, a power of two; H is Sylvester's matrix. Orthogonal and its own inverse.

    Products of two vectors that are both turned do not change; outliers are spread over all columns, which is what
    blocks with one scale like. In float32 (float64 for float64), D log D operations, returned in x's type.
    """
    n = x.shape[-1]
    if n < 1 or n & (n - 1):
        reason = "the matrix has a power of two rows"
        expected = (*x.shape[:-1], 1 << max(n, 1).bit_length())
        raise ShapeMismatch(argument="x", got=tuple(x.shape), expected=expected, reason=reason)
    wide = x.to(torch.float64 if x.dtype is torch.float64 else torch.float32)
    step = 1
    while step < n:
        first, second = wide.unflatten(-1, (n // (2 * step), 2, step)).unbind(-2)
        wide = torch.stack((first + second, first - second), -2).flatten(-3)
        step *= 2
    return (wide / math.sqrt(n)).to(x.dtype)


def to_fp8(x: Tensor, *, block: int = BLOCK, ue8m0: bool = False) -> Quantised:
    """e4m3 numbers with a scale for every `block` columns: the block's largest magnitude (at least 1e-4) / 448.

    ue8m0: scales are rounded up to powers of two, so that dequantised values have no rounding of their own. The last
    block may be shorter. Not differentiable.
    """
    blocks, largest = _blocks(x, block)
    scales = largest.clamp_min(LEAST) / E4M3_LARGEST
    if ue8m0:
        fraction, exponent = torch.frexp(scales)  # scales = fraction * 2^exponent, fraction in [0.5, 1)
        scales = torch.ldexp(torch.ones_like(scales), exponent - (fraction == 0.5).to(exponent.dtype))
    codes = (blocks / scales[..., None]).clamp(-E4M3_LARGEST, E4M3_LARGEST).to(torch.float8_e4m3fn)
    return _dequantised(x, codes, scales)


def to_int8(x: Tensor, *, block: int | None = None) -> Quantised:
    """int8 numbers with the scale largest magnitude / 127 for every row, or every `block` columns; ties to even.

    A block of zeros has the scale 1e-4 / 127. Not differentiable.
    """
    blocks, largest = _blocks(x, x.shape[-1] if block is None else block)
    scales = largest.clamp_min(LEAST) / 127
    codes = (blocks / scales[..., None]).round().clamp(-127, 127).to(torch.int8)
    return _dequantised(x, codes, scales)


def simulated(x: Tensor, turned: bool = False, quantisation: str | None = None) -> Tensor:
    """x after `hadamard`, where it is turned, and after a narrow format: None, "fp8", "fp8_ue8m0" or "int8"."""
    if quantisation not in (None, "fp8", "fp8_ue8m0", "int8"):
        expected = 'None, "fp8", "fp8_ue8m0" or "int8"'
        instead = "fp8 has a scale for 128 columns, int8 one for each row."
        raise WrongArgument(argument="quantisation", got=quantisation, expected=expected, instead=instead)
    x = hadamard(x) if turned else x
    if quantisation is None:
        return x
    found = to_int8(x) if quantisation == "int8" else to_fp8(x, ue8m0=quantisation == "fp8_ue8m0")
    return found.values


def dequantise(
    codes: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32, block: int = BLOCK
) -> Tensor:
    """codes * scales in `dtype`: scales (..., blocks) of `block` columns each, or (..., 1) for whole rows."""
    return dequantised(codes, scales, dtype, block)


def _blocks(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """x in float32 as (..., blocks, block), zeros behind, and the largest magnitude of each block."""
    if isinstance(block, bool) or block < 1:
        raise WrongArgument(argument="block", got=block, expected="1 or more", instead="128 is usual.")
    wide = x.detach().float()
    count = -(-x.shape[-1] // block)
    wide = torch.nn.functional.pad(wide, (0, count * block - x.shape[-1])).unflatten(-1, (count, block))
    return wide, wide.abs().amax(-1)


def _dequantised(x: Tensor, codes: Tensor, scales: Tensor) -> Quantised:
    values = (codes.float() * scales[..., None]).flatten(-2)[..., : x.shape[-1]].to(x.dtype)
    return Quantised(values, codes.flatten(-2)[..., : x.shape[-1]].contiguous(), scales)

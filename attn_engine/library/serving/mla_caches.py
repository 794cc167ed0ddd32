"""The bytes of a token in FlashMLA's float8 caches: latent numbers in e4m3, a float32 scale for every 128 of them, and
the rotated key in bfloat16: 512 + 16 + 128 = 656 bytes for a latent of 512 and a rotated key of 64.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from attn_engine.errors import ShapeMismatch, UnsupportedDtype
from attn_engine.library.serving.quantisation import BLOCK, dequantise, to_fp8

LATENT = 512


class LatentBytes(NamedTuple):
    """Views of one buffer: latent (..., 512) float8_e4m3fn, scales (..., 4) float32, rope (..., 64) bfloat16."""

    latent: Tensor
    scales: Tensor
    rope: Tensor


def latent_bytes(cache: Tensor, latent: int = LATENT) -> LatentBytes:
    """The parts of a cache (..., bytes of a token), uint8 or of another type of one byte, without a copy.

    latent: numbers of it, a multiple of 128. Writing to the views writes to the cache.
    """
    if cache.element_size() != 1:
        raise UnsupportedDtype(argument="k_cache", got=cache.dtype, supported="uint8, int8, float8_e4m3fn")
    scales = latent // BLOCK * 4
    rope = cache.shape[-1] - latent - scales
    if latent % BLOCK or latent < BLOCK or rope < 2 or rope % 2 or cache.stride(-1) != 1:
        expected = f"(..., {latent} + {scales} + 2 for each number of the rotated key), contiguous at the end"
        reason = "those are the bytes of a token"
        raise ShapeMismatch(argument="k_cache", got=tuple(cache.shape), expected=expected, reason=reason)
    parts = cache.view(torch.uint8).split((latent, scales, rope), -1)
    kinds = (torch.float8_e4m3fn, torch.float32, torch.bfloat16)
    return LatentBytes(*(x.view(kind) for x, kind in zip(parts, kinds, strict=True)))


def pack_latent_bytes(latent: Tensor, rope: Tensor, *, ue8m0: bool = False) -> Tensor:
    """uint8 (..., bytes of a token): latent rows (..., 512), quantised, and rotated keys (..., 64) beside them.

    ue8m0: scales are powers of two. What `write_to_slots` and `append_to_cache` write to such a cache.
    """
    if latent.shape[:-1] != rope.shape[:-1]:
        expected = f"{tuple(latent.shape[:-1])} and the numbers of a rotated key"
        reason = "it lies beside latent"
        raise ShapeMismatch(argument="rope", got=tuple(rope.shape), expected=expected, reason=reason)
    found = to_fp8(latent, ue8m0=ue8m0)
    parts = (found.codes, found.scales, rope.to(torch.bfloat16))
    return torch.cat([x.contiguous().view(torch.uint8) for x in parts], -1)


def unpack_latent_bytes(cache: Tensor, dtype: torch.dtype, latent: int = LATENT) -> Tensor:
    """(..., 512 + 64) in `dtype`: numbers times scales, then the rotated keys; a copy."""
    parts = latent_bytes(cache, latent)
    return torch.cat((dequantise(parts.latent, parts.scales, dtype), parts.rope.to(dtype)), -1)

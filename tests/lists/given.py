"""Calls that give blocks, and what they mean: dense formulas in float64, made without the package's own code."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from attn_engine import AttentionEngine, meta_tensor
from tests.lists.test_listed import causal

__all__ = ["Inputs", "causal", "closeness", "drawn", "engine", "gradients", "rows_visible", "softmax_rows"]

LIMITS = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 1e-2}  # of the largest element


@dataclass(frozen=True)
class Inputs:
    """q (B, Sq, H, D), k (B, Skv, Hkv, D), v (B, Skv, Hkv, Dv), and a weight for the output."""

    q: Tensor
    k: Tensor
    v: Tensor
    weight: Tensor

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.q, self.k, self.v

    @property
    def group(self) -> int:
        return self.q.shape[2] // self.k.shape[2]


def drawn(
    shape: Sequence[int],
    lengths: tuple[int, int],
    dtype: torch.dtype = torch.float32,
    dims: tuple[int, int] = (32, 32),
) -> Inputs:
    """shape: (batches, heads, kv heads). Fresh numbers at every call."""
    (batches, heads, kv_heads), (q_len, kv_len), (dim, dim_v) = shape, lengths, dims
    q = torch.randn(batches, q_len, heads, dim).to(dtype).requires_grad_()
    k = torch.randn(batches, kv_len, kv_heads, dim).to(dtype).requires_grad_()
    v = torch.randn(batches, kv_len, kv_heads, dim_v).to(dtype).requires_grad_()
    return Inputs(q, k, v, torch.randn(batches, q_len, heads, dim_v))


@cache
def engine(
    backend: str,
    dtype: torch.dtype = torch.float32,
    mask: Any = causal,
    dims: tuple[int, int] = (32, 32),
) -> AttentionEngine:
    metas = [meta_tensor(None, None, None, d, dtype=dtype) for d in (dims[0], *dims)]
    return AttentionEngine(metas, mask_mod=mask, backend=backend)


def rows_visible(
    blocks: Tensor, sizes: tuple[int, int], lengths: tuple[int, int], heads: int, mask: Any = None
) -> Tensor:
    """bool (batches, heads, Sq, Skv): pairs of visible blocks (batches, any heads, q blocks, kv blocks) that the mask
    leaves."""
    q, kv = (torch.arange(n) for n in lengths)
    pairs = blocks[:, :, q // sizes[0]][..., kv // sizes[1]]
    pairs = pairs.repeat_interleave(heads // pairs.shape[1], 1)
    if mask is not None:
        pairs = pairs & mask(None, None, q[:, None], kv[None, :])
    return pairs


def softmax_rows(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scored: Callable[[Tensor], Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """o (B, Sq, H, Dv) and lse (B, H, Sq) in float64; 0 and -inf in a row that sees nothing."""
    group = q.shape[2] // k.shape[2]
    query, key, value = (x.double().transpose(1, 2) for x in (q, k, v))
    key, value = (x.repeat_interleave(group, 1) for x in (key, value))
    scores = query @ key.transpose(2, 3)
    scores = scores / math.sqrt(q.shape[-1]) if scored is None else scored(scores)
    scores = scores.masked_fill(~visible, -math.inf)
    some = visible.any(-1, keepdim=True)
    lse = torch.where(some[..., 0], scores.masked_fill(~some, 0.0).logsumexp(-1), -math.inf)
    weights = torch.where(visible, (scores - lse.masked_fill(~some[..., 0], 0.0)[..., None]).exp(), 0.0)
    return (weights @ value).transpose(1, 2), lse


def gradients(o: Tensor, weight: Tensor, wanted: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(o, list(wanted), weight.to(o.dtype))


def closeness(found: Sequence[Tensor], wanted: Sequence[Tensor], dtype: torch.dtype) -> None:
    """Each within the limit of its type, of the largest element."""
    for name, x, exact in zip("o q k v more".split(), found, wanted, strict=False):
        assert torch.isfinite(x).all(), name
        largest = max(1.0, float(exact.detach().abs().max())) if exact.numel() else 1.0
        error = float((x.detach().double() - exact.detach().double()).abs().max()) if x.numel() else 0.0
        assert error <= LIMITS[dtype] * largest, (name, error, largest)

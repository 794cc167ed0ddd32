"""The definition, densely, in plain torch: what every implementation is compared with.

The user's own functions are evaluated on one pair after the other by torch.vmap, so nothing here knows how anybody
traces them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class IndexWithTensors(TorchFunctionMode):
    """x[i] for 0-dim tensors i as a gather, which torch.vmap can map; plain indexing would ask for their values."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.__getitem__:
            x, given = args
            items = given if isinstance(given, tuple) else (given,)
            if any(isinstance(i, Tensor) for i in items) and not any(isinstance(i, slice) for i in items):
                indices = [torch.as_tensor(i, device=x.device).long() for i in items]
                return torch.ops.aten.index(x, indices)
        return func(*args, **(kwargs or {}))


def on_pairs(mask_mod: Callable[..., Any], shape: tuple[int, ...]) -> Tensor:
    """mask_mod(b, h, q, kv) for every pair, (B, H, Sq, Skv)."""
    everywhere = torch.ones(shape, dtype=torch.bool).nonzero(as_tuple=True)
    if not everywhere[0].numel():
        return torch.ones(shape, dtype=torch.bool)
    with IndexWithTensors():
        return torch.vmap(mask_mod)(*(i.to(torch.int32) for i in everywhere)).reshape(shape)


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    score_mod: Callable[..., Any] | None,
    mask_mod: Callable[..., Any] | None,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """o, lse and the largest scores, in the dtype of q with scores of at least float32; differentiable."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1).expand(q.shape[0], -1, -1, -1) for x in (k, v))
    precise = torch.float64 if q.dtype is torch.float64 else torch.float32
    scores = (q @ k.mT).to(precise) * (1 / math.sqrt(q.shape[3]) if scale is None else scale)
    shape = tuple(scores.shape)
    visible = torch.ones(shape, dtype=torch.bool)
    if mask_mod is not None:
        visible = on_pairs(mask_mod, shape)
    if score_mod is not None:
        scores = _at(visible, score_mod, scores)
    scores = scores.to(precise).masked_fill(~visible, -math.inf)
    largest = (
        scores.detach().amax(-1, keepdim=True) if k.shape[2] else scores.new_full((*shape[:3], 1), -math.inf)
    )
    safe = torch.where(torch.isfinite(largest), largest, 0.0)
    weights = torch.exp(scores - safe)
    total = weights.sum(-1, keepdim=True)
    alive = total > 0
    weights = weights / torch.where(alive, total, 1.0)
    lse = torch.where(alive, safe + torch.log(torch.where(alive, total, 1.0)), -math.inf)
    return weights.to(q.dtype) @ v, lse[..., 0], largest[..., 0]


def _at(visible: Tensor, score_mod: Callable[..., Any], scores: Tensor) -> Tensor:
    """score_mod at the visible pairs alone, 0 elsewhere: hidden NaN reach no gradient."""
    b, h, q, kv = (i.to(torch.int32) for i in visible.nonzero(as_tuple=True))
    if b.numel() == 0:
        return torch.zeros_like(scores)
    pairs = scores[visible]
    with IndexWithTensors():
        seen = torch.vmap(score_mod)(pairs, b, h, q, kv)
    return torch.zeros_like(scores).masked_scatter(visible, seen.to(scores.dtype))

"""Learned biases per distance (T5, arXiv:1910.10683, section 2.1; per distance, Shaw et al., arXiv:1803.02155)."""

from __future__ import annotations

import math
from typing import Any

import torch

from attn_engine.errors import WrongArgument
from attn_engine.frontend import ScoreMod


def relative_bias(bias: torch.Tensor) -> ScoreMod:
    """A learned bias per head and distance.

    bias: (heads, 2 * reach + 1), read at kv_idx - q_idx + reach; farther keys use the ends.
    """
    reach = bias.shape[1] // 2
    last = 2 * reach

    def relative_bias_score(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        distance = torch.clamp(kv_idx - q_idx + reach, 0, last)
        return score + bias[h, distance]

    return relative_bias_score


def t5_bias(bias: torch.Tensor, max_distance: int = 128, bidirectional: bool = True) -> ScoreMod:
    """T5's learned bias per bucket of distances: near ones have buckets of their own, far ones share them.

    bias: (buckets, heads), as T5's checkpoints keep it. bidirectional: half of the buckets for keys after the query.
    """
    buckets = t5_buckets(bias.shape[0], max_distance, bidirectional)
    last = 2 * max_distance

    def t5_bias_score(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        distance = torch.clamp(kv_idx - q_idx + max_distance, 0, last)
        return score + bias[buckets[distance], h]

    return t5_bias_score


def t5_buckets(buckets: int, max_distance: int, bidirectional: bool) -> torch.Tensor:
    """The bucket of each distance kv - q from -max_distance to max_distance: int32 (2 * max_distance + 1,)."""
    sides = 2 if bidirectional else 1
    if buckets < 2 * sides or max_distance <= buckets // sides // 2:
        expected = f"{2 * sides} or more, fewer than {2 * sides} * max_distance ({max_distance})"
        raise WrongArgument(
            argument="bias.shape[0]", got=buckets, expected=expected, instead="T5 has 32 and 128."
        )
    distance = torch.arange(-max_distance, max_distance + 1)
    one_side = buckets // sides
    after = (distance > 0) * one_side if bidirectional else torch.zeros_like(distance)
    size = distance.abs() if bidirectional else (-distance).clamp(min=0)
    exact = one_side // 2
    far = torch.log(size.clamp(min=1).float() / exact) / math.log(max_distance / exact) * (one_side - exact)
    shared = (exact + far.long()).clamp(max=one_side - 1)
    return (after + torch.where(size < exact, size, shared)).int()

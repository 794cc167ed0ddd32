"""Score functions: what is added to a score or done to it before the mask."""

from __future__ import annotations

from typing import Any

import torch

from attn_engine.frontend import ScoreMod


def alibi(slopes: torch.Tensor) -> ScoreMod:
    """A penalty that grows with distance, with a slope per head (ALiBi, arXiv:2108.12409). slopes: (heads,)."""

    def alibi_score(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        distance = q_idx - kv_idx
        return score - slopes[h] * distance

    return alibi_score


def soft_cap(cap: float) -> ScoreMod:
    """Scores squashed into (-cap, cap) (Gemma 2, arXiv:2408.00118, section 2)."""

    def soft_cap_score(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return cap * torch.tanh(score / cap)

    return soft_cap_score


def relative_bias(bias: torch.Tensor) -> ScoreMod:
    """A learned bias per head and distance (T5, arXiv:1910.10683, section 2.1).

    bias: (heads, 2 * reach + 1), read at kv_idx - q_idx + reach; farther keys use the ends.
    """
    reach = bias.shape[1] // 2
    last = 2 * reach

    def relative_bias_score(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        distance = torch.clamp(kv_idx - q_idx + reach, 0, last)
        return score + bias[h, distance]

    return relative_bias_score


def pair_bias(bias: torch.Tensor) -> ScoreMod:
    """A bias per pair of positions (AlphaFold 2, supplementary algorithm 7).

    bias: (length of q, length of k), (heads, ., .) or (batch, heads, ., .).
    """
    rank = bias.ndim

    def pair_bias_score(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        where = (b, h, q_idx, kv_idx)[4 - rank :]
        return score + bias[where]

    return pair_bias_score

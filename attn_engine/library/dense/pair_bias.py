"""A bias per pair of positions (AlphaFold 2, Nature 596, supplementary algorithm 7)."""

from __future__ import annotations

from typing import Any

import torch

from attn_engine.errors import WrongArgument
from attn_engine.frontend import ScoreMod


def pair_bias(bias: torch.Tensor) -> ScoreMod:
    """bias: (length of q, length of k), (heads, ., .) or (batch, heads, ., .)."""
    rank = bias.ndim
    if not 2 <= rank <= 4:
        expected, shape = "(q, k), (heads, q, k) or (batch, heads, q, k)", tuple(bias.shape)
        raise WrongArgument(argument="bias", got=shape, expected=expected, instead="Add or drop dimensions.")

    def pair_bias_score(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        where = (b, h, q_idx, kv_idx)[4 - rank :]
        return score + bias[where]

    return pair_bias_score

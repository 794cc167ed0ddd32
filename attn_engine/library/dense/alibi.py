"""Linear distance biases (ALiBi, arXiv:2108.12409, section 3)."""

from __future__ import annotations

import math
from typing import Any

import torch

from attn_engine.frontend import ScoreMod
from attn_engine.library.arguments import at_least


def alibi(slopes: torch.Tensor) -> ScoreMod:
    """A penalty that grows with distance, with a slope per head. slopes: (heads,)."""

    def alibi_score(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        distance = q_idx - kv_idx
        return score - slopes[h] * distance

    return alibi_score


def alibi_slopes(heads: int) -> torch.Tensor:
    """The geometric slopes of the paper, (heads,): 2^(-8/n), 2^(-16/n), ...; between them where n is no power of two.

    >>> alibi_slopes(4)
    tensor([0.2500, 0.0625, 0.0156, 0.0039])
    """
    at_least("heads", heads, 1)
    whole = 2 ** math.floor(math.log2(heads))
    slopes = [2.0 ** (-8.0 * (i + 1) / whole) for i in range(whole)]
    between = [2.0 ** (-4.0 * (i + 1) / whole) for i in range(0, 2 * (heads - whole), 2)]
    return torch.tensor(slopes + between)

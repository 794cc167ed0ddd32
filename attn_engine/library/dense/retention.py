"""The parallel form of retention (RetNet, arXiv:2307.08621, section 2.2)."""

from __future__ import annotations

from typing import Any

import torch

from attn_engine.frontend import OnlineFunc, ScoreMod
from attn_engine.library.arguments import at_least


class OnlineRetention(OnlineFunc):
    """s over its absolute row sum, or over 1 where that is smaller.

    Saves abs_sum. The decay of retention is a score_mod.
    """

    def __init__(self) -> None:
        super().__init__({"row_abs_sum": 0.0}, {"abs_sum": 0.0})

    @staticmethod
    def online_fwd(scores: Any, online_rowscales: Any, b: Any, h: Any, q_idx: Any) -> Any:
        new_sum = online_rowscales["row_abs_sum"] + scores.get_reduce("abssum")
        return scores, {"row_abs_sum": new_sum}, 1.0

    @staticmethod
    def online_fwd_epilogue(o: Any, online_rowscales: Any, b: Any, h: Any, q_idx: Any) -> Any:
        total = online_rowscales["row_abs_sum"]
        return o / total.clamp(min=1), {"abs_sum": total}

    @staticmethod
    def forward(scores: Any, final_rowscales: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return scores / final_rowscales["abs_sum"].clamp(min=1)

    @staticmethod
    def backward(
        dp: Any, scores: Any, final_rowscales: Any, doosum: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any
    ) -> Any:
        total = final_rowscales["abs_sum"]
        through_sum = torch.where(total > 1, doosum * torch.sign(scores), 0.0)
        return (dp - through_sum) / total.clamp(min=1)


def retention_decay(decay: torch.Tensor) -> ScoreMod:
    """Scores times decay[h] to the power of the distance. decay: (heads,), between 0 and 1."""

    def decayed_score(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        distance = q_idx - kv_idx
        return score * torch.exp(torch.log(decay[h]) * distance)

    return decayed_score


def retention_decays(heads: int) -> torch.Tensor:
    """The paper's decays, (heads,): 1 - 2^-5, 1 - 2^-6, ...

    >>> retention_decays(2)
    tensor([0.9688, 0.9844])
    """
    at_least("heads", heads, 1)
    return 1 - 2.0 ** (-5 - torch.arange(heads, dtype=torch.float32))

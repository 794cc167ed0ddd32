"""Softmax in one pass (Milakov and Gimelshein, arXiv:1805.02867)."""

from __future__ import annotations

from typing import Any

import torch

from attn_engine.frontend import OnlineFunc


class OnlineSoftmax(OnlineFunc):
    """exp(s) over its row sum, the maximum subtracted.

    Row values: lse, the logarithm of the sum of exp(s); row_max; inverse_sum, one over the sum of exp(s - row_max),
    0 in a row without keys. The backward pass reads the last two: where scores are large, their sum, lse, has lost
    the digits that tell the weights apart.
    """

    def __init__(self) -> None:
        final = {"lse": 0.0, "row_max": 0.0, "inverse_sum": 0.0}
        super().__init__({"row_max": float("-inf"), "row_sum": 0.0}, final)

    @staticmethod
    def online_fwd(scores: Any, online_rowscales: Any, b: Any, h: Any, q_idx: Any) -> Any:
        old_max = online_rowscales["row_max"]
        new_max = old_max.max(scores.get_reduce("max"))
        rescale = torch.exp(old_max - new_max)
        weights = (scores - new_max).exp()
        new_sum = online_rowscales["row_sum"] * rescale + weights.get_reduce("sum")
        return weights, {"row_max": new_max, "row_sum": new_sum}, rescale

    @staticmethod
    def online_fwd_epilogue(o: Any, online_rowscales: Any, b: Any, h: Any, q_idx: Any) -> Any:
        row_max, total = online_rowscales["row_max"], online_rowscales["row_sum"]
        inverse_sum = torch.where(total > 0, 1.0 / total, 0.0)
        lse = row_max + torch.log(total)
        return o * inverse_sum, {"lse": lse, "row_max": row_max, "inverse_sum": inverse_sum}

    @staticmethod
    def forward(scores: Any, final_rowscales: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        # The minimum only matters where a fused multiply-add recomputed a huge score with a bit more than row_max has.
        below_max = (scores - final_rowscales["row_max"]).min(0.0)
        return torch.exp(below_max) * final_rowscales["inverse_sum"]

    @staticmethod
    def backward(
        dp: Any, scores: Any, final_rowscales: Any, doosum: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any
    ) -> Any:
        return scores * (dp - doosum)

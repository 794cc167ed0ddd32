"""Normalisers as users write them, for tests of what the compiler derives."""

from __future__ import annotations

from typing import Any

import torch

from attn_engine.frontend import OnlineFunc


class SoftmaxWithMinimum(OnlineFunc):
    """Softmax that also reports the smallest score of a row."""

    def __init__(self) -> None:
        states = {"row_max": float("-inf"), "row_min": float("inf"), "row_sum": 0.0}
        super().__init__(states, {"lse": 0.0, "smallest": 0.0})

    @staticmethod
    def online_fwd(scores: Any, online_rowscales: Any, b: Any, h: Any, q_idx: Any) -> Any:
        old_max = online_rowscales["row_max"]
        new_max = old_max.max(scores.get_reduce("max"))
        rescale = torch.exp(old_max - new_max)
        weights = (scores - new_max).exp()
        states = {
            "row_max": new_max,
            "row_min": online_rowscales["row_min"].min(scores.get_reduce("min")),
            "row_sum": online_rowscales["row_sum"] * rescale + weights.get_reduce("sum"),
        }
        return weights, states, rescale

    @staticmethod
    def online_fwd_epilogue(o: Any, online_rowscales: Any, b: Any, h: Any, q_idx: Any) -> Any:
        total = online_rowscales["row_sum"]
        lse = online_rowscales["row_max"] + torch.log(total)
        return o / total, {"lse": lse, "smallest": online_rowscales["row_min"]}

    @staticmethod
    def forward(scores: Any, final_rowscales: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return torch.exp(scores - final_rowscales["lse"])

    @staticmethod
    def backward(
        dp: Any, scores: Any, final_rowscales: Any, doosum: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any
    ) -> Any:
        return scores * (dp - doosum)


class EuclideanNorm(OnlineFunc):
    """Scores over their Euclidean norm."""

    def __init__(self) -> None:
        super().__init__({"squares": 0.0}, {"norm": 0.0})

    @staticmethod
    def online_fwd(scores: Any, online_rowscales: Any, b: Any, h: Any, q_idx: Any) -> Any:
        total = online_rowscales["squares"] + (scores * scores).get_reduce("sum")
        return scores, {"squares": total}, 1.0

    @staticmethod
    def online_fwd_epilogue(o: Any, online_rowscales: Any, b: Any, h: Any, q_idx: Any) -> Any:
        norm = torch.sqrt(online_rowscales["squares"])
        return o / norm, {"norm": norm}


class RunningNorm(OnlineFunc):
    """The same, with the output kept normalised all the time: its factor reads the new sum."""

    def __init__(self) -> None:
        super().__init__({"squares": 0.0}, {"norm": 0.0})

    @staticmethod
    def online_fwd(scores: Any, online_rowscales: Any, b: Any, h: Any, q_idx: Any) -> Any:
        old = online_rowscales["squares"]
        total = old + (scores * scores).get_reduce("sum")
        old_norm, norm = (torch.sqrt(x).clamp(min=1e-15) for x in (old, total))
        return scores / norm, {"squares": total}, old_norm / norm

    @staticmethod
    def online_fwd_epilogue(o: Any, online_rowscales: Any, b: Any, h: Any, q_idx: Any) -> Any:
        return o, {"norm": torch.sqrt(online_rowscales["squares"]).clamp(min=1e-15)}

    @staticmethod
    def forward(scores: Any, final_rowscales: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return scores / final_rowscales["norm"]

    @staticmethod
    def backward(
        dp: Any, scores: Any, final_rowscales: Any, doosum: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any
    ) -> Any:
        return (dp - doosum * scores) / final_rowscales["norm"]


class LogLinear(OnlineFunc):
    """1 + s + s^2 / 2 over its row sum."""

    def __init__(self) -> None:
        super().__init__({"total": 0.0}, {"total": 0.0})

    @staticmethod
    def online_fwd(scores: Any, online_rowscales: Any, b: Any, h: Any, q_idx: Any) -> Any:
        weights = 1.0 + scores + scores * scores * 0.5
        return weights, {"total": online_rowscales["total"] + weights.get_reduce("sum")}, 1.0

    @staticmethod
    def online_fwd_epilogue(o: Any, online_rowscales: Any, b: Any, h: Any, q_idx: Any) -> Any:
        total = online_rowscales["total"]
        return o / total, {"total": total}


class LogSum(OnlineFunc):
    """Softmax whose one row state is the logarithm of the sum: right tile by tile, but no maximum and no sum."""

    def __init__(self) -> None:
        super().__init__({"log_sum": float("-inf")}, {"lse": 0.0})

    @staticmethod
    def online_fwd(scores: Any, online_rowscales: Any, b: Any, h: Any, q_idx: Any) -> Any:
        old = online_rowscales["log_sum"]
        new = torch.log(torch.exp(old) + scores.exp().get_reduce("sum"))
        return (scores - new).exp(), {"log_sum": new}, torch.exp(old - new)

    @staticmethod
    def online_fwd_epilogue(o: Any, online_rowscales: Any, b: Any, h: Any, q_idx: Any) -> Any:
        return o, {"lse": online_rowscales["log_sum"]}

    @staticmethod
    def forward(scores: Any, final_rowscales: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return torch.exp(scores - final_rowscales["lse"])

    @staticmethod
    def backward(
        dp: Any, scores: Any, final_rowscales: Any, doosum: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any
    ) -> Any:
        return scores * (dp - doosum)


class HeadScaled(OnlineFunc):
    """Weights that the normaliser itself divides by the number of the head: it asks for the head."""

    @staticmethod
    def online_fwd(scores: Any, online_rowscales: Any, b: Any, h: Any, q_idx: Any) -> Any:
        return scores / (h + 1), {}, 1.0

    @staticmethod
    def online_fwd_epilogue(o: Any, online_rowscales: Any, b: Any, h: Any, q_idx: Any) -> Any:
        return o, {}

    @staticmethod
    def forward(scores: Any, final_rowscales: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return scores / (h + 1)

    @staticmethod
    def backward(
        dp: Any, scores: Any, final_rowscales: Any, doosum: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any
    ) -> Any:
        return dp / (h + 1)


class Softmin(OnlineFunc):
    """exp(-s) over its row sum, the minimum added: softmax of the negated scores, with a minimum as its state."""

    def __init__(self) -> None:
        super().__init__({"row_min": float("inf"), "row_sum": 0.0}, {"row_min": 0.0, "inverse_sum": 0.0})

    @staticmethod
    def online_fwd(scores: Any, online_rowscales: Any, b: Any, h: Any, q_idx: Any) -> Any:
        old_min = online_rowscales["row_min"]
        new_min = old_min.min(scores.get_reduce("min"))
        rescale = torch.exp(new_min - old_min)
        weights = torch.exp(new_min - scores)
        new_sum = online_rowscales["row_sum"] * rescale + weights.get_reduce("sum")
        return weights, {"row_min": new_min, "row_sum": new_sum}, rescale

    @staticmethod
    def online_fwd_epilogue(o: Any, online_rowscales: Any, b: Any, h: Any, q_idx: Any) -> Any:
        total = online_rowscales["row_sum"]
        inverse_sum = torch.where(total > 0, 1.0 / total, 0.0)
        return o * inverse_sum, {"row_min": online_rowscales["row_min"], "inverse_sum": inverse_sum}

    @staticmethod
    def forward(scores: Any, final_rowscales: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return torch.exp(final_rowscales["row_min"] - scores) * final_rowscales["inverse_sum"]

    @staticmethod
    def backward(
        dp: Any, scores: Any, final_rowscales: Any, doosum: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any
    ) -> Any:
        return scores * (doosum - dp)

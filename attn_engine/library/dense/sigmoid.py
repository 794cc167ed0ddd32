"""Sigmoid attention (Ramapuram et al., arXiv:2409.04431)."""

from __future__ import annotations

from typing import Any

import torch

from attn_engine.frontend import OnlineFunc


class OnlineSigmoid(OnlineFunc):
    """sigmoid(s), each key by itself."""

    @staticmethod
    def online_fwd(scores: Any, online_rowscales: Any, b: Any, h: Any, q_idx: Any) -> Any:
        return torch.sigmoid(scores), {}, 1.0

    @staticmethod
    def online_fwd_epilogue(o: Any, online_rowscales: Any, b: Any, h: Any, q_idx: Any) -> Any:
        return o, {}

    @staticmethod
    def forward(scores: Any, final_rowscales: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return torch.sigmoid(scores)

    @staticmethod
    def backward(
        dp: Any, scores: Any, final_rowscales: Any, doosum: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any
    ) -> Any:
        return dp * scores * (1 - scores)

"""ReLU attention (Wortsman et al., arXiv:2309.08586)."""

from __future__ import annotations

from typing import Any

import torch

from attn_engine.frontend import OnlineFunc


class OnlineRelu(OnlineFunc):
    """max(s, 0), each key by itself."""

    @staticmethod
    def online_fwd(scores: Any, online_rowscales: Any, b: Any, h: Any, q_idx: Any) -> Any:
        return torch.relu(scores), {}, 1.0

    @staticmethod
    def online_fwd_epilogue(o: Any, online_rowscales: Any, b: Any, h: Any, q_idx: Any) -> Any:
        return o, {}

    @staticmethod
    def forward(scores: Any, final_rowscales: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return torch.relu(scores)

    @staticmethod
    def backward(
        dp: Any, scores: Any, final_rowscales: Any, doosum: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any
    ) -> Any:
        return torch.where(scores > 0, dp, 0.0)

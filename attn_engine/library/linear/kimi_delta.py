"""Kimi Delta Attention (arXiv:2510.26692, section 3): Gated DeltaNet with a decay of each dimension of k."""

from __future__ import annotations

from typing import Any

from attn_engine.library.linear.delta_net import delta_net


def kimi_delta(dim: int) -> dict[str, Any]:
    """The call's decay is the log decay of each token, head and dimension, at most 0; beta goes through a sigmoid."""
    return {**delta_net(dim), "decay_rank": "vector"}

"""Scores squashed by tanh (Gemma 2, arXiv:2408.00118, section 2)."""

from __future__ import annotations

from typing import Any

import torch

from attn_engine.frontend import ScoreMod


def soft_cap(cap: float = 30.0) -> ScoreMod:
    """Scores squashed into (-cap, cap)."""

    def soft_cap_score(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return cap * torch.tanh(score / cap)

    return soft_cap_score

"""Causal attention (Vaswani et al., arXiv:1706.03762, section 3.2.3)."""

from __future__ import annotations

from typing import Any

from attn_engine.frontend import MaskMod


def causal(offset: int = 0) -> MaskMod:
    """Each query sees the keys up to its own position plus `offset`.

    With fewer queries than keys, offset = len(keys) - len(queries) aligns the two ends.
    """
    if offset == 0:

        def causal_mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
            return kv_idx <= q_idx

        return causal_mask

    def shifted_causal_mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return kv_idx <= q_idx + offset

    return shifted_causal_mask

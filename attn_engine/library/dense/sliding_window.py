"""Causal sliding window (Mistral 7B, arXiv:2310.06825, section 2)."""

from __future__ import annotations

from typing import Any

from attn_engine.frontend import MaskMod
from attn_engine.library.arguments import at_least


def sliding_window(window: int = 512) -> MaskMod:
    """Each query sees itself and the `window` keys before it."""
    at_least("window", window, 0)

    def sliding_window_mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        in_past = kv_idx <= q_idx
        in_window = q_idx - kv_idx <= window
        return in_past & in_window

    return sliding_window_mask

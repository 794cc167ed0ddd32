"""Windows with holes and windows with global tokens (Longformer, arXiv:2004.05150, section 3.1)."""

from __future__ import annotations

from typing import Any

from attn_engine.frontend import MaskMod
from attn_engine.library.arguments import at_least


def dilated_window(window: int = 64, dilation: int = 2) -> MaskMod:
    """Each query sees itself and `window` keys before it, every `dilation`-th one."""
    at_least("window", window, 0)
    at_least("dilation", dilation, 1)

    def dilated_window_mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        distance = q_idx - kv_idx
        in_window = (distance >= 0) & (distance <= window * dilation)
        return in_window & (distance % dilation == 0)

    return dilated_window_mask


def global_window(window: int = 256, global_tokens: int = 1) -> MaskMod:
    """Keys up to `window` away on either side; the first `global_tokens` see all and are seen by all."""
    at_least("window", window, 0)
    at_least("global_tokens", global_tokens, 0)

    def global_window_mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        near = (q_idx - kv_idx <= window) & (kv_idx - q_idx <= window)
        return near | (q_idx < global_tokens) | (kv_idx < global_tokens)

    return global_window_mask

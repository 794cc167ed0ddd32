"""A window and the first tokens, which soak up spare weight (StreamingLLM, arXiv:2309.17453, section 3)."""

from __future__ import annotations

from typing import Any

from attn_engine.frontend import MaskMod
from attn_engine.library.arguments import at_least


def streaming(window: int = 1020, sinks: int = 4) -> MaskMod:
    """Each query sees itself, the `window` keys before it and the first `sinks` keys, never the future."""
    at_least("window", window, 0)
    at_least("sinks", sinks, 0)

    def streaming_mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        in_past = kv_idx <= q_idx
        return in_past & ((q_idx - kv_idx <= window) | (kv_idx < sinks))

    return streaming_mask

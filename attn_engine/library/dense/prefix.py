"""Prefix language models (T5, arXiv:1910.10683, section 3.2.1)."""

from __future__ import annotations

from typing import Any

from attn_engine.frontend import MaskMod
from attn_engine.library.arguments import at_least


def prefix(length: int = 128) -> MaskMod:
    """The first `length` keys are seen by all, the others causally."""
    at_least("length", length, 0)

    def prefix_mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return (kv_idx < length) | (kv_idx <= q_idx)

    return prefix_mask

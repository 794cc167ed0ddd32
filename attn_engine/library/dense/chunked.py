"""Causal attention within chunks (Llama 4's local layers; Transformer-XL's segments, arXiv:1901.02860, section 3.1)."""

from __future__ import annotations

from typing import Any

from attn_engine.frontend import MaskMod
from attn_engine.library.arguments import at_least


def chunked(chunk: int = 8192) -> MaskMod:
    """The past within the query's own chunk of `chunk` positions."""
    at_least("chunk", chunk, 1)

    def chunked_mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        same_chunk = q_idx // chunk == kv_idx // chunk
        return same_chunk & (kv_idx <= q_idx)

    return chunked_mask

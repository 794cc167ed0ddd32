"""Training block diffusion language models (BD3-LM, arXiv:2503.09573, section 3.2 and its figure of the mask)."""

from __future__ import annotations

from typing import Any

from attn_engine.frontend import MaskMod
from attn_engine.library.arguments import at_least


def block_diffusion(length: int = 1024, block: int = 16) -> MaskMod:
    """The mask over a noisy sequence of `length` tokens followed by the same sequence clean, in blocks of `block`.

    Noisy tokens see their own noisy block and the clean blocks before it; clean tokens the clean blocks up to theirs.
    """
    at_least("length", length, 1)
    at_least("block", block, 1)

    def block_diffusion_mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        query_is_clean, key_is_clean = q_idx >= length, kv_idx >= length
        query_block, key_block = q_idx % length // block, kv_idx % length // block
        own_block = (query_is_clean == key_is_clean) & (query_block == key_block)
        noisy_sees_clean = ~query_is_clean & key_is_clean & (key_block < query_block)
        clean_sees_clean = query_is_clean & key_is_clean & (key_block <= query_block)
        return own_block | noisy_sees_clean | clean_sees_clean

    return block_diffusion_mask

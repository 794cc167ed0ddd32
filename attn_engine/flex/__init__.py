"""FlexAttention's interface on this compiler: change one import."""

from attn_engine.flex.attention import flex_attention
from attn_engine.flex.auxiliary import AuxOutput, AuxRequest
from attn_engine.flex.noop import noop_mask
from attn_engine.library import and_masks, or_masks
from attn_engine.masks import BlockMask, create_block_mask

__all__ = [
    "AuxOutput",
    "AuxRequest",
    "BlockMask",
    "and_masks",
    "create_block_mask",
    "flex_attention",
    "noop_mask",
    "or_masks",
]

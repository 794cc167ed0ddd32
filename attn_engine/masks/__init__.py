"""Masks ahead of a call: which blocks a mask meets, for kernels, for torch's BlockMask and for the eye."""

from attn_engine.masks.block_mask import BlockMask
from attn_engine.masks.create import create_block_mask
from attn_engine.masks.lists import BlockLists, Csr, Side

__all__ = ["BlockLists", "BlockMask", "Csr", "Side", "create_block_mask"]

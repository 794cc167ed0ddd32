"""The mistakes about block masks; the others are in `attn_engine.errors`."""

from __future__ import annotations

from attn_engine.errors import AttnEngineError


class WrongBlockMask(AttnEngineError, ValueError):
    template = "{argument}={got!r} is not {expected}."
    advice = "{instead}"


class MaskOnOtherDevice(AttnEngineError, ValueError):
    template = "The mask reads {name!r} on {got}, but the block mask is made on {expected}."
    advice = 'Move it once, outside the function: {name} = {name}.to("{expected}"), or give device="{got}".'


class BlockMaskMismatch(AttnEngineError, ValueError):
    template = "The block mask was made for {what} {got}, but this call has {expected}."
    advice = "Make one for these sizes: create_block_mask(mask_mod, B, H, Q_LEN, KV_LEN)."


class NotABlockMask(AttnEngineError, TypeError):
    template = "{argument} is {got}, not a block mask: it has no {missing}."
    advice = "Make one with attn_engine.create_block_mask, or give one of torch.nn.attention.flex_attention."


class CannotDraw(AttnEngineError, RuntimeError):
    template = "A picture of kind {kind!r} needs {needs}, which is missing here."
    advice = "{instead}"

"""Attentions written as a user would write them: masks, score functions, normalisers."""

from attn_engine.library.masks import and_masks, causal, document, not_mask, or_masks, prefix, sliding_window
from attn_engine.library.normalisers import OnlineRelu, OnlineRetention, OnlineSigmoid, OnlineSoftmax
from attn_engine.library.scores import alibi, pair_bias, relative_bias, soft_cap

__all__ = [
    "OnlineRelu",
    "OnlineRetention",
    "OnlineSigmoid",
    "OnlineSoftmax",
    "alibi",
    "and_masks",
    "causal",
    "document",
    "not_mask",
    "or_masks",
    "pair_bias",
    "prefix",
    "relative_bias",
    "sliding_window",
    "soft_cap",
]

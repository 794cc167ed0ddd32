"""Attentions written as a user would write them, each named after its paper."""

from attn_engine.library.attention_library import AttentionLibrary
from attn_engine.library.combinations import and_masks, not_mask, or_masks
from attn_engine.library.dense.alibi import alibi, alibi_slopes
from attn_engine.library.dense.block_diffusion import block_diffusion
from attn_engine.library.dense.causal import causal
from attn_engine.library.dense.chunked import chunked
from attn_engine.library.dense.document import document
from attn_engine.library.dense.full import full
from attn_engine.library.dense.longformer import dilated_window, global_window
from attn_engine.library.dense.neighbourhood import neighbourhood
from attn_engine.library.dense.pair_bias import pair_bias
from attn_engine.library.dense.prefix import prefix
from attn_engine.library.dense.relative_bias import relative_bias, t5_bias
from attn_engine.library.dense.relu import OnlineRelu
from attn_engine.library.dense.retention import OnlineRetention, retention_decay, retention_decays
from attn_engine.library.dense.shared_prefix import shared_prefix
from attn_engine.library.dense.sigmoid import OnlineSigmoid
from attn_engine.library.dense.sinks import sink_softmax, softmax_plus_one
from attn_engine.library.dense.sliding_tile import sliding_tile
from attn_engine.library.dense.sliding_window import sliding_window
from attn_engine.library.dense.soft_cap import soft_cap
from attn_engine.library.dense.softmax import OnlineSoftmax
from attn_engine.library.dense.streaming import streaming
from attn_engine.library.dense.tree import tree
from attn_engine.library.dense.vision_cross import vision_cross
from attn_engine.library.differential import differential
from attn_engine.library.serving.append import append_to_cache, write_to_slots
from attn_engine.library.sparse.dynamic import (
    compact,
    dynamic_sparse_attention,
    hash_sparse_attention,
    hash_sparse_attention_kernel,
    pad_index,
    qk_sparse_attention,
    qk_sparse_attention_kernel,
    sort_bucketed_attention,
)
from attn_engine.library.sparse.patterns import (
    LocalStrideSparseAttention,
    SparseAttention,
    combine_attn_partitions,
)

__all__ = [
    "AttentionLibrary", "LocalStrideSparseAttention", "OnlineRelu", "OnlineRetention", "OnlineSigmoid",
    "OnlineSoftmax", "SparseAttention", "alibi", "alibi_slopes", "and_masks", "append_to_cache", "block_diffusion",
    "causal", "chunked", "combine_attn_partitions", "compact", "differential", "dilated_window", "document",
    "dynamic_sparse_attention", "full", "global_window", "hash_sparse_attention", "hash_sparse_attention_kernel",
    "neighbourhood", "not_mask", "or_masks", "pad_index", "pair_bias", "prefix", "qk_sparse_attention",
    "qk_sparse_attention_kernel", "relative_bias", "retention_decay", "retention_decays", "shared_prefix",
    "sink_softmax", "sliding_tile", "sliding_window", "soft_cap", "softmax_plus_one", "sort_bucketed_attention",
    "streaming", "t5_bias", "tree", "vision_cross", "write_to_slots",
]  # fmt: skip

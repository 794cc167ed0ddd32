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
from attn_engine.library.nsa.attention import native_sparse_attention
from attn_engine.library.nsa.cache import NSACache
from attn_engine.library.nsa.compression import (
    LinearCompression,
    PerceptronCompression,
    WeightedPooling,
    mean_pooling,
)
from attn_engine.library.nsa.fla import parallel_nsa, parallel_nsa_compression, parallel_nsa_topk
from attn_engine.library.nsa.module import NativeSparseAttention
from attn_engine.library.nsa.packed import (
    avgpool_compress,
    compressed_attention,
    compressed_attention_decode,
    linear_compress,
    topk_sparse_attention,
    topk_sparse_attention_decode,
    weightedpool_compress,
)
from attn_engine.library.nsa.rotary import Rotary
from attn_engine.library.serving.append import append_to_cache, write_to_slots
from attn_engine.library.serving.masks import causal_with_offset
from attn_engine.library.serving.mla import flash_mla_with_kvcache, get_mla_metadata
from attn_engine.library.serving.mla_caches import latent_bytes, pack_latent_bytes, unpack_latent_bytes
from attn_engine.library.serving.prologs import indexer_prolog, mla_prolog
from attn_engine.library.serving.quantisation import dequantise, hadamard, to_fp8, to_int8
from attn_engine.library.serving.sparse_attention_pto import npu_sparse_attention_pto, sparse_attention_pto
from attn_engine.library.serving.weights import from_nz, to_nz
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
from attn_engine.library.sparse.indexer import indexer_scores, lightning_indexer, mqa_logits
from attn_engine.library.sparse.patterns import (
    LocalStrideSparseAttention,
    SparseAttention,
    combine_attn_partitions,
)
from attn_engine.library.sparse.seer import (
    block_1d_gqa_sparse_attn_varlen_func,
    block_1d_gqa_sparse_attn_varlen_sim_func,
    block_2d_sparse_attn_varlen_func,
)
from attn_engine.library.sparse.seer_decode import (
    block_sparse_flash_decode_gqa_indice,
    block_sparse_flash_decode_gqa_mask,
)
from attn_engine.library.sparse.seer_masks import (
    get_sparse_attn_mask_from_nz_ratio,
    get_sparse_attn_mask_from_threshold,
    get_sparse_attn_mask_from_threshold_grouped,
    get_sparse_attn_mask_from_token_budget,
    repeat_kv,
    repeat_kv_varlen,
)
from attn_engine.library.sparse.seer_pooling import (
    attn_pooling,
    attn_pooling_2d,
    attn_pooling_qk_varlen,
    attn_pooling_qkv_varlen,
    attn_with_pooling,
)
from attn_engine.library.tokens.flash_mla_sparse import flash_mla_sparse_fwd
from attn_engine.library.tokens.indexer_loss import indexer_loss
from attn_engine.library.tokens.sparse_attention import sparse_attention
from attn_engine.library.tokens.sparse_flash import sparse_flash_attention

__all__ = [
    "AttentionLibrary", "LinearCompression", "LocalStrideSparseAttention", "NSACache",
    "NativeSparseAttention", "OnlineRelu", "OnlineRetention", "OnlineSigmoid", "OnlineSoftmax",
    "PerceptronCompression", "Rotary", "SparseAttention", "WeightedPooling", "alibi", "alibi_slopes",
    "and_masks", "append_to_cache", "attn_pooling", "attn_pooling_2d", "attn_pooling_qk_varlen",
    "attn_pooling_qkv_varlen", "attn_with_pooling", "avgpool_compress",
    "block_1d_gqa_sparse_attn_varlen_func", "block_1d_gqa_sparse_attn_varlen_sim_func",
    "block_2d_sparse_attn_varlen_func", "block_diffusion", "block_sparse_flash_decode_gqa_indice",
    "block_sparse_flash_decode_gqa_mask", "causal", "causal_with_offset", "chunked",
    "combine_attn_partitions", "compact", "compressed_attention", "compressed_attention_decode",
    "dequantise", "differential", "dilated_window", "document", "dynamic_sparse_attention",
    "flash_mla_sparse_fwd", "flash_mla_with_kvcache", "from_nz", "full", "get_mla_metadata",
    "get_sparse_attn_mask_from_nz_ratio", "get_sparse_attn_mask_from_threshold",
    "get_sparse_attn_mask_from_threshold_grouped", "get_sparse_attn_mask_from_token_budget",
    "global_window", "hadamard", "hash_sparse_attention", "hash_sparse_attention_kernel",
    "indexer_loss", "indexer_prolog", "indexer_scores", "latent_bytes", "lightning_indexer",
    "linear_compress", "mean_pooling", "mla_prolog", "mqa_logits", "native_sparse_attention",
    "neighbourhood", "not_mask", "npu_sparse_attention_pto", "or_masks", "pack_latent_bytes",
    "pad_index", "pair_bias", "parallel_nsa", "parallel_nsa_compression", "parallel_nsa_topk", "prefix",
    "qk_sparse_attention", "qk_sparse_attention_kernel", "relative_bias", "repeat_kv",
    "repeat_kv_varlen", "retention_decay", "retention_decays", "shared_prefix", "sink_softmax",
    "sliding_tile", "sliding_window", "soft_cap", "softmax_plus_one", "sort_bucketed_attention",
    "sparse_attention", "sparse_attention_pto", "sparse_flash_attention", "streaming", "t5_bias",
    "to_fp8", "to_int8", "to_nz", "topk_sparse_attention", "topk_sparse_attention_decode", "tree",
    "unpack_latent_bytes", "vision_cross", "weightedpool_compress", "write_to_slots",
]  # fmt: skip

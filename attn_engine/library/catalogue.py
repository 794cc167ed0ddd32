"""The library's attentions and masks by name, with their papers and parameters."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from attn_engine.frontend import MaskMod
from attn_engine.library.combinations import and_masks
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
from attn_engine.library.nsa.fla import parallel_nsa
from attn_engine.library.nsa.module import NativeSparseAttention
from attn_engine.library.nsa.packed import (
    compressed_attention,
    compressed_attention_decode,
    topk_sparse_attention,
    topk_sparse_attention_decode,
)
from attn_engine.library.serving.mla import flash_mla_with_kvcache
from attn_engine.library.serving.prologs import indexer_prolog, mla_prolog
from attn_engine.library.serving.sparse_attention_pto import sparse_attention_pto
from attn_engine.library.sparse.dynamic import (
    dynamic_sparse_attention,
    hash_sparse_attention,
    qk_sparse_attention,
)
from attn_engine.library.sparse.patterns import LocalStrideSparseAttention, SparseAttention
from attn_engine.library.sparse.seer import (
    block_1d_gqa_sparse_attn_varlen_func,
    block_2d_sparse_attn_varlen_func,
)
from attn_engine.library.sparse.seer_decode import (
    block_sparse_flash_decode_gqa_indice,
    block_sparse_flash_decode_gqa_mask,
)
from attn_engine.library.sparse.seer_pooling import attn_pooling
from attn_engine.library.tokens.flash_mla_sparse import flash_mla_sparse_fwd
from attn_engine.library.tokens.indexer_loss import indexer_loss
from attn_engine.library.tokens.sparse_attention import sparse_attention
from attn_engine.library.tokens.sparse_flash import sparse_flash_attention

USE_TYPES = ("Train", "Prefill", "Decode")
Arguments = dict[str, Any]  # of an AttentionEngine


@dataclass(frozen=True)
class Entry:
    """An attention or a mask of the library, or a function that is called itself.

    make: of an attention, the engine's keyword arguments, and "scaled" where q k^T is scaled by 1/sqrt(D) before its
    score_mod; of a mask, the mask_mod; of a function, itself. source: where its mathematics is. compose: how calls use
    the engine, where they do more than one (engine, q, k, v, ...). use_types: what it is for.
    """

    name: str
    make: Callable[..., Any]
    source: Any
    compose: Callable[..., torch.Tensor] | None = None
    use_types: tuple[str, ...] = USE_TYPES

    @property
    def summary(self) -> str:
        """What it does."""
        return _first_paragraph(inspect.getdoc(self.source))

    @property
    def paper(self) -> str:
        """Where it is from."""
        return _first_paragraph(sys.modules[self.source.__module__].__doc__)

    @property
    def parameters(self) -> Mapping[str, inspect.Parameter]:
        return {} if self.make is dict else inspect.signature(self.make).parameters

    def __str__(self) -> str:
        parameters = ", ".join(_shown(p) for p in self.parameters.values())
        return f"{self.name}({parameters})"


def _first_paragraph(text: str | None) -> str:
    return " ".join((text or "").split("\n\n")[0].split())


def _shown(parameter: inspect.Parameter) -> str:
    return (
        parameter.name if parameter.default is parameter.empty else f"{parameter.name}={parameter.default!r}"
    )


def _alibi(heads: int = 8, slopes: torch.Tensor | None = None) -> Arguments:
    return {"score_mod": alibi(alibi_slopes(heads) if slopes is None else slopes), "scaled": True}


def _soft_cap(cap: float = 30.0) -> Arguments:
    return {"score_mod": soft_cap(cap), "scaled": True}


def _t5(bias: torch.Tensor, max_distance: int = 128, bidirectional: bool = False) -> Arguments:
    return {"score_mod": t5_bias(bias, max_distance, bidirectional)}  # T5 does not scale


def _relative(bias: torch.Tensor) -> Arguments:
    return {"score_mod": relative_bias(bias), "scaled": True}


def _pair(bias: torch.Tensor) -> Arguments:
    return {"score_mod": pair_bias(bias), "scaled": True}


def _sink(sink: torch.Tensor) -> Arguments:
    return {"online_func": sink_softmax(sink)}


def _plus_one() -> Arguments:
    return {"online_func": softmax_plus_one}


def _sigmoid(bias: float = 0.0) -> Arguments:
    def biased(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return score + bias

    return {"online_func": OnlineSigmoid(), **({"score_mod": biased, "scaled": True} if bias else {})}


def _relu(length: int = 1) -> Arguments:
    def shared(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return score / length

    return {"online_func": OnlineRelu(), **({"score_mod": shared, "scaled": True} if length != 1 else {})}


def _retention(heads: int = 8, decay: torch.Tensor | None = None) -> Arguments:
    score = retention_decay(retention_decays(heads) if decay is None else decay)
    return {"online_func": OnlineRetention(), "score_mod": score, "scaled": True}


def _document(document_ids: torch.Tensor, past: bool = True) -> MaskMod:
    own = document(document_ids)
    return and_masks(causal(), own) if past else own


def _called(source: Callable[..., Any], use_types: tuple[str, ...] = USE_TYPES) -> Entry:
    return Entry(source.__name__, source, source, use_types=use_types)


_ATTENTIONS = (
    Entry("SoftmaxAttention", dict, OnlineSoftmax),
    Entry("AlibiAttention", _alibi, alibi),
    Entry("SoftCapAttention", _soft_cap, soft_cap),
    Entry("T5Attention", _t5, t5_bias),
    Entry("RelativeBiasAttention", _relative, relative_bias),
    Entry("PairBiasAttention", _pair, pair_bias),
    Entry("SinkAttention", _sink, sink_softmax),
    Entry("SoftmaxPlusOneAttention", _plus_one, softmax_plus_one.function),
    Entry("SigmoidAttention", _sigmoid, OnlineSigmoid),
    Entry("ReluAttention", _relu, OnlineRelu),
    Entry("RetentionAttention", _retention, OnlineRetention),
    Entry("DifferentialAttention", dict, differential, differential),
)
_SEQUENCES = ("Train", "Prefill")
_MASKS = (
    Entry("Full", full, full),
    Entry("Causal", causal, causal),
    Entry("SlidingWindow", sliding_window, sliding_window),
    Entry("DilatedWindow", dilated_window, dilated_window),
    Entry("GlobalWindow", global_window, global_window, use_types=_SEQUENCES),
    Entry("Streaming", streaming, streaming),
    Entry("Prefix", prefix, prefix),
    Entry("Document", _document, document, use_types=_SEQUENCES),
    Entry("SharedPrefix", shared_prefix, shared_prefix, use_types=_SEQUENCES),
    Entry("Chunked", chunked, chunked),
    Entry("Neighbourhood", neighbourhood, neighbourhood, use_types=("Train",)),
    Entry("SlidingTile", sliding_tile, sliding_tile, use_types=("Train",)),
    Entry("BlockDiffusion", block_diffusion, block_diffusion, use_types=("Train",)),
    Entry("VisionCross", vision_cross, vision_cross, use_types=("Train",)),
    Entry("Tree", tree, tree, use_types=("Train",)),
)
_DECODE, _SERVED = ("Decode",), ("Prefill", "Decode")
# Functions and modules that are called themselves, with the names and arguments of their papers' code.
_CALLED = (
    _called(dynamic_sparse_attention, _SEQUENCES),
    _called(qk_sparse_attention, _SEQUENCES),
    _called(hash_sparse_attention, _SEQUENCES),
    _called(SparseAttention),
    _called(LocalStrideSparseAttention),
    _called(block_1d_gqa_sparse_attn_varlen_func, _SEQUENCES),
    _called(block_2d_sparse_attn_varlen_func, _SEQUENCES),
    _called(attn_pooling, ("Train",)),
    _called(block_sparse_flash_decode_gqa_mask, _DECODE),
    _called(block_sparse_flash_decode_gqa_indice, _DECODE),
    _called(native_sparse_attention),
    _called(NativeSparseAttention),
    _called(parallel_nsa),
    _called(compressed_attention, _SEQUENCES),
    _called(topk_sparse_attention, _SEQUENCES),
    _called(compressed_attention_decode, _DECODE),
    _called(topk_sparse_attention_decode, _DECODE),
    _called(sparse_attention),
    _called(indexer_loss, ("Train",)),
    _called(flash_mla_sparse_fwd, ("Prefill",)),
    _called(sparse_flash_attention, ("Prefill", "Decode")),
    _called(flash_mla_with_kvcache, _SERVED),
    _called(mla_prolog),
    _called(indexer_prolog),
    _called(sparse_attention_pto, _SERVED),
)
ATTENTIONS: Mapping[str, Entry] = {e.name: e for e in _ATTENTIONS}
MASKS: Mapping[str, Entry] = {e.name: e for e in _MASKS}
CALLED: Mapping[str, Entry] = {e.name: e for e in _CALLED}


def plain_name(name: str) -> str:
    """Names are the same whatever their case and underscores are, with and without "Attention".

    >>> plain_name("sliding_window"), plain_name("SoftCapAttention")
    ('slidingwindow', 'softcap')
    """
    return re.sub(r"attention$", "", name.replace("_", "").replace("-", "").lower())


def found(entries: Mapping[str, Entry], name: str) -> Entry | None:
    """The entry of that name, None where there is none."""
    return next((e for e in entries.values() if plain_name(e.name) == plain_name(name)), None)

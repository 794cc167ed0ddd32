"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1) over a cache, with FlashMLA's signature.

Absorbed decoding: every head reads the same latent row of 512 numbers and 64 of its rotated key, and its value is the
latent row again: a prefix of the key. K and V are then one cache seen twice, nothing is copied.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from attn_engine.engine import AttentionEngine
from attn_engine.errors import ShapeMismatch, WrongArgument
from attn_engine.frontend import CustomIO, meta_tensor
from attn_engine.library.arguments import called, divisible, integers, one_each, scale_of
from attn_engine.library.serving.masks import causal_with_offset
from attn_engine.library.serving.mla_caches import latent_bytes, unpack_latent_bytes
from attn_engine.library.serving.quantisation import BLOCK
from attn_engine.library.tokens.arguments import alike, prefix, refuse_shape, shaped
from attn_engine.library.tokens.flash_mla_sparse import with_sink
from attn_engine.library.tokens.sparse_attention import engine_of, sparse_attention
from attn_engine.runtime.paged_checks import check_table
from attn_engine.runtime.token_attention import Keys
from attn_engine.runtime.token_checks import checked_lists
from attn_engine.token_calls import Bound, attend_over


def get_mla_metadata(*_: Any, **__: Any) -> tuple[None, None]:
    """(None, None): how work is shared is decided at each call. For callers of FlashMLA."""
    return None, None


def flash_mla_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    block_table: Tensor | None,
    cache_seqlens: Tensor | None,
    head_dim_v: int = 512,
    tile_scheduler_metadata: Any = None,
    num_splits: Any = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    is_fp8_kvcache: bool = False,
    indices: Tensor | None = None,
    attn_sink: Tensor | None = None,
    *,
    topk_length: Tensor | None = None,
    backend: str = "auto",
    **others: Any,
) -> tuple[Tensor, Tensor]:
    """out (b, s_q, h_q, head_dim_v) in q's type, and lse (b, h_q, s_q), float32, the natural logarithm.

    q: (b, s_q, h_q, d), any number of heads that h_kv divides. k_cache: (pages, rows of a page, h_kv, d), pages of any
    size; without a block_table, (b, capacity, h_kv, d). Values are the first head_dim_v columns of the keys.
    block_table: int32 (b, pages of one). cache_seqlens: int32 (b,). softmax_scale: None is d^-0.5. causal: aligned at
    the end, query i sees keys up to cache_seqlens[b] - s_q + i. A row without keys gives 0 and lse = -inf (FlashMLA
    says +inf).

    is_fp8_kvcache: rows of the cache are bytes, as `pack_latent_bytes` makes them (656 for d = 576 and head_dim_v =
    512); those that a call reads become numbers of q's type in a copy, with indices 32 MB at a time. indices: int (b,
    s_q, topk), the keys of each query as places in the cache, page * rows of a page + row; -1 or any other number
    outside counts for nothing, and topk_length, int (b,), says how many entries count. Then block_table and
    cache_seqlens are not read, and causal is for the indices to say. attn_sink: float (h_q,), a logit that takes its
    share of every row and gives nothing; it is not in lse.

    tile_scheduler_metadata and num_splits are not needed. Second caches are refused: WrongArgument.
    """
    for name, x in others.items():
        if x is not None:
            instead = "One cache is what this function is for."
            raise WrongArgument(argument=name, got=type(x).__name__, expected="left out", instead=instead)
    _check(q, k_cache, head_dim_v, is_fp8_kvcache)
    scale = scale_of("softmax_scale", softmax_scale, q.shape[-1])
    if indices is not None:
        out, lse = _over_slots(
            q, k_cache, indices, topk_length, head_dim_v, scale, is_fp8_kvcache, causal, backend
        )
        return with_sink(out, lse, attn_sink), lse
    if cache_seqlens is None or topk_length is not None:
        argument, got = ("cache_seqlens", None) if cache_seqlens is None else ("topk_length", "a Tensor")
        expected, instead = (
            "given where indices are not",
            "topk_length is about indices, cache_seqlens about all keys.",
        )
        expected = expected if cache_seqlens is None else "left out where indices are"
        raise WrongArgument(argument=argument, got=got, expected=expected, instead=instead)
    one_each("cache_seqlens", cache_seqlens, q.shape[0])
    if is_fp8_kvcache:
        k_cache, block_table = _converted(k_cache, block_table, cache_seqlens, q.dtype, head_dim_v)
    engine = _engine(q.dtype, q.shape[-1], head_dim_v, scale, causal, backend)
    offset = {"q_offset": cache_seqlens - q.shape[1]} if causal else {}
    pages = {} if block_table is None else {"block_table": block_table}
    with called(k="k_cache", len_kv="cache_seqlens"):
        out, rows = engine(
            q, k_cache, k_cache[..., :head_dim_v],
            len_kv=cache_seqlens, return_final_rowscales=True, **offset, **pages,
        )  # fmt: skip
    return with_sink(out, rows["lse"], attn_sink), rows["lse"]


def _check(q: Tensor, k_cache: Tensor, head_dim_v: int, is_fp8: bool) -> None:
    """What the errors of an engine's call would not know by these names."""
    shaped("q", q, "(batch, queries, heads, dim)")
    shaped("k_cache", k_cache, "(pages or batch, rows, kv heads, dim)")
    divisible(q.shape[2], k_cache.shape[2], keys="k_cache")
    prefix("head_dim_v", head_dim_v, q.shape[3])
    if is_fp8:
        return
    alike("q", q, k_cache=k_cache)
    if q.shape[3] != k_cache.shape[3]:
        refuse_shape("k_cache", k_cache, f"one with {q.shape[3]} columns, as q has")


def _over_slots(
    q: Tensor,
    k_cache: Tensor,
    indices: Tensor,
    topk_length: Tensor | None,
    head_dim_v: int,
    scale: float,
    is_fp8: bool,
    causal: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Attention over places in the cache."""
    if causal:
        instead = "Leave out what a query may not see."
        raise WrongArgument(argument="causal", got=True, expected="False beside indices", instead=instead)
    integers("indices", indices, (3,))
    if topk_length is not None:
        one_each("topk_length", topk_length, q.shape[0])
    counts = None if topk_length is None else topk_length[:, None].expand(indices.shape[:2])
    options: dict[str, Any] = {"dim_v": head_dim_v, "sm_scale": scale, "return_lse": True, "backend": backend}
    if not is_fp8:
        chosen = indices[:, :, None]
        return sparse_attention(q, k_cache, chosen, topk_length=counts, physical=True, **options)
    parts = latent_bytes(k_cache, head_dim_v)
    if parts.rope.shape[-1] + head_dim_v != q.shape[3]:
        expected = (
            f"{head_dim_v} + {head_dim_v // BLOCK * 4} + 2 * {q.shape[3] - head_dim_v} bytes of a token"
        )
        reason = f"q has {q.shape[3]} columns"
        raise ShapeMismatch(argument="k_cache", got=tuple(k_cache.shape), expected=expected, reason=reason)
    latent, scales, rope = (x.transpose(1, 2) for x in parts)
    queries = q.transpose(1, 2)
    lists = checked_lists("token_slots", indices, counts, queries, latent, called={"token_slots": "indices"})
    engine = engine_of(q.dtype, q.shape[3], head_dim_v, scale, backend)
    bound = Bound(engine.program, {}, {"scale": engine.scale})
    out, rows = attend_over(
        engine, bound, lists, queries, Keys((latent, rope), (), head_dim_v, (scales, None))
    )
    return out.transpose(1, 2), rows["lse"]


def _converted(
    k_cache: Tensor, block_table: Tensor | None, lengths: Tensor, dtype: torch.dtype, head_dim_v: int
) -> tuple[Tensor, Tensor | None]:
    """The pages of a float8 cache that are read, in q's type, and the table that finds them there."""
    if block_table is None:
        return unpack_latent_bytes(k_cache, dtype, head_dim_v), None
    integers("block_table", block_table, (2,))
    on_host = lengths.detach().to("cpu", torch.int64)
    check_table(block_table, on_host, k_cache.shape[1], k_cache.shape[0], "cache_seqlens")
    first = torch.arange(block_table.shape[1], device=lengths.device) * k_cache.shape[1]
    read = first < lengths[:, None]
    pages, place = torch.unique(block_table[read], return_inverse=True)
    table = torch.full_like(block_table, -1)
    table[read] = place.to(table.dtype)
    rows = k_cache[pages] if len(pages) else k_cache[:1]
    return unpack_latent_bytes(rows, dtype, head_dim_v), table


@lru_cache(maxsize=64)
def _engine(
    dtype: torch.dtype, dim: int, dim_v: int, scale: float, causal: bool, backend: str
) -> AttentionEngine:
    metas = [meta_tensor(None, None, None, d, dtype=dtype) for d in (dim, dim, dim_v)]
    masked: dict[str, Any] = {}
    if causal:
        masked = {
            "mask_mod": causal_with_offset(),
            "custom_fwd_inputs": CustomIO({"q_offset": ("batch",)}),
        }
    return AttentionEngine(metas, scale=scale, backend=backend, **masked)

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
from attn_engine.errors import WrongArgument
from attn_engine.frontend import CustomIO, meta_tensor
from attn_engine.library.serving.masks import causal_with_offset
from attn_engine.library.tokens.flash_mla_sparse import with_sink
from attn_engine.library.tokens.sparse_attention import sparse_attention


def get_mla_metadata(*_: Any, **__: Any) -> tuple[None, None]:
    """(None, None): how work is shared is decided at each call. For callers of FlashMLA."""
    return None, None


def flash_mla_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    block_table: Tensor | None,
    cache_seqlens: Tensor,
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

    indices: int32 or int64 (b, s_q, topk), the keys that each query sees: places in the cache, page * rows of a page +
    row, -1 for none; block_table, cache_seqlens and causal are then not read, as there. topk_length: int (b,), entries
    of a sequence's lists that count. attn_sink: (h_q,), one logit more in every row's sum, which has no value; it is
    not in lse.

    tile_scheduler_metadata and num_splits are not needed. float8 caches and second caches are refused: WrongArgument.
    """
    given = {"is_fp8_kvcache": is_fp8_kvcache or None, **others}
    for name, x in given.items():
        if x is not None:
            kind = x if isinstance(x, bool) else type(x).__name__
            instead = "Keys of q's type, all of those in sight, are what this function is for."
            raise WrongArgument(argument=name, got=kind, expected="left out", instead=instead)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else float(softmax_scale)
    if indices is not None:
        counts = None if topk_length is None else topk_length[:, None].expand(-1, q.shape[1])
        out, lse = sparse_attention(
            q, k_cache, indices, dim_v=head_dim_v, sm_scale=scale, topk_length=counts,
            physical=True, return_lse=True, backend=backend,
        )  # fmt: skip
        return with_sink(out, lse, attn_sink), lse
    engine = _engine(q.dtype, q.shape[-1], head_dim_v, scale, causal, backend)
    offset = {"q_offset": cache_seqlens - q.shape[1]} if causal else {}
    pages = {} if block_table is None else {"block_table": block_table}
    out, rows = engine(
        q, k_cache, k_cache[..., :head_dim_v],
        len_kv=cache_seqlens, return_final_rowscales=True, **offset, **pages,
    )  # fmt: skip
    return with_sink(out, rows["lse"], attn_sink), rows["lse"]


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

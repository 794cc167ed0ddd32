"""Attention over chosen tokens (DeepSeek-V3.2, section 2.1): each query brings the indices of its keys.

    o[t, h] = sum over u in S_t of softmax_u(sm_scale * q[t, h] . k[u]) v[u]
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from attn_engine.engine import AttentionEngine
from attn_engine.errors import WrongArgument
from attn_engine.frontend import meta_tensor
from attn_engine.library.tokens.arguments import head_dim, of_type, shaped
from attn_engine.token_calls import Bound, GivenTokens, Keys, attend_over


def sparse_attention(
    q: Tensor,
    kv: Tensor,
    indices: Tensor,
    v: Tensor | None = None,
    *,
    dim_v: int | None = None,
    sm_scale: float | None = None,
    topk_length: Tensor | None = None,
    block_table: Tensor | None = None,
    len_kv: Tensor | None = None,
    physical: bool = False,
    check_duplicates: bool = False,
    return_lse: bool = False,
    backend: str = "auto",
) -> Any:
    """o (B, S, H, Dv) in q's type; with return_lse also lse (B, H, S), float32, the natural logarithm.

    q: (B, S, H, Dq). kv: (B, L, Hkv, Dq), whose first dim_v columns are the values (None: all), unless v (B, L, Hkv, Dv)
    is given. H is a multiple of Hkv: any number of heads. With block_table, int (B, pages of one), kv and v are caches
    (pages, rows of a page, Hkv, D). len_kv: int (B,), how many keys there are.
    indices: int32 or int64 (B, S, Hkv or 1, topk), positions of keys; physical: places in the cache, page * rows of a
    page + row. -1, or any other number outside of the keys, counts for nothing, wherever it stands. topk_length: int
    (B, S), the first so many entries of each list count. An entry that stands there twice counts twice; with
    check_duplicates it is refused. No order or causality is assumed: they are in the indices.
    A query without keys gives o = 0 and lse = -inf. sm_scale: None is Dq^-0.5.

    q, kv and v get gradients, also through lse; the same bits for any number of threads. Memory beside the results:
    32 MB of gathered keys, and in the backward pass the gradient of kv in float32.
    Raises WrongTokens and the errors of a call of `AttentionEngine`.
    """
    shaped("q", q, 4, "(batch, queries, heads, dim)")
    shaped("kv", kv, 4, "(batch, length, kv heads, dim), or a cache in pages")
    dim = q.shape[3]
    if v is not None and dim_v is not None:
        raise WrongArgument(argument="dim_v", got=dim_v, expected="left out beside v", instead="v says it.")
    values = kv if v is None else v
    of_values = values.shape[3] if dim_v is None else head_dim("dim_v", dim_v, dim)
    scale = dim**-0.5 if sm_scale is None else float(sm_scale)
    engine = engine_of(q.dtype, dim, of_values, scale, backend)
    named: dict[str, Any] = {"token_slots" if physical else "token_indices": indices}
    named |= {"token_counts": topk_length, "block_table": block_table, "len_kv": len_kv}
    if v is not None:
        return _result(engine(q, kv, v, return_final_rowscales=True, **named), return_lse)
    given = GivenTokens(*(named.pop(n) if n in named else None for n in ("token_indices",)))  # placeholder
    return given, Keys, Bound, attend_over, of_type, torch, check_duplicates

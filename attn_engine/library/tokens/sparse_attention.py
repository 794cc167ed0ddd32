"""Attention over chosen tokens (DeepSeek-V3.2, arXiv:2512.02556, section 2.1): each query brings indices of its keys.

    o[t, h] = sum over u in S_t of softmax_u(sm_scale * q[t, h] . k[u]) v[u]

S_t is any list of tokens; what chose them is elsewhere.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from attn_engine.engine import AttentionEngine
from attn_engine.errors import WrongArgument
from attn_engine.frontend import meta_tensor
from attn_engine.library.arguments import scale_of
from attn_engine.library.tokens.arguments import prefix, shaped
from attn_engine.runtime.scaled import COLUMNS
from attn_engine.token_calls import GivenTokens


def sparse_attention(
    q: Tensor,
    kv: Tensor,
    indices: Tensor,
    v: Tensor | None = None,
    *,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
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

    q: (B, S, H, Dq). kv: (B, L, Hkv, Dq), whose first dim_v columns are the values (None: all), unless v, (B, L, Hkv,
    Dv), is given. H is a multiple of Hkv: any number of heads. With block_table, int (B, pages of one), kv and v are
    caches (pages, rows of a page, Hkv, D). len_kv: int (B,), how many keys there are.
    indices: int32 or int64 (B, S, Hkv or 1, topk), positions of keys; physical: places in the cache, page * rows of a
    page + row. -1, or any other number outside of the keys, counts for nothing, wherever it stands. topk_length: int
    (B, S), the first so many entries of each list count. A token that stands there twice counts twice; with
    check_duplicates it is refused. Nothing is said about order or causality: that is what the indices say.
    k_scale, v_scale: of kv, and of v where it is given, which are then float8_e4m3fn: a scale for each row and head or
    for every 128 columns (docs/serving.md). Chosen rows become numbers of q's type; there are no gradients.
    A query without keys gives o = 0 and lse = -inf. sm_scale: None is Dq^-0.5.

    q, kv and v get gradients, also through lse; the same bits for any number of threads. Memory beside the results:
    32 MB of gathered keys, and in the backward pass as much again and the gradient of kv in float32.
    Raises WrongTokens, WrongArgument and the errors of a call of `AttentionEngine`.
    """
    shaped("q", q, "(batch, queries, heads, dim)")
    shaped("kv", kv, "(batch or pages, rows, kv heads, dim)")
    if v is not None and dim_v is not None:
        raise WrongArgument(argument="dim_v", got=dim_v, expected="left out beside v", instead="v says it.")
    values = v
    if values is None:
        values = kv if dim_v is None else kv[..., : prefix("dim_v", dim_v, kv.shape[3])]
    scale = scale_of("sm_scale", sm_scale, q.shape[3])
    engine = engine_of(q.dtype, q.shape[3], values.shape[3], scale, backend)
    given = GivenTokens("token_slots" if physical else "token_indices", indices, topk_length)
    if v is None and k_scale is not None:
        v_scale = first_scales(k_scale, kv, values.shape[3])
    of_call = {"block_table": block_table, "len_kv": len_kv, "k_scale": k_scale, "v_scale": v_scale}
    named = {n: x for n, x in of_call.items() if x is not None}
    o, rows = given.attend(
        engine, (q, kv, values), (), named, shared=v is None, sets=check_duplicates, called=_called(physical)
    )
    return (o, rows["lse"]) if return_lse else o


def first_scales(scale: Tensor, x: Tensor, columns: int) -> Tensor:
    """The scales of the first columns of x."""
    return scale[..., : -(-columns // COLUMNS)] if scale.ndim == x.ndim and scale.shape[-1] > 1 else scale


def _called(physical: bool) -> dict[str, str]:
    """How this function calls what an engine's call has other names for."""
    return {"token_slots" if physical else "token_indices": "indices", "token_counts": "topk_length"}


@lru_cache(maxsize=64)
def engine_of(dtype: torch.dtype, dim: int, dim_v: int, scale: float, backend: str) -> AttentionEngine:
    """Softmax attention of these kinds."""
    metas = [meta_tensor(None, None, None, d, dtype=dtype) for d in (dim, dim, dim_v)]
    return AttentionEngine(metas, scale=scale, backend=backend)

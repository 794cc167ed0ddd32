"""Attention over chosen tokens of a cache with latent rows (DeepSeek-V3.2, arXiv:2512.02556, section 2.1), with the
signature of Ascend's sparse_flash_attention."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attn_engine.errors import WrongArgument
from attn_engine.library.arguments import divisible, number
from attn_engine.library.tokens.arguments import alike, refuse_shape, shaped
from attn_engine.library.tokens.sparse_attention import engine_of
from attn_engine.runtime.scaled import check_scales, like_queries, scales_given
from attn_engine.runtime.token_attention import Keys
from attn_engine.runtime.token_checks import checked_lists, integers, lengths_of
from attn_engine.token_calls import Bound, attend_over

_CALLED = {"token_indices": "sparse_indices", "len_kv": "actual_seq_lengths_kv"}


def sparse_flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    sparse_indices: Tensor,
    scale_value: float,
    *,
    block_table: Tensor | None = None,
    actual_seq_lengths_query: Tensor | None = None,
    actual_seq_lengths_kv: Tensor | None = None,
    query_rope: Tensor | None = None,
    key_rope: Tensor | None = None,
    sparse_block_size: int = 1,
    sparse_mode: int = 3,
    return_softmax_lse: bool = False,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    backend: str | None = None,
) -> Any:
    """out (B, S, N, Dv) in query's type; with return_softmax_lse also lse (B, N, S), float32, the natural logarithm.

    query: (B, S, N, D). key: (B, L, N2, D), or with block_table, int (B, pages of one), a cache (pages, rows of a page,
    N2, D). value: likewise, of any last dimension; None, or key itself: the keys are the values. query_rope, (B, S, N,
    R), and key_rope (as key, R): further columns of query and key, which are no part of the values; the two caches are
    read where they lie. N is a multiple of N2.
    sparse_indices: int32 or int64 (B, S, N2 or 1, k), positions in the sequence; -1 or any number outside of it counts
    for nothing. actual_seq_lengths_kv: int (B,), how many keys there are. actual_seq_lengths_query: int (B,), how many
    of the queries; rows behind are 0. sparse_mode: 3, query i of n sees keys below length - n + 1 + i; 0: all keys.
    k_scale, v_scale: of key, and of value where it is given, which are then float8_e4m3fn: a scale for each row and
    head or for every 128 columns (docs/serving.md); key_rope is of query's type, and there are no gradients.
    A query without keys gives 0 and lse = -inf. Differentiable in query, key, value and the two for rope.
    Raises WrongArgument and WrongTokens.
    """
    queries, keys = _checked(
        query, key, value, query_rope, key_rope, {"k_scale": k_scale, "v_scale": v_scale}
    )
    for name, x, known in (
        ("sparse_block_size", sparse_block_size, (1,)),
        ("sparse_mode", sparse_mode, (0, 3)),
    ):
        if x not in known:
            expected = " or ".join(map(str, known))
            raise WrongArgument(
                argument=name, got=x, expected=expected, instead="Indices are those of tokens."
            )
    if block_table is None and key.shape[0] != query.shape[0]:
        refuse_shape(
            "key", key, f"({query.shape[0]}, length, heads, dim): a batch as query has, or a block_table"
        )
    q = torch.cat(queries, -1) if len(queries) > 1 else query
    q, first = q.transpose(1, 2), keys.keys[0]
    lists = checked_lists(
        "token_indices", sparse_indices, None, q, first, block_table, actual_seq_lengths_kv, _CALLED
    )
    lists = replace(lists, limit=_limits(query, lists.limit[:, 0], actual_seq_lengths_query, sparse_mode))
    dims = sum(x.shape[3] for x in queries), keys.dim_v or keys.values[0].shape[3]
    engine = engine_of(query.dtype, *dims, number("scale_value", scale_value), backend or "auto")
    out, rows = attend_over(engine, Bound(engine.program, {}, {"scale": engine.scale}), lists, q, keys)
    out = out.transpose(1, 2)
    return (out, rows["lse"]) if return_softmax_lse else out


def _checked(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    query_rope: Tensor | None,
    key_rope: Tensor | None,
    of_call: dict[str, Tensor | None],
) -> tuple[list[Tensor], Keys]:
    """The columns of the queries, and K and V as (N, heads, rows, D)."""
    layout = "(batch or pages, rows, heads, dim)"
    shaped("query", query, "(batch, queries, heads, dim)")
    shaped("key", key, layout)
    same = value is None or value is key
    others = {"value": key if same else value, "query_rope": query_rope, "key_rope": key_rope}
    given = {name: shaped(name, x, layout) for name, x in others.items() if x is not None}
    if same and of_call["k_scale"] is not None:
        of_call = {**of_call, "v_scale": of_call["k_scale"]}
    scales = scales_given(of_call, (), key, given.get("value", key), "bshd")
    if scales is None:
        alike("query", query, key=key, **given)
    else:
        like_queries(query, key, given.get("value", key))
        check_scales(key, given.get("value", key), scales, "bshd")
        alike("query", query, **{n: x for n, x in given.items() if n != "value"})
    if (query_rope is None) != (key_rope is None):
        name = "key_rope" if key_rope is None else "query_rope"
        raise WrongArgument(
            argument=name, got=None, expected="given beside the other one", instead="Give both or none."
        )
    divisible(query.shape[2], key.shape[2], "query", "key")
    if query.shape[3] != key.shape[3]:
        refuse_shape("key", key, f"one with {query.shape[3]} columns, as query has")
    for name, x in given.items():
        of = query if name == "query_rope" else key
        if x.shape[:3] != of.shape[:3]:
            refuse_shape(name, x, f"{tuple(of.shape[:3])} and any number of columns")
    queries, keys = [query], [key.transpose(1, 2)]
    if query_rope is not None and key_rope is not None:
        if query_rope.shape[3] != key_rope.shape[3]:
            refuse_shape("key_rope", key_rope, f"one with {query_rope.shape[3]} columns, as query_rope has")
        queries, keys = [query, query_rope], [*keys, key_rope.transpose(1, 2)]
    of_key, of_value = (None, None) if scales is None else scales.values()
    of_all = (of_key, *[None] * (len(keys) - 1), *([] if same else [of_value]))
    of_all = of_all if scales is not None else ()
    if same:
        return queries, Keys(tuple(keys), (), key.shape[3], of_all)
    return queries, Keys(tuple(keys), (given["value"].transpose(1, 2),), 0, of_all)


def _limits(query: Tensor, lengths: Tensor, of_queries: Tensor | None, sparse_mode: int) -> Tensor:
    """int64 (B, S): the first key that a query does not see."""
    count = query.shape[1]
    rows = torch.arange(count, device=query.device)
    counts = torch.full_like(lengths, count)
    if of_queries is not None:
        counts = lengths_of(
            "actual_seq_lengths_query", integers("actual_seq_lengths_query", of_queries, query), query, count
        )
    seen = lengths[:, None].expand(-1, count)
    if sparse_mode == 3:
        seen = (lengths - counts + 1)[:, None] + rows
    return torch.where(rows < counts[:, None], seen.clamp(min=0), 0)

"""The lightning indexer of DeepSeek sparse attention (DeepSeek-V3.2): which tokens a query attends to.

    I[t, u] = sum over heads j of weights[t, j] * relu(query[t, j] . key[u])
    indices[t] = the sparse_count tokens u of the highest I[t, u] that t may see; of equals the lower u

One head of keys serves all heads of queries. Positive scales of queries and keys (1/sqrt(D), those of a quantisation)
may be multiplied into the weights; they never change which tokens are taken unless they differ between keys.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from attn_engine.errors import WrongArgument
from attn_engine.frontend import CustomIO, meta_tensor
from attn_engine.library.arguments import called, one_each
from attn_engine.selection_engine import SelectionEngine

_CALLED = {"q": "query", "k": "key", "len_q": "actual_seq_lengths_query", "len_kv": "actual_seq_lengths_key"}


def relu_of_heads(score: Any, custom: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    """weights[b, q_idx, h] * relu(score)."""
    return torch.relu(score) * custom.input_tensors["weights"][b, q_idx, h]


def up_to_offset(b: Any, h: Any, q_idx: Any, kv_idx: Any, custom: Any) -> Any:
    """Query i of sequence b sees the keys up to position i + offset[b]."""
    return kv_idx <= q_idx + custom.input_tensors["offset"][b]


def lightning_indexer(
    query: Tensor,
    key: Tensor,
    weights: Tensor,
    actual_seq_lengths_query: Tensor | None = None,
    actual_seq_lengths_key: Tensor | None = None,
    block_table: Tensor | None = None,
    sparse_count: int = 2048,
    sparse_mode: int = 3,
    *,
    backend: str | None = None,
) -> Tensor:
    """int32 (b, s1, 1, sparse_count): the tokens of each query, ascending, -1 behind.

    query: (b, s1, heads, D). key: (b, s2, 1, D), or with block_table a cache (pages, rows of a page, 1, D).
    weights: (b, s1, heads), of any floating dtype. actual_seq_lengths_query, actual_seq_lengths_key: int (b,), how many
        queries and keys there are (None: all; keys in pages need theirs); queries behind the last get -1.
    block_table: int (b, pages of the longest), the page of each page of keys, -1 where there is none.
    sparse_mode: 3, causal, aligned at the end (the last query sees the last key); or 0, every key.
    backend: as for SelectionEngine. Raises WrongArgument and the typed errors of SelectionEngine.
    """
    engine, arguments = _call(
        query,
        key,
        weights,
        actual_seq_lengths_query,
        actual_seq_lengths_key,
        block_table,
        sparse_mode,
        backend,
    )
    with called(**_CALLED, topk="sparse_count"):
        return engine(query, key, topk=sparse_count, **arguments)


def indexer_scores(
    query: Tensor,
    key: Tensor,
    weights: Tensor,
    actual_seq_lengths_query: Tensor | None = None,
    actual_seq_lengths_key: Tensor | None = None,
    block_table: Tensor | None = None,
    sparse_mode: int = 3,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """I itself, (b, s1, keys of the longest), -inf where a query may not look; arguments as of `lightning_indexer`.

    dtype: None: float32 (float64 for float64 inputs). O(s1 * s2) memory; computed some rows at a time.
    """
    engine, arguments = _call(
        query, key, weights, actual_seq_lengths_query, actual_seq_lengths_key, block_table, sparse_mode, None
    )
    with called(**_CALLED):
        return engine.importance(query, key, dtype=dtype, **arguments)[:, :, 0]


def mqa_logits(
    q: Tensor, kv: Tensor | tuple[Tensor, Tensor], weights: Tensor, ks: Tensor, ke: Tensor
) -> Tensor:
    """I of one sequence as DeepGEMM's fp8_mqa_logits gives it: float32 (m, n), -inf outside of keys ks[i] to ke[i] - 1.

    q: (m, heads, D), kv: (n, D), or with a scale for each key (n,): I is multiplied by it. Elements of any floating
    type, float8 too. weights: (m, heads). ks, ke: int (m,). O(m * n) memory. Raises the errors of SelectionEngine.
    """
    k, scale = kv if isinstance(kv, tuple) else (kv, torch.ones(kv.shape[0], device=kv.device))
    query, key = (x.float() if x.dtype.itemsize == 1 else x for x in (q, k))
    engine = _logits_engine(query.dtype, query.shape[2])
    found = engine.importance(
        query[None], key[None, :, None], weights=weights[None], scale=scale, first=ks[None], end=ke[None]
    )
    return found[0, :, 0]


@lru_cache(64)
def _logits_engine(dtype: torch.dtype, dim: int) -> SelectionEngine:
    def scaled(score: Any, custom: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return relu_of_heads(score, custom, b, h, q_idx, kv_idx) * custom.input_tensors["scale"][kv_idx]

    def in_range(b: Any, h: Any, q_idx: Any, kv_idx: Any, custom: Any) -> Any:
        first, end = custom.input_tensors["first"], custom.input_tensors["end"]
        return (kv_idx >= first[b, q_idx]) & (kv_idx < end[b, q_idx])

    rows = ("batch", "seq_len")
    shapes = {"weights": (*rows, "heads"), "scale": ("seq_len_kv",), "first": rows, "end": rows}
    metas = [meta_tensor(None, None, None, dim, dtype=dtype)] * 2
    return SelectionEngine(metas, scaled, in_range, CustomIO(shapes))


def _call(
    query: Tensor,
    key: Tensor,
    weights: Tensor,
    lengths_query: Tensor | None,
    lengths_key: Tensor | None,
    block_table: Tensor | None,
    sparse_mode: int,
    backend: str | None,
) -> tuple[SelectionEngine, dict[str, Tensor]]:
    """The engine, and what its call brings beside query and key."""
    _check(query, key, block_table, lengths_key, sparse_mode)
    for name, lengths in (("query", lengths_query), ("key", lengths_key)):
        if lengths is not None:
            one_each(f"actual_seq_lengths_{name}", lengths, query.shape[0])
    arguments = {"weights": weights}
    if lengths_query is not None:
        arguments["len_q"] = lengths_query
    if lengths_key is not None:
        arguments["len_kv"] = lengths_key
    if block_table is not None:
        arguments["block_table"] = block_table
    if sparse_mode == 3:
        queries: Tensor | int = query.shape[1] if lengths_query is None else lengths_query
        keys: Tensor | int = key.shape[1] if lengths_key is None else lengths_key
        offset = torch.as_tensor(keys - queries, device=query.device)
        arguments["offset"] = offset.expand(query.shape[0]).to(torch.int32)
    return indexer_engine(query.dtype, query.shape[3], sparse_mode == 3, backend), arguments


def _check(query: Any, key: Any, block_table: Any, lengths_key: Any, sparse_mode: Any) -> None:
    for name, x in (("query", query), ("key", key)):
        if not isinstance(x, Tensor) or x.ndim != 4:
            got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            expected = "a tensor of 4 dimensions, (b, s, heads, D) or a cache (pages, rows of a page, 1, D)"
            raise WrongArgument(argument=name, got=got, expected=expected, instead="See lightning_indexer.")
    if key.shape[2] != 1:
        expected = "a tensor with 1 head"
        instead = "The heads of the indexer share their keys; a SelectionEngine takes any number of heads."
        raise WrongArgument(argument="key", got=tuple(key.shape), expected=expected, instead=instead)
    if block_table is not None and lengths_key is None:
        expected = "given with block_table"
        instead = "It says how many of the keys in a sequence's pages there are."
        raise WrongArgument(argument="actual_seq_lengths_key", got=None, expected=expected, instead=instead)
    if isinstance(sparse_mode, bool) or sparse_mode not in (0, 3):
        instead = "3 is causal, aligned at the last key; 0 sees every key."
        raise WrongArgument(argument="sparse_mode", got=sparse_mode, expected="0 or 3", instead=instead)


@lru_cache(64)
def indexer_engine(
    dtype: torch.dtype, dim: int, causal: bool = True, backend: str | None = None
) -> SelectionEngine:
    """The indexer as an engine; its custom inputs are "weights" (b, s1, heads) and, if causal, "offset" (b,)."""
    shapes: dict[str, Any] = {"weights": ("batch", "seq_len", "heads")}
    if causal:
        shapes["offset"] = ("batch",)
    return SelectionEngine(
        [meta_tensor(None, None, None, dim, dtype=dtype)] * 2,
        relu_of_heads,
        up_to_offset if causal else None,
        CustomIO(shapes),
        backend=backend,
    )

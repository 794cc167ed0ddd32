"""Hash-sparse and query/key-sparse attention (Pagliardini et al., arXiv:2306.01160, sections 3.1 and 3.2).

Queries and keys are dropped per head ("qk"), or see keys of their own bucket alone ("hash"); always causal, by the
original positions counted from 0 on both sides. Names, arguments and layouts are those of the paper's code.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, Literal

import torch
from torch import Tensor

from attn_engine.engine import AttentionEngine
from attn_engine.errors import FractionalKeep, UnknownSparsity, WrongArgument
from attn_engine.frontend import CustomIO, meta_tensor
from attn_engine.library.arguments import scale_of
from attn_engine.library.sparse.buckets import Pairs, by_bucket, by_keep
from attn_engine.library.sparse.compaction import order_of, take
from attn_engine.row_calls import attend_listed

NO_KEY = 1_000_000_000  # the position of a padded key: after every query
NO_QUERY = -1  # the position of a padded query: before every key
SHORT_TILE = 32
Causality = Literal["inclusive", "strict"]


def dynamic_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_idx: Tensor,
    k_idx: Tensor,
    sm_scale: float | None = None,
    sparsity_mode: str = "hash",
    causal: Causality = "inclusive",
) -> Tensor:
    """Attention (B, Nq, H, Dv) over the pairs that `sparsity_mode` keeps.

    q: (B, Nq, H, D), k: (B, Nk, H, D), v: (B, Nk, H, Dv). q_idx (B, Nq, H), k_idx (B, Nk, H): buckets, any integers
    between -1e9 and 1e9, for "hash"; 1 to keep and 0 to drop, as floats or bools, for "qk". sm_scale: 1/sqrt(D)
    when None. causal: "strict" hides a token from itself too. A query that sees nothing gives 0.

    Raises UnknownSparsity (a KeyError) for another mode, WrongArgument and FractionalKeep for wrong indices.
    """
    scale = scale_of("sm_scale", sm_scale, q.shape[-1])
    if sparsity_mode == "hash":
        return hash_sparse_attention(q, k, v, q_idx, k_idx, sm_scale=scale, causal=causal)
    if sparsity_mode == "qk":
        return qk_sparse_attention(q, k, v, q_idx, k_idx, sm_scale=scale, causal=causal)
    raise UnknownSparsity(mode=sparsity_mode)


def qk_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_keep: Tensor,
    k_keep: Tensor,
    sm_scale: float | None = None,
    causal: Causality = "inclusive",
) -> Tensor:
    """Attention of the kept queries over the kept keys; arguments as of `dynamic_sparse_attention`."""
    _check_keep("q_keep", q_keep, q)
    _check_keep("k_keep", k_keep, k)
    return _over_sequences(by_keep(q_keep, k_keep), q, k, v, sm_scale, _causality(causal))


def hash_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_hash: Tensor | None = None,
    k_hash: Tensor | None = None,
    sm_scale: float | None = None,
    causal: Causality = "inclusive",
    *,
    q_bucket_idx: Tensor | None = None,
    k_bucket_idx: Tensor | None = None,
) -> Tensor:
    """Attention over keys of the query's own bucket; arguments as of `dynamic_sparse_attention`.

    The buckets may be given under either pair of names.
    """
    q_hash = _check_buckets("q_hash", q_bucket_idx if q_hash is None else q_hash, q)
    k_hash = _check_buckets("k_hash", k_bucket_idx if k_hash is None else k_hash, k)
    pairs, strict = by_bucket(q_hash, k_hash), _causality(causal)
    if pairs.worth_it:
        return _over_sequences(pairs, q, k, v, sm_scale, strict)
    sides = (pairs.q, q, q_hash), (pairs.k, k, k_hash), (pairs.k, v, k_hash)
    rows = [_heads_first(side.moves.gather(x), x) for side, x, _ in sides]
    at = [_heads_first(side.order % max(side.shape[1], 1), x).int() for side, x, _ in sides[:2]]
    own = [_heads_first(x.flatten().index_select(0, side.moves.there), x) for side, _, x in sides[:2]]
    out = _engine(q, v, sm_scale, "hash", strict)(*rows, *at, *own)
    return pairs.q.moves.restore(out.reshape(-1, v.shape[-1]), tuple(q.shape))


def compact(
    keep_tensor: Tensor, x: Tensor | None, index: Tensor | None = None
) -> tuple[Tensor | Any, Tensor, Tensor | None]:
    """The rows of x that `keep_tensor` keeps, first; as long as the head that keeps most.

    x: (B, N, H, D). keep_tensor: (B, N, H), 1 to keep, 0 to drop. index: a former call's, instead of making one.
    Returns the compact x (B, buffer, H, D), the index (B, buffer, H), int64, of original positions, and how many of
    each head are kept (B, H), in keep_tensor's type; None where `index` was given. Slots past that number hold dropped
    rows; `pad_index` marks them. The two tensors may also come in the other order.
    """
    if isinstance(x, Tensor) and x.ndim == 3 and keep_tensor.ndim == 4:
        keep_tensor, x = x, keep_tensor
    if index is not None:
        return (None if x is None else take(x, index)), index, None
    with torch.no_grad():
        _check_keep("keep_tensor", keep_tensor, x)
        order, counts = order_of(keep_tensor)
        index = order[:, : int(counts.max()) if counts.numel() else 0]
    kept = counts.to(keep_tensor.dtype) if keep_tensor.dtype.is_floating_point else counts
    return (None if x is None else take(x, index)), index, kept


def pad_index(index: Tensor, indices_per_head: Tensor, pad_idx: int = NO_QUERY) -> Tensor:
    """A copy of `compact`'s index, int32, with `pad_idx` in the slots past what each head keeps."""
    with torch.no_grad():
        slots = torch.arange(index.shape[1], device=index.device)[None, :, None]
        return torch.where(slots < indices_per_head[:, None], index, pad_idx).int()


def sort_bucketed_attention(qkv: Tensor, qkv_bucket_idx: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(rows, buckets, index): qkv (B, N, H, D) sorted by bucket, keeping the order within one.

    qkv_bucket_idx: (B, N, H). index: (B, N, H), int64, the original positions; rows have gradients.
    """
    buckets = _check_buckets("qkv_bucket_idx", qkv_bucket_idx, qkv)
    order = by_bucket(buckets, buckets).q.order
    index = _heads_first(order % max(qkv.shape[1], 1), buckets).transpose(1, 2)
    return take(qkv, index), qkv_bucket_idx.gather(1, index), index


def qk_sparse_attention_kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_idx: Tensor,
    k_idx: Tensor,
    sm_scale: float | None = None,
    causal: Causality = "inclusive",
) -> Tensor:
    """Attention between compacted rows: each query sees the keys whose position is not after its own.

    q: (B, H, Nq, D), k, v: (B, H, Nk, .). q_idx (B, H, Nq), k_idx (B, H, Nk): int32 positions, ascending, padded with
    -1 and 1e9. sm_scale: 1/sqrt(D) when None.
    """
    return _engine(q, v, sm_scale, "qk", _causality(causal))(q, k, v, q_idx, k_idx)


def hash_sparse_attention_kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_idx: Tensor,
    k_idx: Tensor,
    q_hash: Tensor,
    k_hash: Tensor,
    sm_scale: float | None = None,
    causal: Causality = "inclusive",
) -> Tensor:
    """Attention between rows sorted by bucket. q_hash (B, H, Nq), k_hash (B, H, Nk): int32; the others as above."""
    return _engine(q, v, sm_scale, "hash", _causality(causal))(q, k, v, q_idx, k_idx, q_hash, k_hash)


def _over_sequences(
    pairs: Pairs, q: Tensor, k: Tensor, v: Tensor, sm_scale: float | None, strict: bool
) -> Tensor:
    """Attention of each sequence's queries over its keys that are not after them."""
    short = pairs.short and q.device.type == "cpu"
    in_place = short and not torch.compiler.is_compiling()
    mode, columns, tables = "order", 0, ()
    if not pairs.alike:  # else what is earlier in a sequence is earlier in time
        mode, columns = "sequences", pairs.columns
        tables = tuple(side.positions(columns, moved=not in_place) for side in (pairs.q, pairs.k))
    engine = _engine(q, v, sm_scale, mode, strict, columns, short)
    if in_place:
        return _in_place(engine, pairs, q, k, v, tables)
    sides = (pairs.q, q), (pairs.k, k), (pairs.k, v)
    rows = [side.moves.gather(x).unsqueeze(1) for side, x in sides]
    out = engine(*rows, *tables, cu_len_q=pairs.q.cu_len, cu_len_kv=pairs.k.cu_len)
    return pairs.q.moves.restore(out.squeeze(1), tuple(q.shape))


def _in_place(
    engine: AttentionEngine, pairs: Pairs, q: Tensor, k: Tensor, v: Tensor, tables: tuple[Tensor, ...]
) -> Tensor:
    """The same where the kernels look for the rows themselves. A long sequence would be looked for too often: each tile
    of keys again for every tile of queries."""
    of_q, of_k = (_lies_heads_first(x) for x in (q, k))
    inputs = _as_rows(q, of_q), _as_rows(k, of_k), _as_rows(v, of_k)
    places = pairs.q.rows(heads_first=of_q), pairs.k.rows(heads_first=of_k)
    out = attend_listed(engine, inputs, tables, (pairs.q.ends, pairs.k.ends), places)
    batches, length, heads, _ = q.shape
    if of_q:
        return out.view(batches, heads, length, v.shape[3]).transpose(1, 2)
    return out.view(batches, length, heads, v.shape[3])


def _lies_heads_first(x: Tensor) -> bool:
    return not x.is_contiguous() and x.transpose(1, 2).is_contiguous()


def _as_rows(x: Tensor, heads_first: bool) -> Tensor:
    """(rows, 1, D) of x (B, N, H, D) in the order of memory."""
    return (x.transpose(1, 2) if heads_first else x).reshape(-1, 1, x.shape[3])


def _heads_first(rows: Tensor, like: Tensor) -> Tensor:
    """(B H N, ...) as (B, H, N, ...), of the shape that `like` begins with (B, N, H)."""
    batches, length, heads = like.shape[:3]
    return rows.view(batches, heads, length, *rows.shape[1:])


def _engine(
    q: Tensor,
    v: Tensor,
    sm_scale: float | None,
    mode: str,
    strict: bool,
    columns: int = 0,
    short: bool = False,
) -> AttentionEngine:
    scale = scale_of("sm_scale", sm_scale, q.shape[-1])
    return _made(q.dtype, q.shape[-1], v.shape[-1], scale, mode, strict, columns, short)


@lru_cache(maxsize=64)
def _made(
    dtype: torch.dtype,
    dim_qk: int,
    dim_v: int,
    scale: float,
    mode: str,
    strict: bool,
    columns: int,
    short: bool,
) -> AttentionEngine:
    """mode: which rows see which, "order", "sequences", "qk" or "hash". columns: of the tables for "sequences".
    short: most sequences have few tiles, of which smaller ones waste less (on a CPU)."""

    def in_order(b: Any, h: Any, q_idx: Any, kv_idx: Any, custom: Any) -> Any:
        return kv_idx < q_idx if strict else kv_idx <= q_idx

    def in_past_of_sequence(b: Any, h: Any, q_idx: Any, kv_idx: Any, custom: Any) -> Any:
        query, key = custom.input_tensors["q_at"][b, q_idx], custom.input_tensors["k_at"][b, kv_idx]
        return key < query if strict else key <= query

    def in_past(b: Any, h: Any, q_idx: Any, kv_idx: Any, custom: Any) -> Any:
        query, key = custom.input_tensors["q_idx"][b, h, q_idx], custom.input_tensors["k_idx"][b, h, kv_idx]
        return key < query if strict else key <= query

    def in_bucket(b: Any, h: Any, q_idx: Any, kv_idx: Any, custom: Any) -> Any:
        query, key = custom.input_tensors["q_hash"][b, h, q_idx], custom.input_tensors["k_hash"][b, h, kv_idx]
        return (query == key) & in_past(b, h, q_idx, kv_idx, custom)

    q_rows, k_rows = ("batch", "heads", "seq_len"), ("batch", "heads", "seq_len_kv")
    positions = {"q_idx": q_rows, "k_idx": k_rows}
    of_sequences = {"q_at": ("batch", columns), "k_at": ("batch", columns)}
    mask, inputs = {
        "order": (in_order, {}),
        "sequences": (in_past_of_sequence, of_sequences),
        "qk": (in_past, positions),
        "hash": (in_bucket, {**positions, "q_hash": q_rows, "k_hash": k_rows}),
    }[mode]
    layout = "bshd" if mode in ("order", "sequences") else "bhsd"
    metas = [meta_tensor(None, None, None, dim, dtype=dtype) for dim in (dim_qk, dim_qk, dim_v)]
    make = partial(AttentionEngine, metas, None, CustomIO(inputs), None, mask, layout=layout, scale=scale)
    if not short:
        return make()
    schedule = make(backend="cpu").schedule
    tile = min(schedule.block_q, SHORT_TILE)
    return make(backend="cpu", schedule=replace(schedule, block_q=tile, block_kv=SHORT_TILE))


def _causality(causal: str) -> bool:
    if causal not in ("inclusive", "strict"):
        instead = '"inclusive" lets a token see itself.'
        raise WrongArgument(
            argument="causal", got=causal, expected='"inclusive" or "strict"', instead=instead
        )
    return causal == "strict"


def _check_shape(argument: str, index: object, x: Tensor) -> Tensor:
    if not isinstance(index, Tensor) or index.shape != x.shape[:3]:
        got = tuple(index.shape) if isinstance(index, Tensor) else index
        expected = f"a tensor of shape {tuple(x.shape[:3])}, one entry per batch, position and head"
        raise WrongArgument(argument=argument, got=got, expected=expected, instead="Expand it to that shape.")
    return index


def _check_keep(argument: str, keep: object, x: Tensor | None) -> None:
    given = _check_shape(argument, keep, x) if x is not None else keep
    assert isinstance(given, Tensor)
    if not given.dtype.is_floating_point and given.dtype is not torch.bool:
        expected = "of a floating type (or bool), 1 to keep and 0 to drop"
        raise WrongArgument(
            argument=argument, got=given.dtype, expected=expected, instead="Convert it: .float()."
        )
    if given.dtype.is_floating_point and not bool(((given == 0) | (given == 1)).all()):
        wrong = given[(given != 0) & (given != 1)][0].item()
        raise FractionalKeep(argument=argument, value=wrong)


def _check_buckets(argument: str, buckets: object, x: Tensor) -> Tensor:
    given = _check_shape(argument, buckets, x)
    if given.dtype.is_floating_point or given.dtype is torch.bool:
        expected = "of an integer type"
        raise WrongArgument(
            argument=argument, got=given.dtype, expected=expected, instead="Convert it: .int()."
        )
    if given.numel() and not -NO_KEY < int(given.min()) <= int(given.max()) < NO_KEY:
        got = (int(given.min()), int(given.max()))
        raise WrongArgument(
            argument=argument, got=got, expected="within -1e9 and 1e9", instead="Number the buckets."
        )
    return given.int()

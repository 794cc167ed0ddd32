"""Hash-sparse and query/key-sparse attention (Pagliardini et al., arXiv:2306.01160, sections 3.1 and 3.2).

Queries and keys are dropped per head ("qk"), or see keys of their own bucket alone ("hash"); always causal, by the
original positions counted from 0 on both sides. Names, arguments and layouts are those of the paper's code.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from attn_engine.engine import AttentionEngine
from attn_engine.errors import FractionalKeep, UnknownSparsity, WrongArgument
from attn_engine.frontend import CustomIO, meta_tensor
from attn_engine.library.sparse.compaction import inverse_of, order_of, permute, put, take

NO_KEY = 1_000_000_000  # the position of a padded key: after every query
NO_QUERY = -1  # the position of a padded query: before every key
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
    scale = 1.0 / math.sqrt(q.shape[-1]) if sm_scale is None else sm_scale
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
    (q_index, q_idx), (k_index, k_idx) = _kept(q_keep, NO_QUERY), _kept(k_keep, NO_KEY)
    rows = take(q, q_index), take(k, k_index), take(v, k_index)
    engine = _engine(q, v, sm_scale, "qk", _causality(causal))
    out = engine(*_heads_first(rows), *_heads_first((q_idx, k_idx)))
    return put(out.transpose(1, 2), q_index, q.shape[1])


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
    q_hash, q_index, q_inverse = _sorted(q_hash)
    k_hash, k_index, k_inverse = _sorted(k_hash)
    rows = permute(q, q_index, q_inverse), permute(k, k_index, k_inverse), permute(v, k_index, k_inverse)
    engine = _engine(q, v, sm_scale, "hash", _causality(causal))
    out = engine(*_heads_first(rows), *_heads_first((q_index.int(), k_index.int(), q_hash, k_hash)))
    return permute(out.transpose(1, 2), q_inverse, q_index)


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
    buckets, index, inverse = _sorted(qkv_bucket_idx)
    return permute(qkv, index, inverse), buckets, index


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


def _kept(keep: Tensor, padding: int) -> tuple[Tensor, Tensor]:
    """The index of `compact`, and the same padded."""
    with torch.no_grad():
        order, counts = order_of(keep)
        index = order[:, : int(counts.max()) if counts.numel() else 0]
        return index, pad_index(index, counts, padding)


def _sorted(buckets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Buckets in ascending order, the positions they come from, and where those went."""
    with torch.no_grad():
        ordered, index = torch.sort(buckets, dim=1, stable=True)
        return ordered, index, inverse_of(index)


def _heads_first(tensors: tuple[Tensor, ...]) -> list[Tensor]:
    return [x.transpose(1, 2) for x in tensors]


def _engine(q: Tensor, v: Tensor, sm_scale: float | None, mode: str, strict: bool) -> AttentionEngine:
    scale = 1.0 / math.sqrt(q.shape[-1]) if sm_scale is None else float(sm_scale)
    return _made(q.dtype, q.shape[-1], v.shape[-1], scale, mode, strict)


@lru_cache(maxsize=64)
def _made(
    dtype: torch.dtype, dim_qk: int, dim_v: int, scale: float, mode: str, strict: bool
) -> AttentionEngine:
    def in_past(b: Any, h: Any, q_idx: Any, kv_idx: Any, custom: Any) -> Any:
        query, key = custom.input_tensors["q_idx"][b, h, q_idx], custom.input_tensors["k_idx"][b, h, kv_idx]
        return key < query if strict else key <= query

    def in_bucket(b: Any, h: Any, q_idx: Any, kv_idx: Any, custom: Any) -> Any:
        query, key = custom.input_tensors["q_hash"][b, h, q_idx], custom.input_tensors["k_hash"][b, h, kv_idx]
        return (query == key) & in_past(b, h, q_idx, kv_idx, custom)

    names = ("idx", "hash") if mode == "hash" else ("idx",)
    lengths = {"q": "seq_len", "k": "seq_len_kv"}
    inputs = {f"{x}_{name}": ("batch", "heads", lengths[x]) for name in names for x in "qk"}
    metas = [meta_tensor(None, None, None, dim, dtype=dtype) for dim in (dim_qk, dim_qk, dim_v)]
    mask = in_bucket if mode == "hash" else in_past
    return AttentionEngine(metas, None, CustomIO(inputs), None, mask, layout="bhsd", scale=scale)


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

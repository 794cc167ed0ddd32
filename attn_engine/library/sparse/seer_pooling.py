"""What a gate learns from: the largest attention weight of every block of keys (SeerAttention, arXiv:2410.13276).

R[h, i, n] is the largest weight that query i of head h gives to a key of block n, in exact causal attention within its
sequence; A[h, m, n] the largest R[h, i, n] of the queries i of block m. In float32, nothing of length x length is made.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from attn_engine.engine import AttentionEngine
from attn_engine.frontend import meta_tensor
from attn_engine.frontend.pooling import with_pooled
from attn_engine.library.arguments import divisible, number
from attn_engine.library.dense.causal import causal
from attn_engine.library.dense.softmax import OnlineSoftmax
from attn_engine.library.sparse.seer_arguments import (
    block_of,
    blocks,
    packed_lengths,
    shaped,
)

EPSILON = 1e-6  # added to the sum that a row of the 2D weights is divided by
_DIM_V = 16  # of the values where nobody wants the output


def attn_pooling(
    q: Tensor,
    k: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    sm_scale: float,
    block_size: int = 64,
) -> tuple[Tensor, list[Tensor]]:
    """(2D, 1D): the largest weights of blocks, by blocks of queries and by queries; without gradients.

    q: (T, Hq, D), k: (T, Hkv, D), sequence b in rows cu_seqlens[b] to cu_seqlens[b + 1] - 1; Hq a multiple of Hkv.
    block_size: a power of two from 16 on.
    2D: float32 (sequences, Hq, n, n) with n = ceil(max_seqlen / block_size), A over (its sum over a row + 1e-6), 0
    beyond a sequence. 1D: R of each sequence, float32 (1, Hq, length, ceil(length / block_size)), not normalised.

    Raises WrongArgument.
    """
    lengths, size = _check(q, k, cu_seqlens, max_seqlen, block_size)
    pooled_2d = _empty_2d(q, len(lengths), max_seqlen, size)
    pooled_1d: list[Tensor] = []
    with torch.no_grad():
        for b, (x, y) in enumerate(zip(q.split(lengths), k.split(lengths), strict=True)):
            pooled_1d.append(_largest_weights(x, y, sm_scale, size))
            _put_2d(pooled_2d[b], pooled_1d[-1][0], size)
        return _normalised(pooled_2d), pooled_1d


attn_pooling_qk_varlen = attn_pooling


def attn_pooling_2d(
    q: Tensor, k: Tensor, cu_seqlens: Tensor, max_seqlen: int, sm_scale: float, block_size: int = 64
) -> Tensor:
    """The 2D weights of `attn_pooling` alone: of the 1D ones, those of one kv head of one sequence exist at a time."""
    lengths, size = _check(q, k, cu_seqlens, max_seqlen, block_size)
    pooled_2d = _empty_2d(q, len(lengths), max_seqlen, size)
    group = q.shape[1] // k.shape[1]
    with torch.no_grad():
        for b, (x, y) in enumerate(zip(q.split(lengths), k.split(lengths), strict=True)):
            for head in range(k.shape[1]):
                heads = slice(head * group, (head + 1) * group)
                found = _largest_weights(x[:, heads], y[:, head : head + 1], sm_scale, size)
                _put_2d(pooled_2d[b, heads], found[0], size)
        return _normalised(pooled_2d)


def attn_pooling_qkv_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    sm_scale: float,
    block_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """(output, 1D): causal attention (T, Hq, Dv), which has gradients, and R padded with zeros, which has none.

    R: float32 (sequences, Hq, max_seqlen, ceil(max_seqlen / block_size)). Arguments as of `attn_pooling`.
    """
    lengths, size = _check(q, k, cu_seqlens, max_seqlen, block_size)
    shaped("v", v, (k.shape[0], k.shape[1], "Dv"), "with the rows and heads of k")
    padded = q.new_zeros(
        (len(lengths), q.shape[1], max_seqlen, blocks(max_seqlen, size)), dtype=torch.float32
    )
    engine = _engine(q.dtype, q.shape[-1], v.shape[-1], number("sm_scale", sm_scale), size)
    out, rows = engine(q, k, v, cu_len_q=cu_seqlens, return_final_rowscales=True)
    found = rows["pooled_max"].detach()
    padded[:, :, : found.shape[2], : found.shape[3]] = found
    return out, padded


def attn_with_pooling(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, sm_scale: float, block_size: int = 64
) -> tuple[Tensor, Tensor]:
    """(output, 2D) of dense q (batch, Hq, N, D) and k, v (batch, Hkv, N, .): attention, and A over its sum over a row.

    The output has gradients, A (batch, Hq, n, n) with n = ceil(N / block_size) has none.
    """
    size = block_of(block_size)
    shaped("q", q, ("batch", "heads", "N", "D"), "queries")
    divisible(q.shape[1], shaped("k", k, (q.shape[0], "heads", q.shape[2], q.shape[3]), "as q").shape[1])
    engine = _engine(q.dtype, q.shape[-1], v.shape[-1], number("sm_scale", sm_scale), size, causal, "bhsd")
    out, rows = engine(q, k, v, return_final_rowscales=True)
    n = blocks(q.shape[2], size)
    pooled = q.new_zeros((q.shape[0], q.shape[1], n, n), dtype=torch.float32)
    for b, one in enumerate(rows["pooled_max"].detach()):
        _put_2d(pooled[b], one, size)
    total = pooled.sum(-1, keepdim=True)
    return out, pooled / torch.where(total > 0, total, 1.0)


def _largest_weights(q: Tensor, k: Tensor, sm_scale: float, size: int) -> Tensor:
    """R of one sequence, (1, Hq, length, blocks); q: (length, Hq, D)."""
    engine = _engine(q.dtype, q.shape[-1], _DIM_V, number("sm_scale", sm_scale), size)
    values = k.new_zeros((1, *k.shape[:2], _DIM_V))
    return engine(q[None], k[None], values, return_final_rowscales=True)[1]["pooled_max"].float()


def _put_2d(pooled: Tensor, rows: Tensor, size: int) -> None:
    """pooled (Hq, n, n) from R (Hq, length, blocks): the largest of the queries of a block, normalised later."""
    length, count = rows.shape[1:]
    whole = length // size
    by_block = rows[:, : whole * size].unflatten(1, (whole, size))
    pooled[:, :whole, :count] = by_block.amax(2) if whole else 0.0
    if whole * size < length:
        pooled[:, whole, :count] = rows[:, whole * size :].amax(1)


def _normalised(pooled: Tensor) -> Tensor:
    return pooled.div_(pooled.sum(-1, keepdim=True).add_(EPSILON))


def _empty_2d(q: Tensor, sequences: int, max_seqlen: int, size: int) -> Tensor:
    n = blocks(max_seqlen, size)
    return q.new_zeros((sequences, q.shape[1], n, n), dtype=torch.float32)


def _check(
    q: Tensor, k: Tensor, cu_seqlens: Tensor, max_seqlen: int, block_size: int
) -> tuple[list[int], int]:
    size = block_of(block_size)
    shaped("q", q, ("T", "heads", "D"), "the queries of all sequences")
    shaped("k", k, (q.shape[0], "kv heads", q.shape[2]), "the keys of all sequences")
    divisible(q.shape[1], k.shape[1])
    return packed_lengths("cu_seqlens", cu_seqlens, q.shape[0], max_seqlen), size


@lru_cache(maxsize=64)
def _engine(
    dtype: torch.dtype,
    dim: int,
    dim_v: int,
    scale: float,
    size: int,
    past: bool = True,
    layout: str = "bshd",
) -> AttentionEngine:
    metas = [meta_tensor(None, None, None, d, dtype=dtype) for d in (dim, dim, dim_v)]
    rule = with_pooled(OnlineSoftmax(), max=size)
    mask = causal() if past else None
    return AttentionEngine(metas, online_func=rule, mask_mod=mask, layout=layout, scale=scale)

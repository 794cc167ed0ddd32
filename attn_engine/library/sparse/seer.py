"""Attention over blocks of keys that a gate picks, in packed sequences (SeerAttention, arXiv:2410.13276).

keep[h, i, j] = M[h, row of i, block of j] and j <= i, positions restarting at 0 in every sequence; a "2D" mask has a
row for every block of queries, a "1D" mask one for every query. A query that sees nothing gives 0, and zero gradients.
Names, arguments and their order are those of the paper's code.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from attn_engine.engine import AttentionEngine
from attn_engine.errors import WrongArgument
from attn_engine.frontend import meta_tensor
from attn_engine.library.arguments import divisible, number
from attn_engine.library.dense.causal import causal
from attn_engine.library.sparse.seer_arguments import (
    block_of,
    blocks,
    mask_of_blocks,
    packed_lengths,
    shaped,
)


def block_1d_gqa_sparse_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_k: Tensor,
    cu_seqlens_q: Tensor,
    max_seqlen: int,
    sm_scale: float,
    block_mask: Tensor,
    block_size: int = 64,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal attention of every query over the blocks of keys that its own row of the mask picks: (T, Hq, Dv).

    q: (T, Hq, D), k: (T, Hkv, D), v: (T, Hkv, Dv), Hq a multiple of Hkv. cu_seqlens_k, cu_seqlens_q: int32 or int64
        (sequences + 1,), the same sums of lengths from 0 on, of keys first. max_seqlen: at least the longest length.
    block_mask: bool (sequences, Hkv or Hq, max_seqlen, ceil(max_seqlen / block_size)); what it says beyond a sequence
        or after the query does not matter. block_size: a power of two from 16 on.
    return_lse: also the logarithm of the row sums, float32 (Hq, T), -inf where nothing is seen; it has gradients.

    Differentiable in q, k and v. Raises WrongArgument.
    """
    size = block_of(block_size)
    cumulative = cu_seqlens_k, cu_seqlens_q
    return _attention((q, k, v), cumulative, max_seqlen, sm_scale, block_mask, (1, size), return_lse)


# The same: the paper has a kernel with dense work for k and v whose heads are repeated, which they need not be here.
block_1d_gqa_sparse_attn_varlen_sim_func = block_1d_gqa_sparse_attn_varlen_func


def block_2d_sparse_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_k: Tensor,
    cu_seqlens_q: Tensor,
    max_seqlen: int,
    sm_scale: float,
    block_mask: Tensor,
    block_size: int = 64,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal attention of every block of queries over the blocks of keys that the mask picks: (T, Hq, Dv).

    block_mask: bool (sequences, Hq or Hkv, n, n) with n = ceil(max_seqlen / block_size). Heads of k and v may be
    repeated or not; everything else is as of `block_1d_gqa_sparse_attn_varlen_func`.
    """
    size = block_of(block_size)
    cumulative = cu_seqlens_k, cu_seqlens_q
    return _attention((q, k, v), cumulative, max_seqlen, sm_scale, block_mask, (size, size), return_lse)


def _attention(
    qkv: tuple[Tensor, Tensor, Tensor],
    cumulative: tuple[Tensor, Tensor],
    max_seqlen: int,
    sm_scale: float,
    block_mask: Tensor,
    block_size: tuple[int, int],
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    q, k, v = qkv
    _check_rows(q, k, v)
    of_k, of_q = cumulative
    lengths = packed_lengths("cu_seqlens_q", of_q, q.shape[0], max_seqlen)
    if of_k is not of_q and packed_lengths("cu_seqlens_k", of_k, q.shape[0], max_seqlen) != lengths:
        expected = "that of cu_seqlens_q: queries and keys are the same positions"
        instead = "Give the same tensor twice; AttentionEngine takes lengths that differ."
        raise WrongArgument(argument="cu_seqlens_k", got=of_k.tolist(), expected=expected, instead=instead)
    sizes = [blocks(max_seqlen, size) for size in block_size]
    meaning = (
        f"(sequences, heads, {'queries' if block_size[0] == 1 else 'blocks of queries'}, blocks of keys)"
    )
    mask = mask_of_blocks(block_mask, len(lengths), q.shape[1], k.shape[1], sizes, meaning)
    engine = _engine(q.dtype, q.shape[-1], v.shape[-1], number("sm_scale", sm_scale))
    given: dict[str, Any] = {"cu_len_q": of_q, "block_sparse_mask": mask, "block_size": block_size}
    out, rows = engine(q, k, v, return_final_rowscales=True, **given)
    return (out, rows["lse"]) if return_lse else out


def _check_rows(q: Tensor, k: Tensor, v: Tensor) -> None:
    shaped("q", q, ("T", "heads", "D"), "the queries of all sequences")
    shaped("k", k, (q.shape[0], "kv heads", q.shape[2]), "the keys of all sequences")
    shaped("v", v, (q.shape[0], k.shape[1], "Dv"), "the values of all sequences")
    divisible(q.shape[1], k.shape[1])


@lru_cache(maxsize=64)
def _engine(dtype: torch.dtype, dim: int, dim_v: int, scale: float) -> AttentionEngine:
    metas = [meta_tensor(None, None, None, d, dtype=dtype) for d in (dim, dim, dim_v)]
    return AttentionEngine(metas, mask_mod=causal(), scale=scale)

"""Decoding over blocks of a cache that a gate picks (SeerAttention-R, arXiv:2506.08889), with the names of its code.

keep[b, h, j] = block of j is picked for the kv head of h, and j < cache_seqlens[b]. Nothing picked gives 0.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from attn_engine.engine import AttentionEngine
from attn_engine.errors import WrongArgument
from attn_engine.frontend import CustomIO, meta_tensor
from attn_engine.library.arguments import divisible, integers, scale_of
from attn_engine.library.sparse.seer_arguments import (
    block_of,
    blocks,
    mask_of_blocks,
    shaped,
)


def block_sparse_flash_decode_gqa_mask(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    max_cache_seqlen: int,
    block_mask: Tensor,
    block_size: int,
    sm_scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of new tokens over the picked blocks of a cache: like q, with the head dimension of v_cache.

    q: (batch, Hq, D), the last token, or (batch, n, Hq, D), the last n tokens of each sequence, which see the keys up
        to their own position. k_cache: (batch, S, Hkv, D), v_cache: (batch, S, Hkv, Dv), Hq a multiple of Hkv.
    cache_seqlens: int32 or int64 (batch,), how many rows of the cache are filled, the new tokens among them; others are
        never read. max_cache_seqlen: S.
    block_mask: bool (batch, Hkv or Hq, ceil(S / block_size)), for all n tokens; blocks beyond cache_seqlens do not
        matter. block_size: a power of two from 16 on. sm_scale: 1/sqrt(D) when None.
    return_lse: also the logarithm of the row sums, float32 (batch, Hq) or (batch, Hq, n), -inf where nothing is seen.

    Raises WrongArgument.
    """
    size, rows = _check(q, k_cache, v_cache, cache_seqlens, max_cache_seqlen, block_size)
    n, heads, kv_heads = blocks(max_cache_seqlen, size), rows.shape[2], k_cache.shape[2]
    meaning = "(batch, heads, blocks of the cache)"
    mask = mask_of_blocks(block_mask, q.shape[0], heads, kv_heads, (n,), meaning)
    return _decode(q, rows, k_cache, v_cache, cache_seqlens, mask, size, sm_scale, return_lse)


def block_sparse_flash_decode_gqa_indice(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    max_cache_seqlen: int,
    max_selected_blocks: int,
    block_indices: Tensor,
    block_size: int,
    sm_scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """As `block_sparse_flash_decode_gqa_mask`, with the numbers of the picked blocks in any order.

    block_indices: integers (batch, Hkv or Hq, max_selected_blocks). Negative ones and blocks beyond cache_seqlens pick
    nothing; a block that is named more than once counts once.
    """
    size, rows = _check(q, k_cache, v_cache, cache_seqlens, max_cache_seqlen, block_size)
    heads, kv_heads = rows.shape[2], k_cache.shape[2]
    integers("block_indices", block_indices, (3,))
    shaped(
        "block_indices", block_indices, (q.shape[0], "heads", max_selected_blocks), "max_selected_blocks last"
    )
    if block_indices.shape[1] not in (heads, kv_heads):
        got, expected = block_indices.shape[1], f"{heads} (of q) or {kv_heads} (of k)"
        instead = "Give them for one of these."
        raise WrongArgument(argument="heads of block_indices", got=got, expected=expected, instead=instead)
    n = blocks(max_cache_seqlen, size)
    picked = torch.where((block_indices < 0) | (block_indices > n), n, block_indices)  # n: to be cut off
    mask = q.new_zeros((*picked.shape[:2], n + 1), dtype=torch.bool).scatter_(2, picked.long(), True)
    return _decode(q, rows, k_cache, v_cache, cache_seqlens, mask[:, :, :n], size, sm_scale, return_lse)


def _check(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    max_cache_seqlen: object,
    block_size: object,
) -> tuple[int, Tensor]:
    """The block size, and q as (batch, n, Hq, D)."""
    size = block_of(block_size)
    if not isinstance(q, Tensor) or q.ndim not in (3, 4):  # pyright: ignore[reportUnnecessaryIsInstance]
        got = tuple(q.shape) if isinstance(q, Tensor) else q  # pyright: ignore[reportUnnecessaryIsInstance]
        expected = "(batch, heads, D) or (batch, n, heads, D)"
        raise WrongArgument(
            argument="q", got=got, expected=expected, instead="Give the last tokens' queries."
        )
    rows = q[:, None] if q.ndim == 3 else q
    batch = q.shape[0]
    shaped("k_cache", k_cache, (batch, "S", "kv heads", q.shape[-1]), "keys, filled from row 0 on")
    shaped("v_cache", v_cache, (batch, k_cache.shape[1], k_cache.shape[2], "Dv"), "values of the same rows")
    divisible(rows.shape[2], k_cache.shape[2])
    length = v_cache.shape[1]
    if max_cache_seqlen != length:
        expected = f"{length}, the rows of v_cache"
        instead = "Give v_cache.shape[1]."
        raise WrongArgument(
            argument="max_cache_seqlen", got=max_cache_seqlen, expected=expected, instead=instead
        )
    integers("cache_seqlens", cache_seqlens, (1,))
    shaped("cache_seqlens", cache_seqlens, (batch,), "one length for each batch")
    low, high = (int(x) for x in torch.aminmax(cache_seqlens)) if batch else (0, 0)
    if low < 0 or high > length:
        expected = f"from 0 to {length}, the rows of v_cache"
        instead = "Count the filled rows."
        raise WrongArgument(
            argument="cache_seqlens", got=high if high > length else low, expected=expected, instead=instead
        )
    return size, rows


def _decode(
    q: Tensor,
    rows: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    mask: Tensor,
    size: int,
    sm_scale: float | None,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    scale = scale_of("sm_scale", sm_scale, q.shape[-1])
    n = rows.shape[1]
    engine = _engine(q.dtype, q.shape[-1], v_cache.shape[-1], scale, n > 1)
    offset = [(cache_seqlens - n).int()] if n > 1 else []
    tile = 1 << (n - 1).bit_length()  # one row of blocks holds all new tokens
    given: dict[str, Any] = {
        "len_kv": cache_seqlens,
        "block_sparse_mask": mask[:, :, None],
        "block_size": (tile, size),
    }
    out, saved = engine(rows, k_cache, v_cache, *offset, return_final_rowscales=True, **given)
    if q.ndim == 3:
        out, saved = out[:, 0], {"lse": saved["lse"][:, :, 0]}
    return (out, saved["lse"]) if return_lse else out


@lru_cache(maxsize=64)
def _engine(dtype: torch.dtype, dim: int, dim_v: int, scale: float, several: bool) -> AttentionEngine:
    def up_to_own(b: Any, h: Any, q_idx: Any, kv_idx: Any, custom: Any) -> Any:
        return kv_idx <= q_idx + custom.input_tensors["offset"][b]

    metas = [meta_tensor(None, None, None, d, dtype=dtype) for d in (dim, dim, dim_v)]
    places = CustomIO({"offset": ("batch",)}) if several else None
    return AttentionEngine(metas, None, places, None, up_to_own if several else None, scale=scale)

"""The parts of native sparse attention as functions on packed sequences, with the names of
native-sparse-attention-triton (NSA, arXiv:2502.11089).

compressed keys and values, attention over them with the blocks that they find important, and attention over these
blocks; any group of heads, and blocks of any power of two.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attn_engine.library.arguments import at_least, integers
from attn_engine.library.nsa.arguments import check_pair, check_queries, given_blocks, scale_of
from attn_engine.library.nsa.branches import over_blocks, over_selected
from attn_engine.library.nsa.compression import Phi, compress, mean_pooling
from attn_engine.library.nsa.selection import selected
from attn_engine.library.nsa.sequences import Sequences, sequences_in_caches, sequences_of
from attn_engine.library.nsa.sizes import Compression, multiple, power_of_two, refuse
from attn_engine.library.sparse.seer_arguments import shaped


def linear_compress(
    x: Tensor,
    w: Tensor,
    cu_seqlens: Tensor,
    kernel_size: int,
    kernel_stride: int,
    pe: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Rows (blocks, heads, D'), each block of kernel_size tokens side by side times w[h], and their cu_seqlens, int32.

    x: (rows, heads, D), w: (heads, kernel_size * D, D'), pe: added to the tokens of a block, (heads, kernel_size, D).
    """
    shaped("w", w, (x.shape[1], kernel_size * x.shape[2], "D'"), "a matrix for each head")

    def phi(blocks: Tensor) -> Tensor:
        return torch.einsum("blhd,hldo->bho", blocks, w.unflatten(1, (kernel_size, -1)))

    return _compressed(x, phi, cu_seqlens, _compression(kernel_size, kernel_stride), pe)


def weightedpool_compress(
    x: Tensor,
    w: Tensor,
    cu_seqlens: Tensor,
    kernel_size: int,
    kernel_stride: int,
    pe: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `linear_compress`, with a weight for each head and place, w (heads, kernel_size)."""
    shaped("w", w, (x.shape[1], kernel_size), "a weight for each head and place")

    def phi(blocks: Tensor) -> Tensor:
        return torch.einsum("blhd,hl->bhd", blocks, w)

    return _compressed(x, phi, cu_seqlens, _compression(kernel_size, kernel_stride), pe)


def avgpool_compress(
    x: Tensor,
    w: None,
    cu_seqlens: Tensor,
    kernel_size: int,
    kernel_stride: int,
    pe: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `linear_compress`, the mean; w is None."""
    if w is not None:
        refuse("w", "given", "None", "A mean has no weights; weightedpool_compress has.")
    return _compressed(x, mean_pooling, cu_seqlens, _compression(kernel_size, kernel_stride), pe)


def compressed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel_size: int,
    kernel_stride: int,
    block_size: int,
    topk: int,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    sm_scale: float | None = None,
    init_blocks: int = 1,
    local_blocks: int = 2,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """O_cmp (rows, HQ, D'), and the blocks of most importance, int32 (H, rows, topk), ascending, -1 behind.

    q: (rows, HQ, D). k, v: rows of blocks with their cu_seqlens_k, as `linear_compress` gives them. The first
    init_blocks and the last local_blocks up to the query's own are always among the topk. max_seqlen_q,
    max_seqlen_k: not needed.
    """
    compression = _compression(kernel_size, kernel_stride)
    _check_selection(compression, block_size, topk, init_blocks, local_blocks)
    check_queries(q, packed=True)
    check_pair(("k", "v"), (k, v), q, (k, v))
    integers("cu_seqlens_k", cu_seqlens_k, (1,))
    tokens = sequences_of(q, len(q), cu_seqlens_q)
    sequences = Sequences(len(q), tokens.cumulative, rows=cu_seqlens_k.to(torch.int32))
    scale, forced = scale_of(sm_scale, q), (init_blocks, local_blocks)
    o, lse = over_blocks(q, (k, v), sequences, compression, scale, backend)
    lse = lse.detach()
    found = selected(q, k, lse, sequences, compression, block_size, topk, scale, backend, forced)
    return o, found.transpose(0, 1).contiguous()


def topk_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    topk_idx: Tensor,
    block_size: int,
    cu_seqlens: Tensor,
    softmax_scale: float | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """O_slc (rows, HQ, D') over the tokens up to the query's in the blocks topk_idx (H, rows, topk), -1 for none."""
    power_of_two("block_size", block_size)
    check_queries(q, packed=True)
    check_pair(("k", "v"), (k, v), q, (k, v))
    sequences = sequences_of(q, len(k), cu_seqlens)
    shaped("topk_idx", topk_idx, (k.shape[1], len(q), "topk"), "blocks of each kv head and token")
    found = given_blocks(topk_idx.transpose(0, 1), q, k.shape[1], -(-len(k) // block_size))
    return over_selected(q, (k, v), found, sequences, block_size, scale_of(softmax_scale, q), backend)


def compressed_attention_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seqlens: Tensor,
    compress_seqlens: Tensor,
    kernel_size: int,
    kernel_stride: int,
    block_size: int,
    topk: int,
    init_blocks: int = 1,
    local_blocks: int = 2,
    sm_scale: float | None = None,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """O_cmp (batch, HQ, D') of the last tokens, and their blocks, int32 (H, batch, topk).

    q: (batch, HQ, D). k, v: caches of compressed rows (batch, capacity, H, D). seqlens, compress_seqlens: integers
    (batch,), the tokens and the compressed rows of each sequence.
    """
    compression = _compression(kernel_size, kernel_stride)
    _check_selection(compression, block_size, topk, init_blocks, local_blocks)
    shaped("q", q, ("batch", "heads", "D"), "the last tokens")
    last = q[:, None]
    check_pair(("k", "v"), (k, v), last, (k, v))
    for name, x in (("seqlens", seqlens), ("compress_seqlens", compress_seqlens)):
        integers(name, x, (1,))
    sequences = sequences_in_caches(last, k, seqlens, rows=compress_seqlens.to(torch.int32))
    scale, forced = scale_of(sm_scale, q), (init_blocks, local_blocks)
    with torch.no_grad():
        o, lse = over_blocks(last, (k, v), sequences, compression, scale, backend)
    found = selected(last, k, lse, sequences, compression, block_size, topk, scale, backend, forced)
    return o[:, 0], found[:, 0].transpose(0, 1).contiguous()


def topk_sparse_attention_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    topk_idx: Tensor,
    block_size: int,
    seqlens: Tensor,
    sm_scale: float | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """O_slc (batch, HQ, D') of the last tokens over the blocks topk_idx (H, batch, topk) of caches k (batch,
    capacity, H, D).
    """
    power_of_two("block_size", block_size)
    shaped("q", q, ("batch", "heads", "D"), "the last tokens")
    last = q[:, None]
    check_pair(("k", "v"), (k, v), last, (k, v))
    integers("seqlens", seqlens, (1,))
    shaped("topk_idx", topk_idx, (k.shape[2], len(q), "topk"), "blocks of each kv head and sequence")
    chosen = topk_idx.transpose(0, 1)[:, None]
    found = given_blocks(chosen, last, k.shape[2], -(-k.shape[1] // block_size))
    sequences = sequences_in_caches(last, k, seqlens)
    with torch.no_grad():
        return over_selected(last, (k, v), found, sequences, block_size, scale_of(sm_scale, q), backend)[:, 0]


def _compressed(
    x: Tensor, phi: Phi, cu_seqlens: Tensor, compression: Compression, pe: Tensor | None
) -> tuple[Tensor, Tensor]:
    check_queries(x, packed=True)
    sequences = sequences_of(x, len(x), cu_seqlens)
    if pe is None:
        return compress(x, phi, sequences, compression), sequences.rows_cumulative(compression)
    place = shaped(
        "pe", pe, (x.shape[1], compression.block, x.shape[2]), "a position of each place in a block"
    )
    rows = compress(x, lambda blocks: phi(blocks + place.transpose(0, 1)), sequences, compression)
    return rows, sequences.rows_cumulative(compression)


def _check_selection(compression: Compression, block_size: int, topk: int, first: int, last: int) -> None:
    power_of_two("block_size", block_size)
    at_least("init_blocks", first, 0)
    at_least("local_blocks", last, 1)
    at_least("topk", topk, max(1, first + last))
    multiple("block_size", block_size, compression.stride, "kernel_stride")


def _compression(kernel_size: int, kernel_stride: int) -> Compression:
    """Blocks of so many tokens; raises WrongArgument with the names that they have here."""
    at_least("kernel_size", kernel_size, 1)
    at_least("kernel_stride", kernel_stride, 1)
    multiple("kernel_size", kernel_size, kernel_stride, "kernel_stride")
    return Compression(kernel_size, kernel_stride)

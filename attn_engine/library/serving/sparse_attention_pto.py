"""The attention of DeepSeek-V3.2 (arXiv:2512.02556, section 2.1) at inference as one operator over 20 tensors, those of
Ascend's custom.npu_sparse_attention_pto: prologs, caches, the indexer's choice, latent attention over it.

Each part is a function of its own: `mla_prolog`, `indexer_prolog`, `write_to_slots`, `lightning_indexer`,
`sparse_flash_attention`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attn_engine.library.arguments import number, scale_of
from attn_engine.library.serving.append import kept_if_all_goes_well
from attn_engine.library.serving.prologs import indexer_prolog, mla_prolog
from attn_engine.library.serving.pto_checks import check_call
from attn_engine.library.sparse.indexer import lightning_indexer
from attn_engine.library.tokens.sparse_flash import sparse_flash_attention


def sparse_attention_pto(
    x: Tensor,
    w_dq: Tensor,
    w_uq_qr: Tensor,
    w_uk: Tensor,
    w_dkv_kr: Tensor,
    gamma_cq: Tensor,
    gamma_ckv: Tensor,
    sin: Tensor,
    cos: Tensor,
    cache_index: Tensor,
    kv_cache: Tensor,
    kr_cache: Tensor,
    block_table: Tensor,
    act_seqs: Tensor,
    w_idx_qb: Tensor,
    w_idx_k: Tensor,
    w_idx_proj: Tensor,
    in_gamma_k: Tensor,
    in_beta_k: Tensor,
    index_k_cache: Tensor,
    *,
    softmax_scale: float | None = None,
    indexer_rope: str = "first_interleaved",
    eps: float = 1e-5,
    layer_norm_eps: float = 1e-6,
    topk: int = 2048,
    rounding: bool = True,
    hadamard: bool = False,
    quantisation: str | None = None,
    backend: str = "auto",
) -> Tensor:
    """out (b, s1, n1, kv_rank) in x's type: latent attention of s1 new tokens to topk tokens each, of every head.

    x (b, s1, h), weights and gains as in `mla_prolog` and `indexer_prolog`, sin and cos (b, s1, rope); weights in
    Ascend's NZ order go through `from_nz` first. kv_cache (blocks, block_size, 1, kv_rank), kr_cache (..., rope) and
    index_k_cache (..., dim of the indexer) are changed in place, before anything is scored: new token (b, i) goes to
    slot cache_index[b, i] = block * block_size + row of each; negative ones are not written. block_table int32 or
    int64 (b, pages of one): page j of sequence b. act_seqs (b,): lengths with the new tokens; query i sees the first
    act_seqs[b] - s1 + 1 + i positions, and chooses topk of them by the indexer's scores, the lowest position where
    scores tie. A query that sees none gives zeros. Where keys are read is up to block_table alone.

    softmax_scale: None is (kv_rank + rope)^-0.5, as Ascend's operator has it; DeepSeek's models use (nope + rope)^-0.5
    and a factor. indexer_rope, hadamard, quantisation: as of `indexer_prolog`. eps: of RMSNorm. rounding: what a kernel
    stores in between is rounded to x's type; False: everything is computed in float32, also from caches of other types
    (copies of them: for tests).

    Everything is checked before anything is written: ShapeMismatch, WrongArgument, WrongPages, NotATensor,
    DeviceMismatch name the tensor; after any error the caches are as they were. No gradients: CacheNotDifferentiable.
    """
    mla = {
        "x": x, "w_dq": w_dq, "w_uq_qr": w_uq_qr, "w_uk": w_uk, "w_dkv_kr": w_dkv_kr,
        "gamma_cq": gamma_cq, "gamma_ckv": gamma_ckv, "sin": sin, "cos": cos,
    }  # fmt: skip
    indexer = {
        "w_idx_qb": w_idx_qb, "w_idx_k": w_idx_k, "w_idx_proj": w_idx_proj,
        "in_gamma_k": in_gamma_k, "in_beta_k": in_beta_k,
    }  # fmt: skip
    caches = {"kv_cache": kv_cache, "kr_cache": kr_cache, "index_k_cache": index_k_cache}
    sizes = check_call({**mla, **indexer, **caches}, cache_index, block_table, act_seqs, topk)
    scale = scale_of("softmax_scale", softmax_scale, sizes["kv_rank"] + sizes["rope"])
    with torch.no_grad():
        of_mla = mla_prolog(**mla, eps=eps, rounding=rounding)
        of_indexer = indexer_prolog(
            x, of_mla.c_q, **indexer, sin=sin, cos=cos, indexer_rope=indexer_rope,
            eps=number("layer_norm_eps", layer_norm_eps, 0), rounding=rounding,
            hadamard=hadamard, quantisation=quantisation,
        )  # fmt: skip
        new = [row.to(x.dtype)[:, :, None] for row in (of_mla.latent, of_mla.k_rope, of_indexer.key)]
        with kept_if_all_goes_well(new, [*caches.values()], cache_index.clamp_min(-1)):
            lengths = act_seqs.clamp_min(0)
            latents, rotated, keys = (c.to(of_mla.latent.dtype) for c in caches.values())
            chosen = lightning_indexer(
                of_indexer.query, keys, of_indexer.weights,
                actual_seq_lengths_key=lengths, block_table=block_table, sparse_count=topk, sparse_mode=3,
                backend=backend,
            )  # fmt: skip
            out = sparse_flash_attention(
                of_mla.q_latent, latents, latents, chosen, scale, block_table=block_table,
                actual_seq_lengths_kv=lengths, query_rope=of_mla.q_rope, key_rope=rotated,
                backend=backend,
            )  # fmt: skip
    return out.to(x.dtype)


npu_sparse_attention_pto = sparse_attention_pto

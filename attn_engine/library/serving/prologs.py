"""What comes before latent attention over chosen tokens (DeepSeek-V2, arXiv:2405.04434, section 2.1; DeepSeek-V3.2,
arXiv:2512.02556, section 2.1): queries and keys of the attention and of its indexer, from the hidden states.

Matrix products, norms and rotations, in plain torch. Absorbed: the up-projection of the keys is applied to the queries,
so that every head reads the same latent row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from attn_engine.library.arguments import number
from attn_engine.library.serving.prolog_checks import (
    check_indexer_operands,
    check_mla_operands,
    rotation_of,
)
from attn_engine.library.serving.quantisation import simulated


class MlaProlog(NamedTuple):
    """c_q (b, s1, q_rank), q_latent (b, s1, n1, kv_rank), q_rope (b, s1, n1, rope), latent (b, s1, kv_rank) and
    k_rope (b, s1, rope): the last two are what a token leaves in the caches."""

    c_q: Tensor
    q_latent: Tensor
    q_rope: Tensor
    latent: Tensor
    k_rope: Tensor


class IndexerProlog(NamedTuple):
    """query (b, s1, heads, dim), key (b, s1, dim), one for all heads, and weights (b, s1, heads)."""

    query: Tensor
    key: Tensor
    weights: Tensor


def mla_prolog(
    x: Tensor,
    w_dq: Tensor,
    w_uq_qr: Tensor,
    w_uk: Tensor,
    w_dkv_kr: Tensor,
    gamma_cq: Tensor,
    gamma_ckv: Tensor,
    sin: Tensor,
    cos: Tensor,
    *,
    eps: float = 1e-5,
    rounding: bool = True,
) -> MlaProlog:
    """Queries in the latent space of the keys, and the latent rows and rotated keys of new tokens.

    x (b, s1, h), w_dq (h, q_rank), w_uq_qr (q_rank, n1 * (nope + rope)), nope first in each head, w_uk (n1, nope,
    kv_rank), w_dkv_kr (h, kv_rank + rope), gamma_cq (q_rank,), gamma_ckv (kv_rank,), sin and cos (b, s1, rope).

        c_q = RMSNorm(x w_dq),  [q_nope | q_r] = c_q w_uq_qr,  q_latent = q_nope w_uk,  q_rope = RoPE(q_r)
        [c | k_r] = x w_dkv_kr,  latent = RMSNorm(c),  k_rope = RoPE(k_r)

    RoPE reads neighbouring pairs and writes halves (`rotate`). eps: of the norms. rounding: each of the values named
    above is rounded to x's type, as where they are stored; False keeps all of them in float32 (float64 for float64).
    Differentiable. Raises ShapeMismatch, WrongArgument, NotATensor for operands that do not fit, by name.
    """
    dims = check_mla_operands(
        x=x, w_dq=w_dq, w_uq_qr=w_uq_qr, w_uk=w_uk, w_dkv_kr=w_dkv_kr,
        gamma_cq=gamma_cq, gamma_ckv=gamma_ckv, sin=sin, cos=cos,
    )  # fmt: skip
    eps, stored = number("eps", eps, 0), _stored_as(x, rounding)
    c_q = rms_norm(_product(x, w_dq, stored), gamma_cq, eps).to(stored)
    heads = _product(c_q, w_uq_qr, stored).unflatten(-1, (dims["n1"], dims["nope"] + dims["rope"]))
    q_nope, q_r = heads.split((dims["nope"], dims["rope"]), -1)
    rows = q_nope.flatten(0, 1).transpose(0, 1)  # (n1, tokens, nope)
    q_latent = _product(rows, w_uk, stored).transpose(0, 1).unflatten(0, x.shape[:2])
    q_rope = rotate(q_r, sin[:, :, None], cos[:, :, None]).to(stored)
    c, k_r = _product(x, w_dkv_kr, stored).split((dims["kv_rank"], dims["rope"]), -1)
    latent = rms_norm(c, gamma_ckv, eps).to(stored)
    return MlaProlog(c_q, q_latent, q_rope, latent, rotate(k_r, sin, cos).to(stored))


def indexer_prolog(
    x: Tensor,
    c_q: Tensor,
    w_idx_qb: Tensor,
    w_idx_k: Tensor,
    w_idx_proj: Tensor,
    in_gamma_k: Tensor,
    in_beta_k: Tensor,
    sin: Tensor,
    cos: Tensor,
    *,
    indexer_rope: str = "first_interleaved",
    eps: float = 1e-6,
    rounding: bool = True,
    hadamard: bool = False,
    quantisation: str | None = None,
) -> IndexerProlog:
    """Queries, keys and head weights of the indexer, whose scores are sum over heads of weight * relu(query . key).

    x (b, s1, h), c_q (b, s1, q_rank) of `mla_prolog`, w_idx_qb (q_rank, heads * dim), w_idx_k (h, dim), w_idx_proj
    (h, heads), in_gamma_k and in_beta_k (dim,), sin and cos (b, s1, rope), with rope <= dim.

        query = RoPE(c_q w_idx_qb),  key = RoPE(LayerNorm(x w_idx_k)),  weights = x w_idx_proj

    indexer_rope: which columns turn ("first" or "last" rope of them) and how they pair ("interleaved", neighbours, or
    "halves"): "first_interleaved" (DeepSeek-V3.2-Exp as first published, GLM-5), "first_halves" (the same, corrected),
    "last_interleaved" (DeepSeek-V4), "last_halves". Keys of one kind only in a cache.
    eps: of LayerNorm. rounding: as of `mla_prolog`. hadamard: turn queries and keys by `hadamard`, after RoPE.
    quantisation: None, "fp8", "fp8_ue8m0" or "int8": queries and keys are what is left of them (`simulated`).
    Differentiable without quantisation.
    """
    dims = check_indexer_operands(
        x=x, c_q=c_q, w_idx_qb=w_idx_qb, w_idx_k=w_idx_k, w_idx_proj=w_idx_proj,
        in_gamma_k=in_gamma_k, in_beta_k=in_beta_k, sin=sin, cos=cos,
    )  # fmt: skip
    first, interleaved = rotation_of(indexer_rope)
    eps = number("eps", eps, 0)
    stored, wide = _stored_as(x, rounding), _wide(x)
    query = _product(c_q, w_idx_qb, wide).unflatten(-1, (dims["heads"], dims["dim"]))
    key = layer_norm(_product(x, w_idx_k, wide), in_gamma_k, in_beta_k, eps)
    query = _rotate_some(query, sin[:, :, None], cos[:, :, None], first, interleaved)
    key = _rotate_some(key, sin, cos, first, interleaved)
    query, key = (simulated(y, hadamard, quantisation).to(stored) for y in (query, key))
    return IndexerProlog(query, key, _product(x, w_idx_proj, stored))


def rotate(x: Tensor, sin: Tensor, cos: Tensor, *, interleaved: bool = True) -> Tensor:
    """RoPE of the last dimension, in float32: pairs in, halves out. sin, cos: one number for each column, broadcast.

    interleaved: the pairs of x are neighbours, (0, 1), (2, 3) and so on; else (0, n/2), (1, n/2 + 1) and so on. The
    first of all pairs fill the first half of the result: a permutation, under which products of queries and keys
    are the same.
    """
    wide = x.to(_wide(x))
    half = x.shape[-1] // 2
    if interleaved:
        wide = wide.unflatten(-1, (half, 2)).transpose(-1, -2).flatten(-2)
    turned = torch.cat((-wide[..., half:], wide[..., :half]), -1)
    return wide * cos.to(wide.dtype) + turned * sin.to(wide.dtype)


def rms_norm(x: Tensor, gamma: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * gamma over the last dimension, in float32 (float64 for float64)."""
    wide = x.to(_wide(x))
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * gamma.to(wide.dtype)


def layer_norm(x: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * gamma + beta over the last dimension, in float32 (float64 for float64)."""
    wide = x.to(_wide(x))
    return torch.nn.functional.layer_norm(
        wide, wide.shape[-1:], gamma.to(wide.dtype), beta.to(wide.dtype), eps
    )


def _rotate_some(x: Tensor, sin: Tensor, cos: Tensor, first: bool, interleaved: bool) -> Tensor:
    """RoPE of the first or of the last columns, as many as sin has."""
    rope, rest = sin.shape[-1], x.shape[-1] - sin.shape[-1]
    if first:
        turned, plain = x.split((rope, rest), -1)
        return torch.cat((rotate(turned, sin, cos, interleaved=interleaved), plain), -1)
    plain, turned = x.split((rest, rope), -1)
    return torch.cat((plain, rotate(turned, sin, cos, interleaved=interleaved)), -1)


def _product(x: Tensor, w: Tensor, result: torch.dtype) -> Tensor:
    """x w, summed in float32 or wider. Where the result is narrow, so are the operands: torch rounds the sums once."""
    return x.to(result) @ w.to(result)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def _stored_as(x: Tensor, rounding: bool) -> torch.dtype:
    return x.dtype if rounding else _wide(x)

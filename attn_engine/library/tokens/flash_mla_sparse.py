"""Latent attention over chosen tokens (DeepSeek-V3.2, arXiv:2512.02556, section 2.1) with FlashMLA's signature."""

from __future__ import annotations

import torch
from torch import Tensor

from attn_engine.errors import DeviceMismatch, WrongArgument
from attn_engine.library.arguments import divisible, number
from attn_engine.library.tokens.arguments import alike, prefix, refuse_shape, shaped
from attn_engine.library.tokens.sparse_attention import engine_of, first_scales
from attn_engine.token_calls import GivenTokens


def flash_mla_sparse_fwd(
    q: Tensor,
    kv: Tensor,
    indices: Tensor,
    sm_scale: float,
    d_v: int = 512,
    attn_sink: Tensor | None = None,
    topk_length: Tensor | None = None,
    *,
    k_scale: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """out (s_q, h_q, d_v) in q's type; max_logits and lse (s_q, h_q), float32, natural logarithms.

    q: (s_q, h_q, d). kv: (s_kv, h_kv, d), whose first d_v columns are the values. indices: int32 or int64 (s_q, h_kv or
    1, topk); -1, s_kv and all other numbers outside of kv count for nothing. Any h_q that h_kv divides, any topk.
    attn_sink: (h_q,), one logit more in every row's sum, which has no value: out is multiplied by
    1 / (1 + exp(attn_sink - lse)); lse is that without it. topk_length: int (s_q,), entries of each list that count.
    A query without keys has out = 0 and max_logits = lse = -inf (FlashMLA says lse = +inf).
    k_scale: kv is float8_e4m3fn, with these scales, (s_kv, h_kv) or (s_kv, h_kv, one for every 128 columns).

    No gradients, as there; `sparse_attention` has them. Raises WrongArgument and WrongTokens.
    """
    shaped("q", q, "(queries, heads, dim)")
    shaped("kv", kv, "(keys, kv heads, dim)")
    if k_scale is None:
        alike("q", q, kv=kv)
    divisible(q.shape[1], kv.shape[1], keys="kv")
    if q.shape[2] != kv.shape[2]:
        refuse_shape("kv", kv, f"one with {q.shape[2]} columns, as q has")
    shaped("indices", indices, "(queries, kv heads, topk)")
    with torch.no_grad():
        scale = number("sm_scale", sm_scale)
        engine = engine_of(q.dtype, q.shape[2], prefix("d_v", d_v, q.shape[2]), scale, backend)
        counts = None if topk_length is None else shaped("topk_length", topk_length, "queries").unsqueeze(0)
        given = GivenTokens("token_indices", indices.unsqueeze(0), counts)
        called = {"token_indices": "indices", "token_counts": "topk_length"}
        keys = kv.unsqueeze(0)
        inputs = (q.unsqueeze(0), keys, keys[..., :d_v])
        scales = {}
        if k_scale is not None:
            of_keys = k_scale.unsqueeze(0)
            scales = {"k_scale": of_keys, "v_scale": first_scales(of_keys, keys, d_v)}
        o, rows = given.attend(engine, inputs, (), scales, shared=True, called=called)
        out = with_sink(o, rows["lse"], attn_sink)
    return out[0], rows["row_max"][0].T.float(), rows["lse"][0].T.float()


def with_sink(o: Tensor, lse: Tensor, attn_sink: Tensor | None) -> Tensor:
    """o (B, S, H, D) of rows with one logit more, attn_sink (H,), that has no value; lse: (B, H, S) without it."""
    if attn_sink is None:
        return o
    heads = o.shape[2]
    if not isinstance(attn_sink, Tensor) or tuple(attn_sink.shape) != (heads,):
        got = tuple(attn_sink.shape) if isinstance(attn_sink, Tensor) else attn_sink
        instead = "Give one logit per head, or leave it out."
        raise WrongArgument(argument="attn_sink", got=got, expected=f"a tensor ({heads},)", instead=instead)
    if attn_sink.device != o.device:
        raise DeviceMismatch(argument="attn_sink", got=attn_sink.device, expected=o.device)
    # A row without keys is 0 whatever the sink is; -inf - -inf would be no number.
    above = torch.where(lse > float("-inf"), lse, 0.0) - attn_sink.to(lse.dtype)[:, None]
    return (o * torch.sigmoid(above).transpose(1, 2)[..., None]).to(o.dtype)

"""An engine over small shapes, its inputs and plain torch to compare with, for tests of the engine as a whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attn_engine import AttentionEngine, CustomIO, OnlineFunc, SymbolScalar, Var, meta_tensor

D = 16


def engine(dim_v: int = D, dtype: torch.dtype = torch.float32, **options: Any) -> AttentionEngine:
    return AttentionEngine([meta_tensor(None, None, None, d, dtype=dtype) for d in (D, D, dim_v)], **options)


def qkv(
    q_len: int = 50,
    kv_len: int | None = None,
    heads: int = 4,
    kv_heads: int = 2,
    dim_v: int = D,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    kv_len = q_len if kv_len is None else kv_len
    shapes = ((2, q_len, heads, D), (2, kv_len, kv_heads, D), (2, kv_len, kv_heads, dim_v))
    q, k, v = (torch.randn(s, **options) for s in shapes)
    return q, k, v


def causal(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return kv_idx <= q_idx


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    modify: Callable[[Tensor], Tensor],
    visible: Tensor | None = None,
) -> Tensor:
    """Plain torch, (batch, length, heads, dim) like the engine."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    s = modify(q @ k.mT * scale)
    if visible is not None:
        s = s.masked_fill(~visible, float("-inf"))
    return (torch.softmax(s, -1) @ v).transpose(1, 2)


def assert_same_gradients(built: Tensor, wanted: Tensor, wrt: list[Tensor], tolerance: float = 2e-5) -> None:
    weights = torch.randn_like(built)
    torch.testing.assert_close(built, wanted, rtol=tolerance, atol=tolerance)
    got = torch.autograd.grad(built, wrt, weights)
    want = torch.autograd.grad(wanted, wrt, weights)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=tolerance, atol=tolerance * max(1.0, w.abs().max().item()))


class SeedSoftmax(OnlineFunc):
    """A class body as the seed's scripts write it: symbols, static methods, natural logarithm."""

    def __init__(self) -> None:
        online_rowscales = {"m": SymbolScalar("m", Var("-inf")), "r": SymbolScalar("r", Var("0.0"))}
        final_rowscales = {"lse": SymbolScalar("lse", Var("0.0"))}
        super().__init__(online_rowscales, final_rowscales, CustomIO())

    @staticmethod
    def online_fwd(scores: Any, online_rowscales: Any, b: Any, h: Any, q_idx: Any) -> Any:
        m, r = online_rowscales["m"], online_rowscales["r"]
        m_new = m.max(scores.get_reduce("max"))
        scale_tmp = (m - m_new).exp()
        r = r * scale_tmp
        scores = (scores - m_new).exp()
        r = r + scores.get_reduce("sum")
        return scores, {"m": m_new, "r": r}, scale_tmp

    @staticmethod
    def online_fwd_epilogue(o: Any, online_rowscales: Any, b: Any, h: Any, q_idx: Any) -> Any:
        o_new = o / online_rowscales["r"]
        lse = online_rowscales["r"].log() + online_rowscales["m"]
        return o_new, {"lse": lse}

    @staticmethod
    def forward(scores: Any, final_rowscales: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return (scores - final_rowscales["lse"]).exp()

    @staticmethod
    def backward(
        dp: Any, scores: Any, final_rowscales: Any, doosum: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any
    ) -> Any:
        return (dp - doosum) * scores


class DerivedSoftmax(OnlineFunc):
    """The same without forward and backward: both are derived."""

    def __init__(self) -> None:
        super().__init__({"m": float("-inf"), "r": 0.0}, {"lse": 0.0})

    online_fwd = staticmethod(SeedSoftmax.online_fwd)
    online_fwd_epilogue = staticmethod(SeedSoftmax.online_fwd_epilogue)

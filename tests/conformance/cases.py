"""What the suite computes: every normaliser, mask and score function, as the engine's arguments and as dense formulas.

The formulas are written from the definitions in plain float64 torch and share no code with the package.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

WINDOW, CAP, PREFIX = 100, 5.0, 37

# (scores, visible) -> weights; scores (B, H, Sq, Skv) float64, visible broadcastable to it
Normaliser = Callable[[Tensor, Tensor], Tensor]


def softmax(s: Tensor, visible: Tensor) -> Tensor:
    some = visible.any(-1, keepdim=True)
    hidden = s.masked_fill(~visible, float("-inf")).masked_fill(~some, 0.0)
    return torch.softmax(hidden, -1) * visible * some


def sigmoid(s: Tensor, visible: Tensor) -> Tensor:
    return torch.sigmoid(s) * visible


def relu(s: Tensor, visible: Tensor) -> Tensor:
    return torch.relu(s) * visible


def retention(s: Tensor, visible: Tensor) -> Tensor:
    s = s * visible
    return s / s.abs().sum(-1, keepdim=True).clamp(min=1.0)


NORMALISERS: dict[str, Normaliser] = {
    "softmax": softmax,
    "sigmoid": sigmoid,
    "relu": relu,
    "retention": retention,
}


@dataclass(frozen=True)
class Context:
    """Sizes of a case and its captured tensors."""

    batches: int
    heads: int
    q_len: int
    kv_len: int
    tensors: dict[str, Tensor]

    @property
    def q(self) -> Tensor:
        return torch.arange(self.q_len)[:, None]

    @property
    def kv(self) -> Tensor:
        return torch.arange(self.kv_len)[None, :]


@dataclass(frozen=True)
class Variant:
    """One mask or score function: the user's way of writing it, the dense way, and the tensors it captures."""

    name: str
    score_mod: Callable[[dict[str, Tensor]], Callable] | None = None
    mask_mod: Callable[[dict[str, Tensor]], Callable] | None = None
    dense_score: Callable[[Tensor, Context], Tensor] | None = None
    dense_mask: Callable[[Context], Tensor] | None = None
    tensors: Callable[[int, int, int, int], dict[str, Tensor]] = lambda *_: {}
    learned: tuple[str, ...] = ()


def _causal(_: dict[str, Tensor]) -> Callable:
    return lambda b, h, q_idx, kv_idx: q_idx >= kv_idx


def _window(_: dict[str, Tensor]) -> Callable:
    return lambda b, h, q_idx, kv_idx: (q_idx >= kv_idx) & (q_idx - kv_idx < WINDOW)


def _document(t: dict[str, Tensor]) -> Callable:
    doc_q, doc_kv = t["doc_q"], t["doc_kv"]
    return lambda b, h, q_idx, kv_idx: doc_q[q_idx] == doc_kv[kv_idx]


def _prefix(_: dict[str, Tensor]) -> Callable:
    return lambda b, h, q_idx, kv_idx: (kv_idx <= q_idx) | (kv_idx < PREFIX)


def _alibi(t: dict[str, Tensor]) -> Callable:
    slopes = t["slopes"]
    return lambda score, b, h, q_idx, kv_idx: score - slopes[h] * abs(kv_idx - q_idx)


def _soft_cap(_: dict[str, Tensor]) -> Callable:
    return lambda score, b, h, q_idx, kv_idx: CAP * torch.tanh(score / CAP)


def _relative(t: dict[str, Tensor]) -> Callable:
    table = t["table"]
    offset = 255
    return lambda score, b, h, q_idx, kv_idx: score + table[h, q_idx - kv_idx + offset]


def _pair_bias(t: dict[str, Tensor]) -> Callable:
    bias = t["bias"]
    return lambda score, b, h, q_idx, kv_idx: score + bias[h, q_idx, kv_idx]


VARIANTS: dict[str, Variant] = {
    v.name: v
    for v in (
        Variant("none"),
        Variant("causal", mask_mod=_causal, dense_mask=lambda c: c.q >= c.kv),
        Variant("window", mask_mod=_window, dense_mask=lambda c: (c.q >= c.kv) & (c.q - c.kv < WINDOW)),
        Variant(
            "document",
            mask_mod=_document,
            dense_mask=lambda c: c.tensors["doc_q"][:, None] == c.tensors["doc_kv"][None, :],
            tensors=lambda b, h, q, kv: {
                "doc_q": torch.arange(q, dtype=torch.int32) // 33,
                "doc_kv": torch.arange(kv, dtype=torch.int64) // 33,
            },
        ),
        Variant("prefix", mask_mod=_prefix, dense_mask=lambda c: (c.kv <= c.q) | (c.kv < PREFIX)),
        Variant(
            "alibi",
            score_mod=_alibi,
            dense_score=lambda s, c: s - c.tensors["slopes"][:, None, None] * (c.kv - c.q).abs(),
            tensors=lambda b, h, q, kv: {"slopes": 2.0 ** -torch.arange(1.0, h + 1)},
            learned=("slopes",),
        ),
        Variant("soft_cap", score_mod=_soft_cap, dense_score=lambda s, c: CAP * torch.tanh(s / CAP)),
        Variant(
            "relative_bias",
            score_mod=_relative,
            dense_score=lambda s, c: s + c.tensors["table"][:, c.q - c.kv + 255],
            tensors=lambda b, h, q, kv: {"table": torch.randn(h, 511)},
            learned=("table",),
        ),
        Variant(
            "learned_bias",
            score_mod=_pair_bias,
            dense_score=lambda s, c: s + c.tensors["bias"],
            tensors=lambda b, h, q, kv: {"bias": torch.randn(h, q, kv)},
            learned=("bias",),
        ),
    )
}


def dense_attention(
    normaliser: str, variant: Variant, q: Tensor, k: Tensor, v: Tensor, scale: float, context: Context
) -> Tensor:
    """o (B, H, Sq, Dv) from q (B, H, Sq, D), k, v (B, Hkv, Skv, ...), all float64; differentiable."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    s = q @ k.mT * scale
    if variant.dense_score is not None:
        s = variant.dense_score(s, context)
    visible = torch.ones(context.q_len, context.kv_len, dtype=torch.bool)
    if variant.dense_mask is not None:
        visible = variant.dense_mask(context)
    return NORMALISERS[normaliser](s, visible.expand(s.shape)) @ v

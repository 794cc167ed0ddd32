"""Normalisers, score functions and learned biases, to be compared with plain softmax under the same causal mask."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attn_engine.frontend import OnlineFunc
from attn_engine.library import OnlineRelu, OnlineRetention, OnlineSigmoid

DECAY = 256.0


@dataclass(frozen=True, slots=True)
class Variant:
    """What is passed to the engine; learned: tensors that the score_mod reads and that get gradients."""

    score_mod: Callable[..., Any] | None = None
    online_func: OnlineFunc | None = None
    learned: tuple[Tensor, ...] = ()


def tanh_cap(length: int, heads: int) -> Variant:
    return Variant(lambda score, b, h, q_idx, kv_idx: 20 * torch.tanh(score / 20))


def exp_decay(length: int, heads: int) -> Variant:
    return Variant(lambda score, b, h, q_idx, kv_idx: score * torch.exp((kv_idx - q_idx) / DECAY))


def distance(length: int, heads: int) -> Variant:
    return Variant(lambda score, b, h, q_idx, kv_idx: score - 0.01 * (q_idx - kv_idx))


def head_bias(length: int, heads: int) -> Variant:
    bias = torch.randn(heads, requires_grad=True)
    return Variant(lambda score, b, h, q_idx, kv_idx: score + bias[h], learned=(bias,))


def distance_table(length: int, heads: int) -> Variant:
    table = torch.randn(2 * length - 1, requires_grad=True)
    return Variant(
        lambda score, b, h, q_idx, kv_idx: score + table[q_idx - kv_idx + (length - 1)], learned=(table,)
    )


def pair_bias(length: int, heads: int) -> Variant:
    bias = torch.randn(length, length, requires_grad=True)
    return Variant(lambda score, b, h, q_idx, kv_idx: score + bias[q_idx, kv_idx], learned=(bias,))


VARIANTS: dict[str, Callable[[int, int], Variant]] = {
    "sigmoid": lambda length, heads: Variant(online_func=OnlineSigmoid()),
    "relu": lambda length, heads: Variant(online_func=OnlineRelu()),
    "retention": lambda length, heads: Variant(online_func=OnlineRetention()),
    "distance penalty": distance,
    "tanh soft-cap": tanh_cap,
    "exp decay": exp_decay,
    "head bias (H,)": head_bias,
    "table[q - kv + c]": distance_table,
    "pair bias (S, S)": pair_bias,
}

# What a variant computes, per pair of a query and a key, that plain softmax does not.
MORE_WORK = {
    "sigmoid": "a division; no row maximum, no row sum",
    "relu": "less: no exponential",
    "retention": "less: no exponential; sums of absolute values",
    "distance penalty": "a multiplication and an addition",
    "tanh soft-cap": "a tanh; backward its derivative too",
    "exp decay": "a second exponential",
    "head bias (H,)": "an addition; backward a sum over all pairs",
    "table[q - kv + c]": "a load along a diagonal; backward a sum per diagonal",
    "pair bias (S, S)": "reads S x S numbers; backward a sum over the heads, S x S numbers written",
}

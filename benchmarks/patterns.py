"""The attentions that are measured: masks and score functions, in a form that flex_attention takes as well."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

NAMES = ("full", "causal", "window 512", "documents", "causal documents", "soft-cap", "alibi")
MOST_HEADS = 32
# Where seven documents of uneven lengths end, as parts of the whole length.
DOCUMENT_ENDS = (0.05, 0.2, 0.3, 0.55, 0.6, 0.85)
WINDOW = 512


@dataclass(frozen=True, slots=True)
class Pattern:
    """A score_mod and a mask_mod; sdpa: by what means scaled_dot_product_attention computes the same, if it can."""

    score_mod: Callable[..., Any] | None = None
    mask_mod: Callable[..., Any] | None = None
    sdpa: Literal["nothing", "is_causal", "mask", "bias", "cannot"] = "mask"


def documents(length: int) -> Tensor:
    """The number of its document for each position. (length,)"""
    ends = torch.tensor(DOCUMENT_ENDS) * length
    return torch.bucketize(torch.arange(length).float(), ends).int()


def causal(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return kv_idx <= q_idx


def window(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return (kv_idx <= q_idx) & (q_idx - kv_idx < WINDOW)


def soft_cap(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return 20 * torch.tanh(score / 20)


def pattern(name: str, length: int) -> Pattern:
    """One of NAMES, for sequences of `length`."""
    slopes = 2.0 ** -torch.arange(1.0, MOST_HEADS + 1)
    document = documents(length)

    def same_document(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return document[q_idx] == document[kv_idx]

    def past_of_document(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return (document[q_idx] == document[kv_idx]) & (kv_idx <= q_idx)

    def alibi(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return score - slopes[h] * (q_idx - kv_idx)

    return {
        "full": Pattern(sdpa="nothing"),
        "causal": Pattern(mask_mod=causal, sdpa="is_causal"),
        "window 512": Pattern(mask_mod=window),
        "documents": Pattern(mask_mod=same_document),
        "causal documents": Pattern(mask_mod=past_of_document),
        "soft-cap": Pattern(soft_cap, causal, sdpa="cannot"),
        "alibi": Pattern(alibi, causal, sdpa="bias"),
    }[name]


@cache
def visible_pairs(name: str, queries: int, keys: int) -> int:
    """How many pairs of a query and a key the pattern's mask lets through, per batch and head."""
    if name == "full":
        return queries * keys
    assert queries == keys, "only the full pattern is measured with fewer queries than keys"
    lengths = torch.bincount(documents(keys)).tolist()
    return {
        "window 512": sum(min(q_idx + 1, WINDOW) for q_idx in range(queries)),
        "documents": sum(n * n for n in lengths),
        "causal documents": sum(n * (n + 1) // 2 for n in lengths),
    }.get(name, queries * (queries + 1) // 2)

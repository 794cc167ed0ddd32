"""Section 4b: masks, through a BlockMask."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from attn_engine.conformance.entries import Make, Table
from attn_engine.conformance.scores import both, integers

MASKS = Table()


def add(name: str, mask: Make, **what: Any) -> None:
    MASKS.add(name, "4b mask_mod", mask=mask, **{"block_size": 32, **what})


def all_of(*masks: Any) -> Any:
    """and_masks, written out, so that the table needs nobody's."""

    def every(b: Any, h: Any, q: Any, kv: Any) -> Any:
        result = b.new_ones((), dtype=torch.bool)
        for mask in masks:
            result = result & mask(b, h, q, kv)
        return result

    return every


def any_of(*masks: Any) -> Any:
    """or_masks, likewise."""

    def some(b: Any, h: Any, q: Any, kv: Any) -> Any:
        result = b.new_zeros((), dtype=torch.bool)
        for mask in masks:
            result = result | mask(b, h, q, kv)
        return result

    return some


def causal(b: Any, h: Any, q: Any, kv: Any) -> Any:
    return q >= kv


def window(b: Any, h: Any, q: Any, kv: Any) -> Any:
    return (q - kv).abs() <= 12


def first_keys(b: Any, h: Any, q: Any, kv: Any) -> Any:
    return kv < 5


add("everything", lambda: lambda b, h, q, kv: q >= 0)
add("causal", lambda: causal)
add("inverse causal", lambda: lambda b, h, q, kv: q <= kv)
add("sliding window", lambda: window)
add("causal and window", lambda: all_of(causal, window))
add("all of no masks", lambda: all_of())
add("all of one mask", lambda: all_of(causal))
add("any of no masks", lambda: any_of())
add("any of three masks", lambda: any_of(first_keys, window, all_of(causal, lambda b, h, q, kv: kv % 7 == 0)))
add(
    "documents",
    lambda doc: lambda b, h, q, kv: doc[q] == doc[kv],
    tensors=integers(doc=lambda s: torch.arange(s.q_len) // 17),
)
add(
    "documents, causal",
    lambda doc: lambda b, h, q, kv: (doc[q] == doc[kv]) & (q >= kv),
    tensors=integers(doc=lambda s: torch.arange(s.q_len) // 17),
)
add(
    "documents, clamped number",
    lambda doc: lambda b, h, q, kv: doc[torch.clamp(q, 0, 40)] == doc[torch.clamp(kv, 0, 40)],
    tensors=integers(doc=lambda s: torch.arange(41) // 17),
)
add(
    "causal with an offset per batch",
    lambda offset: lambda b, h, q, kv: q + offset[b] >= kv,
    tensors=integers(offset=lambda s: torch.arange(s.batches) * 9 - 3),
    mask_batches=True,
)
add("head and tail keys", lambda: lambda b, h, q, kv: (kv < 25) | (kv >= 60))
add(
    "causal, flipped in odd batches",
    lambda: lambda b, h, q, kv: torch.where(b % 2 == 0, q >= kv, q <= kv),
    mask_batches=True,
)


def _padding(lengths: Tensor, b: Any, h: Any, q: Any, kv: Any) -> Any:
    return (q < lengths[b]) & (kv < lengths[b])


add(
    "padding by functools.partial",
    lambda lengths: functools.partial(_padding, lengths),
    tensors=integers(lengths=lambda s: torch.arange(s.batches) * 13 + 50),
    mask_batches=True,
)
add(
    "random dense mask",
    lambda keep: lambda b, h, q, kv: keep[b, h, q, kv],
    tensors=lambda s, g: {"keep": torch.rand(s.batches, s.heads, s.q_len, s.kv_len, generator=g) < 0.4},
    mask_batches=True,
    mask_heads=True,
)
add("dependent on the head", lambda: lambda b, h, q, kv: q - kv >= h * 10, mask_heads=True)


def _numbers() -> Any:
    start, end = 11, 47
    return lambda b, h, q, kv: (kv >= start) & (kv < end)


add("captured integers", _numbers)
add("nothing visible", lambda: lambda b, h, q, kv: q < 0)
add("rows without a key", lambda: lambda b, h, q, kv: (q >= kv) & (q % 3 != 1))
add(
    "mask and score_mod together",
    lambda doc, slope: lambda b, h, q, kv: doc[q] == doc[kv],
    score=lambda doc, slope: lambda score, b, h, q, kv: score * 0.5 - slope[h] * (q - kv).abs(),
    tensors=both(
        integers(doc=lambda s: torch.arange(s.q_len) // 17),
        lambda s, g: {"slope": torch.rand(s.heads, generator=g)},
    ),
    learned=("slope",),
)

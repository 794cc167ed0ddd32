"""Masks: which keys a query sees."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from attn_engine.errors import WrongArgument
from attn_engine.frontend import MaskMod


def causal(offset: int = 0) -> MaskMod:
    """Each query sees the keys up to its own position plus `offset` (Vaswani et al., arXiv:1706.03762, section 3.2.3).

    With fewer queries than keys, offset = len(keys) - len(queries) aligns the two ends.
    """
    if offset == 0:

        def causal_mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
            return kv_idx <= q_idx

        return causal_mask

    def shifted_causal_mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return kv_idx <= q_idx + offset

    return shifted_causal_mask


def sliding_window(window: int) -> MaskMod:
    """Each query sees itself and the `window` keys before it (Mistral 7B, arXiv:2310.06825, section 2)."""

    def sliding_window_mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        in_past = kv_idx <= q_idx
        in_window = q_idx - kv_idx <= window
        return in_past & in_window

    return sliding_window_mask


def prefix(length: int) -> MaskMod:
    """The first `length` keys are seen by all, the others causally (T5, arXiv:1910.10683, section 3.2.1)."""

    def prefix_mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return (kv_idx < length) | (kv_idx <= q_idx)

    return prefix_mask


def document(document_ids: torch.Tensor) -> MaskMod:
    """Keys of the query's own document in a packed sequence (T5, arXiv:1910.10683, section 2.4).

    document_ids: int tensor, one per position (length,), or per batch and position (batch, length).
    """
    if document_ids.ndim == 1:

        def document_mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
            return document_ids[q_idx] == document_ids[kv_idx]

        return document_mask

    def batched_document_mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return document_ids[b, q_idx] == document_ids[b, kv_idx]

    return batched_document_mask


def and_masks(*masks: MaskMod) -> MaskMod:
    """What every one of the masks lets through; of no masks, everything."""
    _check_callable(masks)

    def and_mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        visible = masks[0](b, h, q_idx, kv_idx) if masks else b.new_ones((), dtype=torch.bool)
        for mask in masks[1:]:
            visible = visible & mask(b, h, q_idx, kv_idx)
        return visible

    return and_mask


def or_masks(*masks: MaskMod) -> MaskMod:
    """What any of the masks lets through; of no masks, nothing."""
    _check_callable(masks)

    def or_mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        visible = masks[0](b, h, q_idx, kv_idx) if masks else b.new_zeros((), dtype=torch.bool)
        for mask in masks[1:]:
            visible = visible | mask(b, h, q_idx, kv_idx)
        return visible

    return or_mask


def not_mask(mask: MaskMod) -> MaskMod:
    """What the mask keeps back."""
    _check_callable((mask,))

    def inverted_mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return ~mask(b, h, q_idx, kv_idx)

    return inverted_mask


def _check_callable(masks: Iterable[object]) -> None:
    for i, mask in enumerate(masks):
        if not callable(mask):
            expected, instead = (
                "a mask: a function of (b, h, q_idx, kv_idx)",
                "Give mask_mods, one after the other.",
            )
            raise WrongArgument(argument=f"masks[{i}]", got=mask, expected=expected, instead=instead)

"""Masks made of masks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from attn_engine.errors import WrongArgument
from attn_engine.frontend import MaskMod


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

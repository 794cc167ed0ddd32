"""Checks of what an engine is made with."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor

from attn_engine.errors import UnknownLayout, UnknownOption, WrongArgument, WrongMeta
from attn_engine.frontend import MetaTensor, OnlineFunc
from attn_engine.masks.lists import BlockLists
from attn_engine.runtime.bind import LAYOUTS


def check_options(layout: str, unknown: dict[str, Any]) -> None:
    """Raise a typed error for an option that is unknown or that this version does not take."""
    known = "layout, backend, scale, block_mask, schedule, tune, tune_seconds"
    for option, value in unknown.items():
        raise UnknownOption(option=option, value=value, where="AttentionEngine", known=known)
    if layout not in LAYOUTS:
        raise UnknownLayout(layout=layout)


def three_metas(qkv_meta: Sequence[MetaTensor]) -> tuple[MetaTensor, MetaTensor, MetaTensor]:
    """The descriptions of q, k and v, once they fit each other."""
    metas = tuple(qkv_meta) if isinstance(qkv_meta, list | tuple) else ()
    if len(metas) != 3 or not all(isinstance(m, MetaTensor) for m in metas):
        raise WrongMeta(argument="qkv_meta", got=qkv_meta, expected="three meta_tensors, for q, k and v")
    q, k, v = metas
    if not q.dtype == k.dtype == v.dtype:
        raise WrongMeta(
            argument="dtype", got=(q.dtype, k.dtype, v.dtype), expected="one dtype for q, k and v"
        )
    if q.dim != k.dim:
        raise WrongMeta(argument="D", got=(q.dim, k.dim), expected="one head dimension for q and k")
    return q, k, v


def fixed_sizes(meta: MetaTensor) -> tuple[int | None, int | None, int | None]:
    """The sizes that a meta tensor fixes."""
    b, h, s = (size if isinstance(size, int) else None for size in meta.shape[:3])
    return b, h, s


def checked_scale(scale: object, default: float) -> float:
    """The scale as a float; raises WrongArgument for a tensor (it would get no gradient) and for what is no number."""
    if scale is None:
        return default
    if isinstance(scale, bool) or not isinstance(scale, numbers.Real):
        got = f"a tensor of shape {tuple(scale.shape)}" if isinstance(scale, Tensor) else scale
        instead = "Capture a learned or computed scale in a score_mod instead: `return score * scale`."
        raise WrongArgument(argument="scale", got=got, expected="a number", instead=instead)
    return float(scale)


def block_lists(block_mask: Any, masked: bool) -> BlockLists | None:
    """The lists of a block mask, which is one itself or gives one by `.lists()`; masked: the engine has a mask_mod."""
    if block_mask is None or isinstance(block_mask, BlockLists):
        return block_mask
    if not masked and getattr(block_mask, "mask_mod", None) is not None:
        expected = "a block mask without a mask_mod, as the engine has none"
        instead = (
            "Make the engine with mask_mod=block_mask.mask_mod: partial blocks are masked by the engine's."
        )
        raise WrongArgument(argument="block_mask", got=block_mask, expected=expected, instead=instead)
    found = block_mask.lists() if callable(getattr(block_mask, "lists", None)) else None
    if not isinstance(found, BlockLists):
        instead = "Make one with create_block_mask, or give BlockLists of attn_engine.masks.lists."
        raise WrongArgument(argument="block_mask", got=block_mask, expected="a block mask", instead=instead)
    return found


def checked_rule(rule: Any) -> OnlineFunc:
    """The normaliser, once it is one: an OnlineFunc, or its class where that needs no arguments."""
    if isinstance(rule, OnlineFunc) or (isinstance(rule, type) and issubclass(rule, OnlineFunc)):
        return cast(OnlineFunc, rule)
    instead = (
        "Derive a class from OnlineFunc, or take one of attn_engine.library, for example OnlineSoftmax()."
    )
    raise WrongArgument(argument="online_func", got=rule, expected="an OnlineFunc", instead=instead)

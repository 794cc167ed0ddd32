"""flex_attention: the function that FlexAttention's users call."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from attn_engine.errors import (
    DeviceMismatch,
    HeadDimMismatch,
    HeadsNotDivisible,
    NotATensor,
    ShapeMismatch,
    WrongRank,
)
from attn_engine.flex.auxiliary import AuxOutput, AuxRequest
from attn_engine.flex.block_masks import mask_of
from attn_engine.flex.graph import flex_in_graph, identity, known_to_dynamo
from attn_engine.flex.kernel_options import chosen_backend
from attn_engine.flex.mistakes import GroupsNotEnabled, WrongAuxRequest
from attn_engine.flex.noop import noop_mask
from attn_engine.flex.programs import SAVED_ROWS, Kind, bind_call
from attn_engine.flex.transforms import is_mapped, mapped, within_batch
from attn_engine.masks import BlockLists
from attn_engine.options import checked_scale
from attn_engine.runtime.call_checks import refuse_transforms
from attn_engine.runtime.operator import apply
from attn_engine.runtime.reference import reference

ScoreMod = Callable[..., Any]


def flex_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: ScoreMod | None = None,
    block_mask: Any = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    kernel_options: Mapping[str, Any] | None = None,
    *,
    return_aux: AuxRequest | None = None,
) -> Any:
    """softmax(mask(score_mod(query key^T * scale))) value, as `torch.nn.attention.flex_attention.flex_attention`.

    query: (B, H, Sq, D). key: (B, Hkv, Skv, D), value: (B, Hkv, Skv, Dv); with a block_mask their batch may be 1. Any
        strides; D and Dv of any size; float32, bfloat16, float16 or float64.
    score_mod: (score, b, h, q_idx, kv_idx) -> score. block_mask: torch's BlockMask or this package's; its mask acts
        after score_mod. scale: 1/sqrt(D) when None, and applied before score_mod. enable_gqa: allows H = n * Hkv.
    kernel_options: torch's keys are accepted (they are advice); BACKEND may name a backend of this package.
    return_lse (torch calls it deprecated): (out, lse). return_aux: (out, AuxOutput).

    Functions may be made anew at each call: kernels are found by what the functions compute. Captured numbers and
    tensors are those of the call; floating tensors that score_mod reads get gradients.
    Raises the typed errors of `attn_engine.errors`.
    """
    backend = chosen_backend(kernel_options)
    wanted = _wanted(return_lse, return_aux)
    query, key, value = _inputs(query, key, value, enable_gqa, block_mask is not None)
    mask_mod = lists = None
    if block_mask is not None:
        by_lists = backend != "reference" and not torch.compiler.is_compiling()
        mask_mod, lists = mask_of(block_mask, query, key, by_lists and not is_mapped(query, key, value))
    scale = checked_scale(scale, 1.0 / math.sqrt(max(query.shape[3], 1)))
    attention = Attention(score_mod, mask_mod, scale, backend, wanted.lse or wanted.max_scores, lists)
    out, rows = attention(query, key, value)
    if return_aux is not None:
        return out, AuxOutput(
            rows["lse"] if wanted.lse else None, rows["row_max"].detach() if wanted.max_scores else None
        )
    return (out, rows["lse"]) if return_lse else out


@dataclass(frozen=True, slots=True)
class Attention:
    """An attention without its tensors."""

    score_mod: ScoreMod | None
    mask_mod: Callable[..., Any] | None
    scale: float
    backend: str
    with_rows: bool
    lists: BlockLists | None = None

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The output and the row values by name."""
        if torch.compiler.is_compiling():
            return self._in_graph(query, key, value)
        if is_mapped(query, key, value):
            return self._mapped(query, key, value)
        refuse_transforms((query, key, value))
        functions = self.score_mod, self.mask_mod
        kind = Kind.of(query, value, self.backend)
        bound = bind_call(functions, kind, query, key, value, self.scale, self.lists)
        if self.backend == "reference":
            o, rows = reference(bound.program, query, key, value, bound.captured, bound.numbers)
            kept = torch.float64 if query.dtype is torch.float64 else torch.float32
            return o.to(query.dtype), {name: x.to(kept) for name, x in rows.items()}
        refuse_transforms(bound.captured.values())
        tensors = query, key, value, bound.captured
        o, rows = apply(bound.call, bound.key, *tensors, bound.numbers, bound.plans, self.with_rows)
        return o, bound.rows(rows)

    def _mapped(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The same under torch.func.vmap."""

        def run(query: Tensor, key: Tensor, value: Tensor, batches: int) -> tuple[Tensor, ...]:
            score_mod = within_batch(self.score_mod, batches, score=True)
            mask_mod = within_batch(self.mask_mod, batches, score=False)
            attention = replace(self, score_mod=score_mod, mask_mod=mask_mod, with_rows=True)
            o, rows = attention(query, key, value)
            return o, *(rows[name] for name in SAVED_ROWS)

        o, *rows = mapped(run, query, key, value)
        return o, dict(zip(SAVED_ROWS, rows, strict=True))

    def _in_graph(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The same while torch.compile traces the call."""
        known_to_dynamo()
        given = {
            "backend": self.backend,
            "score": "none" if self.score_mod is None else "",
            "mask": "none" if self.mask_mod is None else "",
        }
        score_mod = identity if self.score_mod is None else self.score_mod
        mask_mod = noop_mask if self.mask_mod is None else self.mask_mod
        o, *rows = flex_in_graph(query, key, value, score_mod, (mask_mod,), self.scale, given)
        return o, dict(zip(SAVED_ROWS, rows, strict=True))


def _wanted(return_lse: bool, return_aux: AuxRequest | None) -> AuxRequest:
    """Which row values are returned; raises WrongAuxRequest where the two ways of asking meet."""
    if return_aux is not None:
        if return_lse:
            raise WrongAuxRequest(got="return_lse and return_aux are both given")
        return AuxRequest(bool(return_aux.lse), bool(return_aux.max_scores))
    if return_lse and not torch.compiler.is_compiling():
        warnings.warn(
            "return_lse is deprecated, as in torch: use return_aux=AuxRequest(lse=True)",
            FutureWarning,
            stacklevel=3,
        )
    return AuxRequest(lse=return_lse)


def _inputs(
    query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool, has_mask: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """query, key and value once they fit each other, in autocast's dtype, keys repeated along a batch of 1."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not isinstance(x, Tensor):
            raise NotATensor(argument=name, got=type(x).__name__)
        if x.ndim != 4:
            layout = "(batch, heads, length, dim)"
            raise WrongRank(argument=name, got=x.ndim, shape=tuple(x.shape), expected=4, layout=layout)
        if x.device != query.device:
            raise DeviceMismatch(argument=name, got=x.device, expected=query.device)
    if key.shape[3] != query.shape[3]:
        got, expected = key.shape[3], query.shape[3]
        raise HeadDimMismatch(argument="key", got=got, expected=expected, reason="query and key share it")
    heads, kv_heads = query.shape[1], key.shape[1]
    if heads != kv_heads and (not enable_gqa or kv_heads == 0 or heads % kv_heads):
        if not enable_gqa:
            raise GroupsNotEnabled(heads=heads, kv_heads=kv_heads)
        raise HeadsNotDivisible(heads=heads, kv_heads=kv_heads)
    query, key, value = _autocast(query, key, value)
    if key.shape[0] != query.shape[0]:
        key, value = (_repeated(n, x, query.shape[0], has_mask) for n, x in (("key", key), ("value", value)))
    return query, key, value


def _repeated(name: str, x: Tensor, batches: int, has_mask: bool) -> Tensor:
    """x with its batch of 1 repeated, as torch allows where a block mask is given."""
    if x.shape[0] != 1 or not has_mask:
        reason = "query and key share the batch, or key's is 1 and there is a block_mask"
        expected = (batches, *x.shape[1:])
        raise ShapeMismatch(argument=name, got=tuple(x.shape), expected=expected, reason=reason)
    return x.expand(batches, -1, -1, -1)


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the dtype that torch.autocast asks for; float64 stays, as in torch."""
    device = tensors[0].device.type
    if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        x.to(dtype) if x.dtype.is_floating_point and x.dtype is not torch.float64 else x for x in tensors
    )

"""What the caches, the table and the places of `sparse_attention_pto` must be, before anything is written."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from attn_engine.errors import DeviceMismatch, NotATensor, ShapeMismatch
from attn_engine.library.arguments import at_least
from attn_engine.library.serving.prolog_checks import CACHES, Sizes, check_pto_operands
from attn_engine.runtime.paged_checks import CacheNotDifferentiable, WrongPages, check_table, first_wrong

_INSTEAD = "Nothing was written to a cache."


def check_call(
    operands: Mapping[str, Tensor], cache_index: Tensor, block_table: Tensor, act_seqs: Tensor, topk: int
) -> Sizes:
    """The sizes by name; raises a typed error, by name, for the first thing that is wrong.

    operands: the floating tensors by name, caches too.
    """
    at_least("topk", topk, 1)
    sizes = check_pto_operands(**operands)
    for name in CACHES:
        _check_memory(name, operands[name])
    for name, x in operands.items():
        if torch.is_grad_enabled() and x.requires_grad:
            raise CacheNotDifferentiable(argument=name)
    b, device = sizes["b"], operands["x"].device
    _check_integers("cache_index", cache_index, (b, sizes["s1"]), device)
    _check_integers("block_table", block_table, (b, None), device)
    _check_integers("act_seqs", act_seqs, (b,), device)
    _check_slots(cache_index, sizes)
    lengths = act_seqs.detach().to("cpu", torch.int64).clamp_min(0)
    check_table(block_table, lengths, sizes["block_size"], sizes["blocks"], "act_seqs", _INSTEAD)
    return sizes


def _check_integers(name: str, x: Tensor, shape: tuple[int | None, ...], device: torch.device) -> None:
    if not isinstance(x, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise NotATensor(argument=name, got=type(x).__name__)
    if x.dtype not in (torch.int32, torch.int64):
        _refuse(name, "its dtype", x.dtype, "torch.int32 or torch.int64")
    if x.device != device:
        raise DeviceMismatch(argument=name, got=x.device, expected=device)
    wanted = tuple(x.shape[i] if size is None and i < x.ndim else size for i, size in enumerate(shape))
    if tuple(x.shape) != wanted:
        expected = "(" + ", ".join("pages of one" if n is None else str(n) for n in shape) + ")"
        reason = "x has this batch" + (" and so many new tokens" if name == "cache_index" else "")
        raise ShapeMismatch(argument=name, got=tuple(x.shape), expected=expected, reason=reason)


def _check_memory(name: str, cache: Tensor) -> None:
    if any(size > 1 and stride == 0 for size, stride in zip(cache.shape, cache.stride(), strict=True)):
        _refuse(name, "it", "expanded (a stride of 0)", "a tensor with memory for every slot")


def _check_slots(cache_index: Tensor, sizes: Sizes) -> None:
    """Inside of the caches, and each written once; negative ones are left out."""
    room, s1 = sizes["blocks"] * sizes["block_size"], sizes["s1"]
    slots = cache_index.detach().to("cpu", torch.int64).flatten()
    if (i := first_wrong(slots >= room)) is not None:
        what, expected = f"element [{i // s1}, {i % s1}]", f"a slot of the caches, 0 to {room - 1}, or -1"
        _refuse("cache_index", what, int(slots[i]), expected)
    ordered, _ = slots[slots >= 0].sort()
    if (i := first_wrong(ordered[1:] == ordered[:-1])) is not None:
        what = "a slot that is written twice in one call"
        _refuse("cache_index", what, int(ordered[i]), "written once")


def _refuse(argument: str, what: str, got: object, expected: str) -> None:
    raise WrongPages(argument=argument, what=what, got=got, expected=expected, instead=_INSTEAD)

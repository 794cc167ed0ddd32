"""Keys and values in float8 with scales: the arguments k_scale and v_scale of a call, and what the numbers are."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from attn_engine.codegen.lower.scaled import COLUMNS_OF_SCALE as COLUMNS
from attn_engine.codegen.lower.scaled import SCALES
from attn_engine.errors import AttnEngineError, DeviceMismatch, NotATensor
from attn_engine.ir.ops import Storage
from attn_engine.runtime.strides import logical_view

ARGUMENTS = ("k_scale", "v_scale")
CACHE = Storage.FLOAT8
DTYPE = torch.float8_e4m3fn
CODES = torch.uint8  # its bytes


class WrongScales(AttnEngineError, ValueError):
    template = "{argument}: {what} is {got}, not {expected}."
    advice = (
        "Keys and values in float8_e4m3fn are numbers times scales: k_scale and v_scale, float32, of the shape of k "
        "and v but for the last dimension, which is left out (a scale for each row and head) or has one for every 128 "
        "columns."
    )


def scales_given(
    named: dict[str, Any], custom: Collection[str], k: Tensor, v: Tensor, layout: str
) -> dict[str, Tensor] | None:
    """Takes k_scale and v_scale out of a call's arguments: (B, H, rows, scales of a row) by the kernels' names; None
    where there are none. Raises WrongScales for what has another number of dimensions than its tensor, or one less.

    A custom input of the same name keeps it.
    """
    found = {n: named.pop(n) for n in ARGUMENTS if n in named and n not in custom}
    found = {n: x for n, x in found.items() if x is not None}
    if not found:
        return None
    for name in ARGUMENTS:
        if name not in found:
            _refuse(name, "it", "left out", "given beside the other one")
    return {
        kernel: _logical(name, found[name], x, layout)
        for name, kernel, x in zip(ARGUMENTS, SCALES, (k, v), strict=True)
    }


def _logical(name: str, scale: Any, x: Tensor, layout: str) -> Tensor:
    if not isinstance(scale, Tensor):
        raise NotATensor(argument=name, got=type(scale).__name__)
    rank = x.ndim if isinstance(x, Tensor) else scale.ndim  # pyright: ignore[reportUnnecessaryIsInstance]
    if scale.ndim not in (rank - 1, rank):
        _refuse(name, "its number of dimensions", scale.ndim, f"{rank - 1} or {rank}")
    return logical_view(scale if scale.ndim == rank else scale.unsqueeze(-1), layout)


def check_scales(k: Tensor, v: Tensor, tensors: Mapping[str, Tensor], layout: str) -> None:
    """Raise a typed error for the first thing that is wrong with the scales among a call's tensors, by the kernels'
    names; k and v were looked at before."""
    for name, kernel, x in zip(ARGUMENTS, SCALES, (k, v), strict=True):
        check_scale(name, tensors[kernel], x, layout)


def check_scale(name: str, scale: Tensor, x: Tensor, layout: str) -> None:
    """Raise a typed error for scales (B, H, rows, scales of a row) that do not belong to x."""
    rows = logical_view(x, layout)
    if scale.dtype is not torch.float32:
        _refuse(name, "its dtype", scale.dtype, torch.float32)
    if scale.device != x.device:
        raise DeviceMismatch(argument=name, got=scale.device, expected=x.device)
    blocks = -(-rows.shape[3] // COLUMNS)
    if scale.shape[:3] != rows.shape[:3] or scale.shape[3] not in (1, blocks):
        of_x = ", ".join(map(str, x.shape[:-1]))
        expected = f"({of_x}), or ({of_x}, {blocks})"
        shown = scale.transpose(1, 2) if layout == "bshd" else scale
        _refuse(name, "its shape", tuple(shown.shape[shown.ndim - x.ndim :]), expected)


def like_queries(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Stand-ins for k and v of q's type, for checks of shapes; raises WrongScales where they are not float8."""
    for name, x in (("k", k), ("v", v)):
        if not isinstance(x, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise NotATensor(argument=name, got=type(x).__name__)
        if x.dtype is not DTYPE:
            _refuse(name, "its dtype, beside k_scale and v_scale", x.dtype, DTYPE)
        if isinstance(q, Tensor) and x.device != q.device:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise DeviceMismatch(argument=name, got=x.device, expected=q.device)
    if not isinstance(q, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise NotATensor(argument="q", got=type(q).__name__)
    one = q.new_empty(1)
    return one.expand(k.shape), one.expand(v.shape)


def refuse_bare(k: Tensor, v: Tensor) -> None:
    """Raise WrongScales for keys and values in float8 of which nobody says what they mean."""
    for name, x in zip(ARGUMENTS, (k, v), strict=True):
        if isinstance(x, Tensor) and x.dtype is DTYPE:  # pyright: ignore[reportUnnecessaryIsInstance]
            _refuse(name, "it", "left out", f"given: {name[0]} is {DTYPE}")


def dequantised(x: Tensor, scale: Tensor, dtype: torch.dtype, columns: int = COLUMNS) -> Tensor:
    """x times its scales (..., 1) or (..., one for every 128 columns), in `dtype`: a copy, multiplied in float32 at
    least."""
    if scale.shape[-1] > 1:
        scale = scale.repeat_interleave(columns, -1)[..., : x.shape[-1]]
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    return (x.to(wide) * scale.to(wide)).to(dtype)


def numbers_of(codes: Tensor) -> Tensor:
    """What the bytes of float8 mean, float32, in new memory."""
    if not codes.is_cpu:
        return codes.view(DTYPE).float()
    return (
        _every_number().index_select(0, codes.flatten().int()).view(codes.shape)
    )  # three times as fast as .float()


@cache
def _every_number() -> Tensor:
    return torch.arange(256, dtype=CODES).view(DTYPE).float()


def _refuse(argument: str, what: str, got: object, expected: object) -> None:
    raise WrongScales(argument=argument, what=what, got=got, expected=expected)

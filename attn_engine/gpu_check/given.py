"""The inputs of a check: drawn for its name, and laid out as a case asks, with NaN around them where it says so."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from attn_engine.gpu_check.cases import Case, Tensors

# More than 32 bits of elements lie between two neighbours of such a layout, and less on a small check.
FAR, FAR_IF_SMALL = 2**31 + 64, 4096
_NOT_A_DOCUMENT = 2**30


@dataclass(frozen=True, slots=True)
class Given:
    """q, k, v, the gradient of the output and the captured tensors, on the device."""

    q: Tensor
    k: Tensor
    v: Tensor
    d_out: Tensor
    tensors: Tensors


def draw(case: Case, device: str, far: int = FAR) -> Given:
    """The same numbers on every device and for every backend. far: elements between distant neighbours."""
    generator = torch.Generator().manual_seed(zlib.crc32(str(case).encode()))
    s, dtype = case.sizes, getattr(torch, case.dtype)
    shapes = (
        (s.batches, s.heads, s.q_len, s.dim),
        (s.batches, s.kv_heads, s.kv_len, s.dim),
        (s.batches, s.kv_heads, s.kv_len, s.dim_v),
        (s.batches, s.heads, s.q_len, s.dim_v),
    )
    lay_out = LAYOUTS[case.layout]
    q, k, v, d_out = (lay_out(_normal(shape, dtype, generator, device), far) for shape in shapes)
    tensors = {name: x.to(device) for name, x in case.tensors(generator).items()}
    if case.layout in ("surrounded", "odd"):
        tensors = {name: _surrounded(x, 4) for name, x in tensors.items()}
    return Given(q, k, v, d_out, tensors)


_MOST_DRAWN = 2**26


def _normal(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator, device: str) -> Tensor:
    """Drawn on the CPU; where that would take minutes, one part that is repeated along the rows."""
    batches, heads, length, dim = shape
    drawn = min(length, max(1, _MOST_DRAWN // (batches * heads * dim)))
    x = torch.randn(batches, heads, drawn, dim, generator=generator).to(device, dtype)
    if drawn == length:
        return x
    return x.repeat(1, 1, -(-length // drawn), 1)[:, :, :length]


def _surrounded(x: Tensor, margin: int) -> Tensor:
    """x within a tensor that is `margin` larger on both sides of every dimension, NaN (or no document) around it."""
    strange = torch.nan if x.is_floating_point() else _NOT_A_DOCUMENT
    wide = torch.full([n + 2 * margin for n in x.shape], strange, dtype=x.dtype, device=x.device)
    inside = wide[tuple(slice(margin, margin + n) for n in x.shape)]
    return inside.copy_(x)


def _heads_inside(x: Tensor, far: int) -> Tensor:
    """(B, H, S, D) within (B, S, H, D)."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _every_other(x: Tensor, far: int) -> Tensor:
    """Neighbours along the last dimension two apart, NaN between them."""
    wide = torch.full((*x.shape[:3], 2 * x.shape[3]), torch.nan, dtype=x.dtype, device=x.device)
    return wide[..., ::2].copy_(x)


def _batches_apart(x: Tensor, far: int) -> Tensor:
    within = x[0].contiguous().stride()
    return _placed(x, (max(far, x[0].numel()), *within))


def _rows_apart(x: Tensor, far: int) -> Tensor:
    """The last row of a head begins `far` elements after the first."""
    row = max(x.shape[3], -(-far // max(1, x.shape[2] - 1)) // 8 * 8 + 8)
    head = row * x.shape[2]
    return _placed(x, (head * x.shape[1], head, row, 1))


def _placed(x: Tensor, strides: tuple[int, ...]) -> Tensor:
    """x at these strides, in memory that is reserved but hardly touched."""
    extent = 1 + sum((n - 1) * stride for n, stride in zip(x.shape, strides, strict=True))
    return torch.empty(extent, dtype=x.dtype, device=x.device).as_strided(x.shape, strides).copy_(x)


LAYOUTS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "contiguous": lambda x, far: x,
    "heads inside": _heads_inside,
    "surrounded": lambda x, far: _surrounded(x, 8),
    "odd": lambda x, far: _surrounded(x, 3),  # no row is aligned
    "every other": _every_other,
    "batches apart": _batches_apart,
    "rows apart": _rows_apart,
}

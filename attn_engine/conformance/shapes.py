"""Section 4c: shapes, strides, head groups and block sizes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attn_engine.conformance.entries import BASE, Entry, NotApplicable, Shape, Table

SHAPES = Table()


def add(name: str, **what: Any) -> None:
    """Causal attention from the end of the keys, unless something else is said."""
    causal: dict[str, Any] = {"mask": lambda: lambda b, h, q, kv: q >= kv}
    SHAPES.entries.append(Entry(name, what.pop("section", "4c shapes"), **{**causal, **what}))


def sized(**sizes: int) -> Shape:
    return replace(BASE, **sizes)


add("more keys than queries", shape=sized(q_len=40, kv_len=131))
add("more queries than keys", shape=sized(q_len=131, kv_len=40))
add("one query", shape=sized(q_len=1, kv_len=90), mask=lambda: lambda b, h, q, kv: kv < 77)
add("three queries", shape=sized(q_len=3, kv_len=90), mask=lambda: lambda b, h, q, kv: kv <= q + 87)
for length in (127, 128, 125, 131):
    add(f"length {length}", shape=sized(q_len=length, kv_len=length))
add("length 1023", shape=sized(batches=1, heads=2, kv_heads=2, q_len=1023, kv_len=1023))
add("shorter than a block", shape=sized(q_len=20, kv_len=20))
for size in (32, 64, 128, 256, (128, 256), (256, 128)):
    add(f"block size {size}", block_size=size, shape=sized(q_len=130, kv_len=130))
for batches in (3, 4, 5):
    add(f"keys of one batch for {batches}", shape=sized(batches=batches), mask_batches=True)
for heads, kv_heads in ((4, 2), (4, 1), (8, 2), (16, 4), (6, 2)):
    add(f"grouped queries {heads}:{kv_heads}", shape=sized(heads=heads, kv_heads=kv_heads))
add(
    "grouped queries with one query",
    shape=sized(heads=6, kv_heads=2, q_len=1),
    mask=lambda: lambda b, h, q, kv: kv >= h,
)
add("values narrower than keys", shape=sized(dim=32, dim_v=16))
add("values wider than keys", shape=sized(dim=16, dim_v=48))
for dim in (17, 24, 94, 121):
    add(f"head dimension {dim}", shape=sized(dim=dim, dim_v=dim))
for dim in (1, 3, 8):  # torch refuses them
    add(f"small head dimension {dim}", shape=sized(dim=dim, dim_v=dim), section="extra")
add("head dimensions 192 and 128", shape=sized(dim=192, dim_v=128, heads=2, kv_heads=2))
add("22720 batches of 3 heads", shape=Shape(22720, 3, 3, 2, 2, 16, 16))
add("a scale of its own", scale=0.37)
add("scale and score_mod", scale=0.37, score=lambda: lambda score, b, h, q, kv: torch.tanh(score) * 3)


def _transposed(x: Tensor) -> Tensor:
    """(B, H, S, D) within (B, S, H, D)."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _column_major(x: Tensor) -> Tensor:
    return x.mT.contiguous().mT


def _with_offset(x: Tensor) -> Tensor:
    wide = torch.full((*x.shape[:3], x.shape[3] + 5), float("nan"), dtype=x.dtype)
    wide[..., 3:-2] = x
    return wide[..., 3:-2]


def _every_other(x: Tensor) -> Tensor:
    wide = torch.full((x.shape[0], x.shape[1], 2 * x.shape[2], x.shape[3]), float("nan"), dtype=x.dtype)
    wide[:, :, ::2] = x
    return wide[:, :, ::2]


def _heads_outermost(x: Tensor) -> Tensor:
    return x.permute(1, 0, 2, 3).contiguous().permute(1, 0, 2, 3)


def _far_apart(x: Tensor) -> Tensor:
    """Batches more than 2**31 elements apart, in memory that is reserved but hardly touched."""
    step = 2**31 + 64
    try:
        wide = torch.empty((x.shape[0] - 1) * step + x[0].numel(), dtype=x.dtype)
    except RuntimeError as error:
        raise NotApplicable("the machine does not give out the addresses") from error
    far = wide.as_strided(x.shape, (step, *x[0].contiguous().stride()))
    far.copy_(x.detach())
    return far if not x.requires_grad else _Moved.apply(x, far)


class _Moved(torch.autograd.Function):
    """x, lying where `far` does."""

    @staticmethod
    def forward(ctx: Any, x: Any, far: Any) -> Any:
        return far.view_as(far)

    @staticmethod
    def backward(ctx: Any, d_far: Any) -> Any:
        return d_far, None


for view in (_transposed, _column_major, _with_offset, _every_other, _heads_outermost, _far_apart):
    add(f"inputs that lie {view.__name__.strip('_').replace('_', ' ')}", view=view)

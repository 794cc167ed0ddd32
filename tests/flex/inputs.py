"""What the tests of flex_attention call it with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

S, D = 20, 16
LONG = 40  # enough for the kernels of many rows, whatever the length


def qkv(batches: int = 1, heads: int = 2, length: int = S, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.randn(batches, heads, length, D, **options) for _ in range(3))  # pyright: ignore[reportReturnType]


def causal(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return q_idx >= kv_idx


def close(got: Tensor, want: Tensor, **tolerances: float) -> None:
    torch.testing.assert_close(got, want.to(got.dtype), **tolerances)

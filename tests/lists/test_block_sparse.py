"""Calls that give blocks as a mask or as indices, forward and backward, against dense formulas in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.lists.given import causal, closeness, drawn, engine, gradients, rows_visible, softmax_rows


@dataclass(frozen=True)
class Case:
    """heads: those of the mask, in terms of `shape` (batches, heads, kv heads)."""

    name: str
    shape: tuple[int, int, int] = (2, 4, 2)
    lengths: tuple[int, int] = (200, 200)
    sizes: tuple[int, int] = (32, 32)
    heads: int = 2
    mask: Any = causal
    density: float = 0.4
    dims: tuple[int, int] = (32, 32)


CASES = (
    Case("per kv head"),
    Case("per head", heads=4, lengths=(200, 333), sizes=(32, 64)),
    Case("one for all heads, no mask", heads=1, lengths=(130, 99), sizes=(64, 16), mask=None),
    Case("three heads to one, wide values", (1, 3, 1), (77, 190), (16, 32), 1, dims=(32, 48)),
    Case("equal heads", (1, 2, 2), (65, 65), (64, 64)),
    Case("everything", density=1.0, lengths=(129, 129)),
    Case("nothing", density=0.0, lengths=(70, 70)),
    Case("one query", (2, 8, 2), (1, 300), (16, 16), 2, None),
)
BACKENDS = ("torch", "cpu")


def mask_of(case: Case) -> Tensor:
    """(batches, heads, q blocks, kv blocks); the second row of blocks sees nothing."""
    rows, columns = (-(-n // size) for n, size in zip(case.lengths, case.sizes, strict=True))
    blocks = torch.rand(case.shape[0], case.heads, rows, columns) < case.density
    if case.density < 1:
        blocks[:, :, 1:2] = False
    return blocks


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_mask_of_blocks(case: Case, backend: str) -> None:
    x, blocks = drawn(case.shape, case.lengths, dims=case.dims), mask_of(case)
    found, rows = engine(backend, mask=case.mask, dims=case.dims)(
        *x.tensors, block_sparse_mask=blocks, block_size=case.sizes, return_final_rowscales=True
    )
    visible = rows_visible(blocks, case.sizes, case.lengths, case.shape[1], case.mask)
    o, lse = softmax_rows(*x.tensors, visible)
    closeness(
        (found, *gradients(found, x.weight, x.tensors)), (o, *gradients(o, x.weight, x.tensors)), found.dtype
    )
    torch.testing.assert_close(rows["lse"].double(), lse, atol=1e-5, rtol=1e-5)

"""The benchmark of sparse attention measures the same attention on all sides."""

from __future__ import annotations

import pytest
import torch

from benchmarks.sparse_cases import DIM, HEADS, KINDS, PARTS, density


@pytest.mark.slow
@pytest.mark.parametrize("part", KINDS)
def test_what_is_measured_is_what_the_mask_says(part: str) -> None:
    length = 700
    problem = PARTS[part](KINDS[part][-1], length // 64 * 64)
    length = length // 64 * 64
    q, k, v = (torch.randn(1, HEADS, length, DIM) for _ in range(3))
    own = [q, k, v] if problem.layout == "bhsd" else [x.transpose(1, 2) for x in (q, k, v)]
    out = problem.ours(*own)
    out = out if problem.layout == "bhsd" else out.transpose(1, 2)
    rows, heads = torch.arange(length), torch.arange(HEADS)[:, None, None]
    mask = problem.visible(0, heads, rows[:, None], rows)[None]
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask).nan_to_num(0.0)
    torch.testing.assert_close(out, want, atol=2e-6, rtol=2e-5)
    assert density(problem, length) == pytest.approx(float(mask.sum()) / (HEADS * length * (length + 1) / 2))

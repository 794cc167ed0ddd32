"""Scores of any size: offsets that dwarf the differences, padding by huge negative numbers, overflow's edge."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from attn_engine import AttentionEngine, meta_tensor

LOWEST = torch.finfo(torch.float32).min
# Each adds the same number to all scores of a row, exactly or far beyond what float32 resolves next to the scores.
OFFSETS: dict[str, tuple[Callable[..., Any], bool]] = {
    "none": (lambda s, b, h, q, kv: s, False),
    "4096": (lambda s, b, h, q, kv: s + 4096.0, True),
    "-1e10": (lambda s, b, h, q, kv: s - 1e10, True),
    "finfo.min in padded rows": (
        lambda s, b, h, q, kv: s + torch.where((q > 30) | (kv > 20), LOWEST, 0.0),
        True,
    ),
    "-1e9 in padded rows": (lambda s, b, h, q, kv: s + torch.where((q > 30) | (kv > 20), -1e9, 0.0), True),
}


@pytest.mark.parametrize("backend", ["cpu", "triton-interpreter"])
@pytest.mark.parametrize("name", OFFSETS)
def test_offsets(name: str, backend: str) -> None:
    """Against eager torch in float32: both see the same rounded scores, so nothing but the softmax can differ."""
    mod, rounds_scores = OFFSETS[name]
    metas = [meta_tensor(None, None, None, 32, dtype=torch.float32)] * 3
    engine = AttentionEngine(metas, score_mod=mod, scale=0.2, backend=backend)
    q, k, v = (torch.randn(1, 60, 2, 32) for _ in range(3))
    if rounds_scores:  # scores on a grid that the offset keeps
        q, k = q.round(), k.round() * 5
    inputs = [x.requires_grad_() for x in (q, k, v)]
    o, wanted = engine(*inputs), engine.reference(*inputs, dtype=torch.float32)
    torch.testing.assert_close(o, wanted, rtol=2e-5, atol=2e-5)
    weights = torch.randn_like(o)
    got, want = (torch.autograd.grad(x, inputs, weights) for x in (o, wanted))
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-4 * max(1.0, w.abs().max().item()))


@pytest.mark.parametrize("factor", [1e3, 1e9, 1e30])
def test_huge_scores_stay_finite(factor: float) -> None:
    metas = [meta_tensor(None, None, None, 32, dtype=torch.float32)] * 3
    engine = AttentionEngine(metas, score_mod=lambda s, b, h, q, kv: s * factor, scale=0.2)
    inputs = [torch.randn(1, 60, 2, 32, requires_grad=True) for _ in range(3)]
    o = engine(*inputs)
    torch.testing.assert_close(o, engine.reference(*inputs, dtype=torch.float32), rtol=1e-3, atol=1e-2)
    assert all(g.isfinite().all() for g in torch.autograd.grad(o, inputs, torch.randn_like(o)))

"""torch.utils.checkpoint around a call: what is kept for the backward pass is the same at every repetition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from attn_engine import AttentionEngine, library, meta_tensor

D = 16


@pytest.mark.parametrize("rule", [library.OnlineSoftmax, library.OnlineSigmoid])
@pytest.mark.parametrize("length", [1, 9])
def test_first_calls_and_later_ones_keep_the_same(rule: Any, length: int):
    built = AttentionEngine([meta_tensor(None, None, None, D, dtype=torch.float32)] * 3, online_func=rule())
    q, k, v = (torch.randn(1, length, 2, D, requires_grad=True) for _ in range(3))
    first = None
    for _ in range(3):  # the second call is the first one with a plan
        found = torch.autograd.grad(checkpoint(built, q, k, v, use_reentrant=False).sum(), (q, k, v))
        first = found if first is None else first
        assert all(map(torch.equal, found, first))
    wanted = torch.autograd.grad(built(q, k, v).sum(), (q, k, v))
    assert all(map(torch.equal, wanted, first or ()))

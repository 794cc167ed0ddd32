"""Block lists of packed sequences: each sequence has its own, counted from its first row."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from attn_engine import AttentionEngine, meta_tensor
from attn_engine.masks.lists import BlockLists, Side
from attn_engine.masks.plan import both_sides
from attn_engine.masks.rows import tensors_of
from attn_engine.runtime.cpu_compile import find_compiler
from tests.packed.programs import causal
from tests.packed.test_packed import bounds

CPU = "cpu" if find_compiler() is not None else "torch"
LENGTHS = [130, 0, 64, 65, 1, 33]


def lists_of(partial: torch.Tensor, full: torch.Tensor, block: int, rows: int) -> BlockLists:
    """bool (batches, heads, q blocks, kv blocks) as lists."""
    sides = [tensors_of(x.sum(-1).flatten(), x.nonzero()[:, 3], tuple(x.shape[:3])) for x in (partial, full)]
    return both_sides((block, block), (rows, rows), Side(*sides))


SHOWN = [(CPU, 2, 64), (CPU, 4, 16), ("torch", 4, 16), ("triton-interpreter", 2, 64)]
CASES = [
    pytest.param(*case, marks=() if case in SHOWN else pytest.mark.slow)
    for case in product((CPU, "torch", "triton-interpreter"), (1, 2, 4), (16, 64))
]


@pytest.mark.parametrize(("backend", "heads_of_lists", "block"), CASES)
def test_lists(backend: str, heads_of_lists: int, block: int, seed: int) -> None:
    torch.manual_seed(seed)
    count, blocks = len(LENGTHS), -(-max(LENGTHS) // block)
    drawn = torch.rand(count, heads_of_lists, blocks, blocks)
    lists = lists_of(drawn < 0.4, drawn > 0.8, block, max(LENGTHS))
    q, k, v = (torch.randn(sum(LENGTHS), n, 16, requires_grad=True) for n in (4, 2, 2))
    cu_len = bounds(LENGTHS)
    built = AttentionEngine(
        [meta_tensor(None, None, None, 16, dtype=torch.float32)] * 3, mask_mod=causal, backend=backend
    )
    o = built(q, k, v, cu_len_q=cu_len, block_mask=lists)

    wanted: list[torch.Tensor] = []
    for b, (i, n) in enumerate(zip(cu_len.tolist(), LENGTHS, strict=False)):
        s, x, y = (t[i : i + n].transpose(0, 1).double() for t in (q, k, v))
        kind = drawn[b].repeat_interleave(4 // heads_of_lists, 0)
        kind = kind.repeat_interleave(block, 1).repeat_interleave(block, 2)[:, :n, :n]
        seen = (kind > 0.8) | ((kind < 0.4) & torch.ones(n, n, dtype=torch.bool).tril())
        scores = s @ x.repeat_interleave(2, 0).mT * 0.25
        weights = scores.masked_fill(~seen, -1e300).softmax(-1) * seen
        wanted.append((weights @ y.repeat_interleave(2, 0)).transpose(0, 1))
    want = torch.cat(wanted)
    torch.testing.assert_close(o.double(), want, rtol=2e-5, atol=2e-5)
    again = built.reference(q, k, v, cu_len_q=cu_len, block_mask=lists)
    torch.testing.assert_close(again, want)
    weights = torch.randn_like(o)
    got = torch.autograd.grad(o, (q, k, v), weights)
    for g, w in zip(got, torch.autograd.grad(want, (q, k, v), weights.double()), strict=True):
        torch.testing.assert_close(g, w, rtol=2e-4, atol=5e-5)

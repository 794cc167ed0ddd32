"""The lightning indexer against its formula, for the shapes of serving."""

from __future__ import annotations

import pytest
import torch

from attn_engine.library import indexer_scores, lightning_indexer, mqa_logits
from tests.selection.oracle import check_by_margin, chosen, whole_numbers


def formula(query, key, weights, lengths_query, lengths_key, causal: bool = True) -> torch.Tensor:
    """I (b, 1, s1, s2), -inf where a query may not look and in queries that are not there."""
    dots = torch.einsum("bthd,bsd->bths", query.double(), key[:, :, 0].double()).relu()
    found = torch.einsum("bths,bth->bts", dots, weights.double())
    for b, (n, m) in enumerate(zip(lengths_query, lengths_key, strict=True)):
        t, s = torch.arange(query.shape[1])[:, None], torch.arange(key.shape[1])
        seen = (s < m) & (t < n)
        found[b].masked_fill_(~(seen & (s <= t + m - n) if causal else seen), -torch.inf)
    return found[:, None]


@pytest.mark.parametrize("s1", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_paged_keys(s1, dtype):
    lengths = torch.tensor([100, s1, 0, 257], dtype=torch.int32)
    query, key = whole_numbers(4, s1, 8, 16, dtype=dtype), whole_numbers(4, 257, 1, 16, dtype=dtype)
    weights = whole_numbers(4, s1, 8, dtype=dtype)
    pages = torch.randperm(40)[: 4 * 9].view(4, 9)
    cache = torch.full((40, 32, 1, 16), torch.nan, dtype=dtype)
    for b, j in ((b, j) for b in range(4) for j in range(9)):
        rows = key[b, 32 * j : min(32 * (j + 1), int(lengths[b]))]
        cache[pages[b, j], : len(rows)] = rows
    table = pages.to(torch.int32).masked_fill(torch.arange(9) * 32 >= lengths[:, None], -1)
    found = lightning_indexer(query, cache, weights, None, lengths, table, sparse_count=24)
    want = chosen(formula(query, key, weights, [s1] * 4, lengths.tolist()), 24).transpose(1, 2)
    assert torch.equal(found, want)
    assert torch.equal(lightning_indexer(query, key, weights, None, lengths, sparse_count=24), want)


def test_drawn_numbers_lengths_of_queries_and_no_mask():
    query, key = torch.randn(2, 40, 16, 32), torch.randn(2, 90, 1, 32)
    weights = torch.randn(2, 40, 16)
    of_q, of_k = torch.tensor([40, 11]), torch.tensor([90, 55])
    for mode in (0, 3):
        importance = formula(query, key, weights, of_q.tolist(), of_k.tolist(), causal=mode == 3)
        found = lightning_indexer(query, key, weights, of_q, of_k, sparse_count=10, sparse_mode=mode)
        assert check_by_margin(found.transpose(1, 2), importance, 1e-4) > 60
        assert (found[1, 11:] == -1).all()
        scores = indexer_scores(query, key, weights, of_q, of_k, sparse_mode=mode, dtype=torch.float64)
        torch.testing.assert_close(scores, importance[:, 0])


def test_logits_of_ranges():
    q, k = torch.randn(7, 4, 16), torch.randn(20, 16)
    weights, scale = torch.randn(7, 4), torch.rand(20)
    first, end = torch.tensor([0, 0, 3, 5, 5, 9, 20]), torch.tensor([20, 1, 3, 6, 20, 30, 20])
    want = (torch.einsum("mhd,nd->mhn", q, k).relu() * weights[..., None]).sum(1) * scale
    position = torch.arange(20)
    seen = (position >= first[:, None]) & (position < end[:, None])
    want = want.masked_fill(~seen, -torch.inf)
    torch.testing.assert_close(mqa_logits(q, (k, scale), weights, first, end), want)
    alone = mqa_logits(q, k, weights, first, end)
    torch.testing.assert_close(alone * scale, want)

"""Pooled targets, and masks made of scores, against their formulas."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attn_engine import errors, library
from attn_engine.library import (
    attn_pooling,
    attn_pooling_2d,
    attn_pooling_qk_varlen,
    attn_pooling_qkv_varlen,
    attn_with_pooling,
    get_sparse_attn_mask_from_nz_ratio,
    get_sparse_attn_mask_from_threshold,
    get_sparse_attn_mask_from_threshold_grouped,
    get_sparse_attn_mask_from_token_budget,
)
from tests.library.seer_formulas import BLOCK, LENGTHS, by_blocks, cumulative, largest_weights, packed, sparse

MAX = max(LENGTHS) + 30
BLOCKS = -(-MAX // BLOCK)
CU = cumulative(LENGTHS)


def exact(q: Tensor, k: Tensor, scale: float) -> list[Tensor]:
    """R of every sequence."""
    parts = zip(q.detach().split(LENGTHS), k.detach().split(LENGTHS), strict=True)
    return [largest_weights(x, y, scale, BLOCK) for x, y in parts]


@pytest.mark.parametrize(
    ("group", "scale", "dtype"),
    [
        (1, 0.2, torch.float32),
        (4, 3.0, torch.float32),
        pytest.param(4, 0.2, torch.bfloat16, marks=pytest.mark.slow),
    ],
)
def test_targets(group: int, scale: float, dtype: torch.dtype) -> None:
    """Exact to float32, large scores too: the inputs are rounded, nothing after them."""
    q, k, _ = packed(2 * group, 2, dtype=dtype)
    both, rows = attn_pooling(q, k, CU, MAX, scale, BLOCK)
    assert not both.requires_grad and both.shape == (len(LENGTHS), 2 * group, BLOCKS, BLOCKS)
    for b, want in enumerate(exact(q, k, scale)):
        n = LENGTHS[b]
        assert rows[b].shape == (1, 2 * group, n, -(-n // BLOCK)) and rows[b].dtype == torch.float32
        torch.testing.assert_close(rows[b][0].double(), want, atol=1e-5, rtol=1e-5)
        assert (rows[b] <= 1.0).all()
        torch.testing.assert_close(both[b].double(), by_blocks(want, BLOCK, BLOCKS), atol=1e-5, rtol=1e-5)
        after = torch.arange(rows[b].shape[3])[None] > torch.arange(n)[:, None] // BLOCK
        assert not rows[b][:, :, after].any()
    torch.testing.assert_close(attn_pooling_2d(q, k, CU, MAX, scale, BLOCK), both)
    assert attn_pooling_qk_varlen is attn_pooling


def test_targets_of_a_group_as_the_gate_is_taught() -> None:
    q, k, _ = packed(4, 2)
    _, rows = attn_pooling(q, k, CU, MAX, 0.2, BLOCK)
    pooled = F.max_pool3d(rows[0], kernel_size=[2, 1, 1], stride=[2, 1, 1])
    want = exact(q, k, 0.2)[0].unflatten(0, (2, 2)).amax(1)
    torch.testing.assert_close(pooled[0].double(), want, atol=1e-5, rtol=1e-5)


def test_with_the_output() -> None:
    q, k, v = packed(4, 2)
    out, rows = attn_pooling_qkv_varlen(q, k, v, CU, MAX, 0.2, BLOCK)
    every = torch.ones(len(LENGTHS), 1, MAX, BLOCKS, dtype=torch.bool)
    want = sparse(q, k, v, every, 0.2, rows=1)[0]
    torch.testing.assert_close(out, want.float(), atol=2e-6, rtol=2e-5)
    weights = torch.randn_like(out)
    for one, other in zip(
        torch.autograd.grad(out, (q, k, v), weights),
        torch.autograd.grad(want, (q, k, v), weights.double()),
        strict=True,
    ):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=2e-4)
    assert rows.shape == (len(LENGTHS), 4, MAX, BLOCKS) and not rows.requires_grad
    for b, part in enumerate(exact(q, k, 0.2)):
        padded = F.pad(part, (0, BLOCKS - part.shape[2], 0, MAX - part.shape[1]))
        torch.testing.assert_close(rows[b].double(), padded, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("causal", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_dense(causal: bool) -> None:
    q, k, v = (torch.randn(2, h, 70, 32) for h in (4, 2, 2))
    out, both = attn_with_pooling(q, k, v, causal, 0.2, BLOCK)
    score = q.double() @ k.double().repeat_interleave(2, 1).mT * 0.2
    past = torch.ones(70, 70, dtype=torch.bool).tril()
    weights = (score.masked_fill(~past, -math.inf) if causal else score).softmax(-1)
    torch.testing.assert_close(
        out.double(), weights @ v.double().repeat_interleave(2, 1), atol=1e-5, rtol=1e-5
    )
    by_key = torch.stack([x.amax(-1) for x in weights.split(BLOCK, -1)], -1)
    want = torch.stack([x.amax(2) for x in by_key.split(BLOCK, 2)], 2)
    torch.testing.assert_close(both.double(), want / want.sum(-1, keepdim=True), atol=1e-5, rtol=1e-5)


def test_threshold() -> None:
    scores = torch.rand(2, 3, 5, 5)
    assert torch.equal(get_sparse_attn_mask_from_threshold(scores, 0.4), (scores > 0.4).tril())
    last = get_sparse_attn_mask_from_threshold(scores, 0.4, use_dense_for_last_block=True)
    assert last[:, :, -1].all() and torch.equal(last[:, :, :-1], (scores > 0.4).tril()[:, :, :-1])
    seen = torch.rand(2, 3, 5, 5) < 0.5
    assert torch.equal(get_sparse_attn_mask_from_threshold(scores, 0.4, seen), (scores > 0.4) & seen)
    of_queries = torch.rand(2, 3, 70, 5)
    assert torch.equal(get_sparse_attn_mask_from_threshold(of_queries, 0.4), of_queries > 0.4)


def test_threshold_of_sequences() -> None:
    rows = [torch.rand(1, 3, n, -(-n // BLOCK)) for n in LENGTHS]
    mask = get_sparse_attn_mask_from_threshold_grouped(rows, 0.3, MAX, BLOCK)
    assert mask.shape == (len(LENGTHS), 3, MAX, BLOCKS) and mask.dtype == torch.bool
    for b, one in enumerate(rows):
        inside = mask[b, :, : one.shape[2], : one.shape[3]]
        assert torch.equal(inside, one[0] > 0.3) and mask[b].sum() == inside.sum()
    assert torch.equal(
        get_sparse_attn_mask_from_threshold_grouped([x[0] for x in rows], 0.3, MAX, BLOCK), mask
    )


def test_shares_and_budgets() -> None:
    scores = torch.randperm(200).view(2, 1, 10, 10).float()
    for ratio, count in ((0.0, 1), (0.5, 2), (0.75, 5), (1.0, 10)):
        kept = get_sparse_attn_mask_from_nz_ratio(scores, ratio)
        largest = scores >= scores.sort(-1, descending=True).values[..., count - 1 : count]
        assert torch.equal(kept, largest.tril())
    budget = get_sparse_attn_mask_from_token_budget(scores, 4 * BLOCK, BLOCK)
    largest = scores >= scores.sort(-1, descending=True).values[..., 3:4]
    largest[..., -1] = True
    assert torch.equal(budget, largest)
    assert get_sparse_attn_mask_from_token_budget(scores, 10_000, BLOCK).all()


Q, K, _ = (x.detach() for x in packed(4, 2))
WRONG: dict[str, tuple[Any, str]] = {
    "rows of k": (lambda: attn_pooling(Q, K[1:], CU, MAX, 0.2, BLOCK), "k="),
    "heads": (lambda: attn_pooling(Q[:, :3], K, CU, MAX, 0.2, BLOCK), "heads of q"),
    "too long": (lambda: attn_pooling(Q, K, CU, 60, 0.2, BLOCK), "max_seqlen"),
    "the end": (lambda: attn_pooling(Q, K, CU[:-1], MAX, 0.2, BLOCK), "end of cu_seqlens"),
    "block": (lambda: attn_pooling(Q, K, CU, MAX, 0.2, 24), "block_size"),
    "scale": (lambda: attn_pooling(Q, K, CU, MAX, "0.2", BLOCK), "sm_scale"),  # type: ignore[arg-type]
    "values": (lambda: attn_pooling_qkv_varlen(Q, K, K[1:], CU, MAX, 0.2, BLOCK), "v="),
    "ratio": (lambda: get_sparse_attn_mask_from_nz_ratio(torch.rand(2, 2), 1.5), "nz_ratio"),
    "budget": (lambda: get_sparse_attn_mask_from_token_budget(torch.rand(2, 2), 0), "token_budget"),
    "no scores": (lambda: get_sparse_attn_mask_from_threshold_grouped([], 0.5, MAX, BLOCK), "x="),
    "blocks of scores": (
        lambda: get_sparse_attn_mask_from_threshold_grouped([torch.rand(2, 70, 4)], 0.5, MAX, BLOCK), r"x\[0\]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_mistakes_are_typed(name: str) -> None:
    call, text = WRONG[name]
    with pytest.raises(errors.AttnEngineError, match=text):
        call()


def test_the_names_of_the_paper() -> None:
    names = (
        "block_1d_gqa_sparse_attn_varlen_sim_func block_1d_gqa_sparse_attn_varlen_func attn_pooling "
        "block_2d_sparse_attn_varlen_func block_sparse_flash_decode_gqa_mask repeat_kv repeat_kv_varlen "
        "block_sparse_flash_decode_gqa_indice attn_pooling_qk_varlen"
    )
    assert set(names.split()) <= set(library.__all__)

"""The indexer's loss and its closed-form gradients against autograd of the formula in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attn_engine.errors import WrongArgument
from attn_engine.library import indexer_loss
from attn_engine.library.tokens import indexer_rows
from attn_engine.runtime import token_lists
from attn_engine.runtime.token_errors import WrongTokens
from tests.tokens.formulas import drawn


def formula(given: list[Tensor], visible: Tensor) -> Tensor:
    """(B, S); visible: bool (B, S, L)."""
    q, k, index_q, index_k, weights = (x.double() for x in given)
    scores = torch.einsum("bshd,blhd->bhsl", q, k.repeat_interleave(q.shape[2] // k.shape[2], 2)) * 0.5
    scores = scores.masked_fill(~visible[:, None], float("-inf"))
    p = scores.softmax(-1).nan_to_num(0.0).mean(1).detach()
    z = torch.einsum("bsjd,bld->bsjl", index_q, index_k[:, :, 0]) * index_q.shape[3] ** -0.5
    index_scores = (weights[..., None] * z.relu()).sum(2)
    log_q = index_scores.masked_fill(~visible, -1e30).log_softmax(-1)
    return (torch.xlogy(p, p) - p * torch.where(visible, log_q, 0.0)).sum(-1)


def tensors(rows: int, keys: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k, index_q, index_k, weights of 2 batches, 4 heads over 2, 3 index heads."""
    shapes = ((2, rows, 4, 8), (2, keys, 2, 8), (2, rows, 3, 6), (2, keys, 1, 6), (2, rows, 3))
    found = [torch.randn(x).to(dtype) for x in shapes]
    return [*found[:2], *(x.requires_grad_() for x in found[2:])]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(("rows", "keys"), [(9, 13), (13, 9)])
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_formula(
    dtype: torch.dtype, sparse: bool, rows: int, keys: int, reduction: str, seed: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """In pieces of a few rows; some rows see nothing."""
    torch.manual_seed(seed)
    monkeypatch.setattr(indexer_rows, "ROOM", 40)
    monkeypatch.setattr(token_lists, "PIECE", 200)
    given = tensors(rows, keys, dtype)
    indices = None
    visible = (torch.arange(keys) <= torch.arange(rows)[:, None] + keys - rows).expand(2, rows, keys)
    if sparse:
        indices = drawn(2, rows, 1, keys, 7, ragged=True)
        inside = torch.where((indices < 0) | (indices >= keys), keys, indices)[:, :, 0]
        visible = torch.zeros(2, rows, keys + 1, dtype=torch.bool).scatter_(2, inside, True)[..., :keys]
    if sparse:  # what nobody looks at
        unseen = ~visible.any(1)
        given[1][unseen] = given[3].data[unseen] = float("nan")
    loss = indexer_loss(*given, indices, sm_scale=0.5, reduction=reduction)
    arriving = torch.randn(loss.shape)
    found = torch.autograd.grad(loss, given[2:], arriving.to(loss.dtype))
    for x in (given[1], given[3].data):
        x.nan_to_num_(0.0)
    want = formula(given, visible)
    want = want.sum() if reduction != "none" else want
    want = want / visible.any(-1).sum() if reduction == "mean" else want
    limit = {"rtol": 2e-5, "atol": 2e-6} if dtype is torch.float32 else {"rtol": 1e-10, "atol": 1e-12}
    torch.testing.assert_close(loss.double(), want, **limit)
    for x, y in zip(found, torch.autograd.grad(want, given[2:], arriving.double()), strict=True):
        torch.testing.assert_close(x, y, **limit)


def test_half_precision_and_index_keys_without_heads(seed: int) -> None:
    torch.manual_seed(seed)
    given = tensors(9, 13, torch.bfloat16)
    loss = indexer_loss(*given[:3], given[3][:, :, 0], given[4], sm_scale=0.5)
    assert loss.dtype is torch.float32
    visible = (torch.arange(13) <= torch.arange(9)[:, None] + 4).expand(2, 9, 13)
    want = formula(given, visible).mean()
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-6)
    found, exact = (torch.autograd.grad(x, given[2:]) for x in (loss, want))
    for x, y in zip(found, exact, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-2, atol=1e-5)


def test_chosen_rows_that_are_all_are_the_warm_up(seed: int) -> None:
    torch.manual_seed(seed)
    given = tensors(6, 6, torch.float64)
    every = torch.arange(6).expand(2, 6, 6)
    causal = torch.where(every <= torch.arange(6)[:, None], every, -1)
    torch.testing.assert_close(indexer_loss(*given, causal), indexer_loss(*given))


@pytest.mark.parametrize("sparse", [False, True])
def test_same_bits_again(sparse: bool, seed: int) -> None:
    """And for any number of threads."""
    torch.manual_seed(seed)
    shapes = ((1, 100, 4, 64), (1, 300, 1, 64), (1, 100, 8, 32), (1, 300, 1, 32), (1, 100, 8))
    given = [torch.randn(x, requires_grad=True) for x in shapes]
    indices = drawn(1, 100, 1, 300, 64, ragged=True) if sparse else None
    threads, results = torch.get_num_threads(), list[tuple[Tensor, ...]]()
    try:
        for n in (1, 2, 2):
            torch.set_num_threads(n)
            loss = indexer_loss(*given, indices)
            results.append((loss, *torch.autograd.grad(loss, given[2:])))
    finally:
        torch.set_num_threads(threads)
    for found in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], found, strict=True))


def test_bad_arguments_are_named() -> None:
    given = dict(zip(("q", "k", "index_q", "index_k", "weights"), tensors(3, 5, torch.float32), strict=True))
    indices = torch.zeros(2, 3, 4, dtype=torch.int32)
    bad: list[tuple[str, dict[str, Any]]] = [
        ("k.shape", {"k": given["k"][:1]}),
        ("heads of q", {"q": given["q"][:, :, :3]}),
        ("index_q.shape", {"index_q": given["index_q"][:, :2]}),
        ("index_k.shape", {"index_k": given["index_k"][..., :4]}),
        ("weights.shape", {"weights": given["weights"][..., :2]}),
        ("reduction", {"reduction": "median"}),
        ("topk_length", {"topk_length": torch.ones(2, 3)}),
        ("indices.shape", {"indices": torch.zeros(2, 3, 2, 4, dtype=torch.int32)}),
        ("indices", {"indices": indices.float()}),
    ]
    for name, options in bad:
        with pytest.raises((WrongArgument, WrongTokens)) as found:
            indexer_loss(**{**given, **options})
        assert found.value.details["argument"] == name

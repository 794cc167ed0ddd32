"""Hash- and qk-sparse attention against dense formulas in float64 that share nothing with the engine."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attn_engine import errors
from attn_engine.library import (
    compact,
    dynamic_sparse_attention,
    hash_sparse_attention,
    hash_sparse_attention_kernel,
    pad_index,
    qk_sparse_attention,
    qk_sparse_attention_kernel,
    sort_bucketed_attention,
)
from attn_engine.library.sparse import buckets
from attn_engine.library.sparse.buckets import by_bucket, by_keep

HEADS = 2


def visible(mode: str, q_idx: Tensor, k_idx: Tensor, strict: bool = False) -> Tensor:
    """(B, H, Nq, Nk) pairs that attend."""
    q, k = q_idx.transpose(1, 2)[..., :, None], k_idx.transpose(1, 2)[..., None, :]
    kept = q == k if mode == "hash" else (q * k) != 0
    at = torch.arange(q_idx.shape[1])[:, None], torch.arange(k_idx.shape[1])
    return kept & (at[1] < at[0] if strict else at[1] <= at[0])


def dense(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, scale: float) -> Tensor:
    score = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()) * scale
    weights = torch.where(keep, score, -torch.inf).softmax(-1)
    weights = torch.where(keep.any(-1, keepdim=True), weights, 0.0)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v.double())


def tensors(
    n_q: int, n_k: int, dim: int = 16, dim_v: int = 16, batches: int = 2, **options: Any
) -> list[Tensor]:
    shapes = [(n_q, dim), (n_k, dim), (n_k, dim_v)]
    return [torch.randn(batches, n, HEADS, d, **options).requires_grad_() for n, d in shapes]


def indices(mode: str, lengths: tuple[int, int], count: int = 4, batches: int = 2) -> list[Tensor]:
    shapes = [(batches, n, HEADS) for n in lengths]
    if mode == "hash":
        return [torch.randint(-count, 0, s, dtype=torch.int32) for s in shapes]
    return [(torch.rand(s) > 0.6).float() for s in shapes]


def agrees(q: Tensor, k: Tensor, v: Tensor, q_idx: Tensor, k_idx: Tensor, mode: str, **options: Any) -> None:
    out = dynamic_sparse_attention(q, k, v, q_idx, k_idx, sparsity_mode=mode, **options)
    keep = visible(mode, q_idx, k_idx, options.get("causal") == "strict")
    want = dense(q, k, v, keep, options.get("sm_scale") or q.shape[-1] ** -0.5)
    torch.testing.assert_close(out, want.to(out.dtype), atol=2e-6, rtol=2e-5)
    assert torch.equal(
        out[~keep.any(-1).transpose(1, 2)], torch.zeros_like(out[~keep.any(-1).transpose(1, 2)])
    )
    weights = torch.randn_like(out)
    found = torch.autograd.grad(out, (q, k, v), weights)
    for one, other in zip(found, torch.autograd.grad(want, (q, k, v), weights.double()), strict=True):
        torch.testing.assert_close(one, other.to(one.dtype), atol=2e-5, rtol=2e-4)


@pytest.mark.parametrize("lengths", [(1, 1), (63, 63), (129, 128), (70, 200), (200, 70), (258, 258)])
@pytest.mark.parametrize("mode", ["hash", "qk"])
def test_against_the_formula(mode: str, lengths: tuple[int, int]) -> None:
    agrees(*tensors(*lengths), *indices(mode, lengths), mode)


@pytest.mark.parametrize("mode", ["hash", "qk"])
def test_scale_dimensions_and_strict_causality(mode: str) -> None:
    lengths = (90, 90)
    agrees(*tensors(*lengths, 16, 24), *indices(mode, lengths), mode, sm_scale=0.7, causal="strict")


@pytest.mark.parametrize("way", ["sequences", "one mask"])
@pytest.mark.parametrize("alike", [True, False])
def test_both_ways_over_sorted_buckets(way: str, alike: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Buckets of 0, 1 and many rows, some of queries or of keys alone, each with its own in every head."""
    monkeypatch.setattr(buckets, "FEWEST_ROWS", 0 if way == "sequences" else 10**6)
    monkeypatch.setattr(buckets, "MOST_PADDING", 100)
    q_idx, k_idx = ((torch.rand(2, 230, HEADS) ** 4 * 9).int() * 200_000_000 - 900_000_000 for _ in range(2))
    k_idx[:, :50] = 7
    agrees(*tensors(230, 230), q_idx, q_idx.clone() if alike else k_idx, "hash")


def test_sequences_are_for_buckets_of_many_rows() -> None:
    few, many = (torch.randint(0, n, (1, 400, HEADS), dtype=torch.int32) for n in (2, 300))
    assert by_bucket(few, few).worth_it and not by_bucket(many, many).worth_it
    one_large = torch.where(torch.rand(1, 400, HEADS) < 0.9, 0, many)
    assert by_bucket(one_large, few).columns >= 300  # of each of many sequences
    assert not by_bucket(one_large, few).worth_it


def test_rows_that_are_alike_need_no_positions() -> None:
    keep = (torch.rand(1, 90, HEADS) > 0.5).float()
    assert by_keep(keep, keep.clone()).alike and not by_keep(keep, 1 - keep).alike
    agrees(*tensors(90, 90, batches=1), keep, keep, "qk")


def test_the_slot_of_dropped_rows_takes_no_gradient_to_others() -> None:
    """The first row stands in it; a gradient of a dropped row's output must not reach it."""
    q, k, v = tensors(40, 40, batches=1)
    keep = torch.zeros(1, 40, HEADS)
    keep[:, ::3] = 1.0
    dropped = torch.ones_like(v) * (1 - keep)[..., None]
    for grad in torch.autograd.grad(
        dynamic_sparse_attention(q, k, v, keep, keep, sparsity_mode="qk"), (q, k, v), dropped
    ):
        assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    q, k, v = tensors(130, 130, dtype=dtype)
    q_idx, k_idx = indices("hash", (130, 130))
    out = dynamic_sparse_attention(q, k, v, q_idx, k_idx)
    want = dense(q, k, v, visible("hash", q_idx, k_idx), 0.25)
    assert out.dtype is dtype
    torch.testing.assert_close(out.double(), want, atol=3e-2, rtol=3e-2)


def test_buckets_of_keys_that_lie_elsewhere_than_those_of_queries() -> None:
    """Query blocks before a key block that no later query block attends to: their gradients must not be lost."""
    at = torch.arange(512)
    q_idx = (at < 256).int()[None, :, None].expand(1, 512, HEADS).contiguous()
    k_idx = (
        torch.where(at < 384, 2, (at >= 448).int())[None, :, None].expand(1, 512, HEADS).int().contiguous()
    )
    q, k, v = tensors(512, 512, batches=1)
    agrees(q, k, v, q_idx, k_idx, "hash")
    grad = torch.autograd.grad(hash_sparse_attention(q, k, v, q_idx, k_idx).sum(), v)[0]
    assert grad[:, 384:448].abs().sum() > 0


@pytest.mark.parametrize("dropped", ["queries", "keys", "both"])
def test_nothing_kept(dropped: str) -> None:
    q, k, v = tensors(50, 60)
    q_keep, k_keep = torch.ones(2, 50, HEADS), torch.ones(2, 60, HEADS)
    q_keep *= dropped == "keys"
    k_keep *= dropped == "queries"
    out = qk_sparse_attention(q, k, v, q_keep, k_keep, 0.3)
    assert torch.equal(out, torch.zeros_like(out)) and out.shape == q.shape
    for grad in torch.autograd.grad(out.sum(), (q, k, v)):
        assert torch.equal(grad, torch.zeros_like(grad))


def test_one_bucket_and_everything_kept_are_causal_attention() -> None:
    q, k, v = tensors(100, 100)
    want = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), is_causal=True
    )
    zeros = torch.zeros(2, 100, HEADS, dtype=torch.int64)
    torch.testing.assert_close(dynamic_sparse_attention(q, k, v, zeros, zeros), want.transpose(1, 2))
    kept = dynamic_sparse_attention(q, k, v, zeros + 1.0, zeros == 0, sparsity_mode="qk")
    torch.testing.assert_close(kept, want.transpose(1, 2))


def test_inputs_may_lie_anyhow() -> None:
    q, k, v = (
        x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in tensors(70, 70)
    )
    agrees(q, k, v, *(x.transpose(1, 2).contiguous().transpose(1, 2) for x in indices("qk", (70, 70))), "qk")


def test_compact_is_a_stable_descending_sort() -> None:
    keep = (torch.rand(3, 41, HEADS) > 0.4).float()
    x = torch.randn(3, 41, HEADS, 5, requires_grad=True)
    rows, index, counts = compact(keep, x)
    order = torch.sort(keep, dim=1, descending=True, stable=True).indices
    assert counts is not None and torch.equal(counts, keep.sum(1))
    assert index.dtype is torch.int64 and torch.equal(index, order[:, : int(counts.max())])
    assert torch.equal(rows, x.gather(1, index[..., None].expand(-1, -1, -1, 5)))
    (grad,) = torch.autograd.grad(rows.sum(), x)
    taken = torch.zeros(3, 41, HEADS).scatter(1, index, 1.0)
    assert torch.equal(grad, taken[..., None].expand_as(x))
    again, same, none = compact(keep, x, index)
    assert torch.equal(again, rows) and same is index and none is None
    assert torch.equal(compact(x, keep)[0], rows)  # pyright: ignore[reportArgumentType]


def test_pad_index() -> None:
    index = torch.arange(12).view(1, 6, 2)
    padded = pad_index(index, torch.tensor([[2.0, 6.0]]), 99)
    assert padded.dtype is torch.int32
    assert padded[0, :, 0].tolist() == [0, 2, 99, 99, 99, 99] and padded[0, :, 1].tolist() == [
        1,
        3,
        5,
        7,
        9,
        11,
    ]
    assert pad_index(index, torch.tensor([[0, 6]]))[0, 0].tolist() == [-1, 1]


def test_sorting_keeps_the_order_within_a_bucket() -> None:
    given = torch.randint(0, 3, (2, 40, HEADS))
    x = torch.randn(2, 40, HEADS, 4)
    rows, found, index = sort_bucketed_attention(x, given)
    for b in range(2):
        for h in range(HEADS):
            want = sorted(range(40), key=lambda i: (int(given[b, i, h]), i))
            assert index[b, :, h].tolist() == want
            assert torch.equal(rows[b, :, h], x[b, want, h]) and torch.equal(
                found[b, :, h], given[b, want, h]
            )


def test_kernels_by_themselves() -> None:
    q, k, v = (x.transpose(1, 2) for x in tensors(30, 30))
    at = torch.arange(30, dtype=torch.int32).expand(2, HEADS, 30).contiguous()
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(qk_sparse_attention_kernel(q, k, v, at, at, 0.25), want)
    same = torch.zeros_like(at)
    torch.testing.assert_close(hash_sparse_attention_kernel(q, k, v, at, at, same, same), want)


def test_both_names_of_buckets() -> None:
    q, k, v = tensors(40, 40)
    a, b = indices("hash", (40, 40))
    named = hash_sparse_attention(q, k, v, q_bucket_idx=a, k_bucket_idx=b, sm_scale=0.25)
    assert torch.equal(named, hash_sparse_attention(q, k, v, a, b, 0.25))


Q, K, V = (x.detach() for x in tensors(8, 9))
ONES = torch.ones(2, 8, HEADS), torch.ones(2, 9, HEADS)
INTS = ONES[0].int(), ONES[1].int()
WRONG: dict[str, tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = {
    "mode": ((Q, K, V, *INTS), {"sparsity_mode": "hsah"}, KeyError, "hsah"),
    "float buckets": ((Q, K, V, *ONES), {}, errors.WrongArgument, "q_hash"),
    "integer keep": ((Q, K, V, ONES[0], INTS[1]), {"sparsity_mode": "qk"}, errors.WrongArgument, "k_keep"),
    "fractional keep": (
        (Q, K, V, ONES[0] * 0.5, ONES[1]),
        {"sparsity_mode": "qk"},
        errors.FractionalKeep,
        "0.5",
    ),
    "shape": ((Q, K, V, INTS[1], INTS[1]), {}, errors.WrongArgument, "q_hash"),
    "no buckets": ((Q, K, V, INTS[0], None), {}, errors.WrongArgument, "k_hash"),
    "large bucket": ((Q, K, V, INTS[0] * 2_000_000_000, INTS[1]), {}, errors.WrongArgument, "1e9"),
    "causality": ((Q, K, V, *INTS), {"causal": "no"}, errors.WrongArgument, "strict"),
}


@pytest.mark.parametrize("name", WRONG)
def test_mistakes_are_typed(name: str) -> None:
    arguments, options, error, text = WRONG[name]
    with pytest.raises(error, match=text) as found:
        dynamic_sparse_attention(*arguments, **options)
    assert isinstance(found.value, errors.AttnEngineError)

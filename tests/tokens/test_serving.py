"""Lists of tokens with the signatures of FlashMLA and of Ascend's operators."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attn_engine.errors import WrongArgument
from attn_engine.library import (
    flash_mla_sparse_fwd,
    flash_mla_with_kvcache,
    sparse_attention,
    sparse_flash_attention,
)
from attn_engine.runtime.cpu_compile import find_compiler
from attn_engine.runtime.token_errors import WrongTokens
from tests.tokens.formulas import attend, drawn

CPU = "cpu" if find_compiler() is not None else "torch"
CLOSE = {"rtol": 3e-5, "atol": 3e-5}


@pytest.mark.parametrize("heads", [3, pytest.param(128, marks=pytest.mark.slow)])
def test_flash_mla_sparse_fwd(heads: int, seed: int) -> None:
    torch.manual_seed(seed)
    q, kv = torch.randn(6, heads, 24), torch.randn(40, 1, 24)
    indices, counts = drawn(1, 6, 1, 40, 30, ragged=True), torch.tensor([[30, 0, 7, 30, 30, 30]])
    poisoned = kv.clone()
    poisoned[[u for u in range(40) if u not in indices]] = float("nan")
    sinks = torch.randn(heads)
    out, largest, lse = flash_mla_sparse_fwd(
        q, poisoned, indices[0].int(), 0.5, 16, sinks, counts[0].int(), backend=CPU
    )
    keys = kv[None]
    want, want_lse = attend(q[None], keys, keys[..., :16], indices, 0.5, counts=counts)
    factor = torch.where(want_lse.isinf(), 0.0, torch.sigmoid(want_lse - sinks[:, None].double()))
    want = want * factor.transpose(1, 2)[..., None]
    torch.testing.assert_close(out.double(), want[0], **CLOSE)
    torch.testing.assert_close(lse.double(), want_lse[0].T, **CLOSE)
    for s in range(6):
        tokens = [u for u in indices[0, s, 0, : counts[0, s]].tolist() if 0 <= u < 40]
        scores = (kv[tokens, 0] @ q[s].T * 0.5) if tokens else torch.full((1, heads), float("-inf"))
        torch.testing.assert_close(largest[s], scores.max(0).values, **CLOSE)


def test_flash_mla_with_indices(seed: int) -> None:
    """Places in the cache, whatever the page table says; rows that nobody names are NaN."""
    torch.manual_seed(seed)
    cache, q = torch.randn(5, 8, 1, 24), torch.randn(2, 2, 3, 24)
    slots, counts, sinks = drawn(2, 2, 1, 40, 9, ragged=True), torch.tensor([9, 4]), torch.randn(3)
    cache.view(40, 24)[[u for u in range(40) if u not in slots]] = float("nan")
    nothing = torch.zeros(2, dtype=torch.int32)
    out, lse = flash_mla_with_kvcache(
        q, cache, None, nothing, 16, softmax_scale=0.5,
        indices=slots[:, :, 0].int(), topk_length=counts, attn_sink=sinks, backend=CPU,
    )  # fmt: skip
    keys = cache.view(1, 40, 1, 24).expand(2, -1, -1, -1)
    want, want_lse = attend(q, keys, keys[..., :16], slots, 0.5, counts=counts[:, None].expand(2, 2))
    want = want * torch.sigmoid(want_lse - sinks[:, None]).transpose(1, 2)[..., None]
    torch.testing.assert_close(out.double(), want, **CLOSE)
    torch.testing.assert_close(lse.double(), want_lse, **CLOSE)


def test_sink_beside_all_keys(seed: int) -> None:
    """A sink needs no list; -inf is none, and a row without keys stays 0."""
    torch.manual_seed(seed)
    cache, q = torch.randn(2, 16, 1, 24), torch.randn(2, 1, 3, 24)
    lengths, sinks = torch.tensor([16, 0], dtype=torch.int32), torch.tensor([float("-inf"), 0.5, 40.0])
    given = (q, cache, None, lengths, 16)
    plain, lse = flash_mla_with_kvcache(*given, backend="torch")
    out, again = flash_mla_with_kvcache(*given, attn_sink=sinks, backend="torch")
    assert torch.equal(lse, again)
    assert torch.equal(out[:, :, 0], plain[:, :, 0])
    assert torch.equal(out[1], torch.zeros_like(out[1]))
    share = torch.sigmoid(lse[0, 1, 0] - sinks[1])
    torch.testing.assert_close(out[0, 0, 1], plain[0, 0, 1] * share)
    assert out[0, 0, 2].abs().max() < 1e-10


def latent_call(rows: int, page: int) -> tuple[dict[str, Any], Tensor, Tensor]:
    """Arguments of `sparse_flash_attention` over two caches in shuffled pages, all else NaN, and o and lse."""
    lengths = [37, 0, rows, 11]
    pages, topk, free = -(-37 // page) + 1, 20, torch.randperm(4 * (-(-37 // page) + 1)).tolist()
    caches = [torch.full((len(free), page, 1, n), float("nan")) for n in (16, 8)]
    table = torch.full((4, pages), 2147480000, dtype=torch.int32)
    keys, chosen = torch.randn(4, 37, 1, 24), torch.full((4, rows, 1, topk), -1)
    for b, length in enumerate(lengths):
        used = -(-length // page)
        table[b, :used] = torch.tensor([free.pop() for _ in range(used)])
        for s in range(rows):
            seen = max(0, length - rows + 1 + s)
            chosen[b, s, 0, : min(topk, seen)] = torch.randperm(seen)[:topk]
        for u in set(chosen[b].flatten().tolist()) - {-1}:
            for cache, x in zip(caches, keys[b, u].split((16, 8), 1), strict=True):
                cache[table[b, u // page], u % page] = x
    q = torch.randn(4, rows, 3, 24)
    given = {
        "query": q[..., :16], "query_rope": q[..., 16:], "key": caches[0], "value": caches[0], "key_rope": caches[1],
        "sparse_indices": chosen.int(), "scale_value": 0.4, "block_table": table,
        "actual_seq_lengths_kv": torch.tensor(lengths, dtype=torch.int32), "return_softmax_lse": True,
    }  # fmt: skip
    return given, *attend(q, keys, keys[..., :16], chosen, 0.4)


@pytest.mark.parametrize(
    ("rows", "page", "backend"), [(2, 8, CPU), (1, 16, "torch"), (3, 1, "torch"), (4, 16, CPU)]
)
def test_sparse_flash_attention(rows: int, page: int, backend: str, seed: int) -> None:
    torch.manual_seed(seed)
    given, want, want_lse = latent_call(rows, page)
    out, lse = sparse_flash_attention(**given, backend=backend)
    torch.testing.assert_close(out.double(), want, **CLOSE)
    torch.testing.assert_close(lse.double(), want_lse, **CLOSE)


def test_queries_see_up_to_themselves(seed: int) -> None:
    """All keys named: mode 3 hides later ones, and two queries at once are two steps; 0 hides none."""
    torch.manual_seed(seed)
    q, k = torch.randn(2, 2, 3, 24), torch.randn(2, 12, 1, 24)
    every = torch.arange(12).expand(2, 2, 1, 12)
    lengths = torch.tensor([12, 7])
    given: dict[str, Any] = {"actual_seq_lengths_kv": lengths, "backend": CPU}
    out = sparse_flash_attention(q, k, None, every, 0.4, **given)
    want, _ = attend(q, k, k, every, 0.4, limits=[[11, 12], [6, 7]])
    torch.testing.assert_close(out.double(), want, **CLOSE)
    for s in range(2):
        one = {**given, "actual_seq_lengths_kv": lengths - 1 + s}
        step = sparse_flash_attention(q[:, s : s + 1], k, None, every[:, :1], 0.4, **one)
        torch.testing.assert_close(step, out[:, s : s + 1], rtol=1e-5, atol=1e-6)
    of_queries = torch.tensor([2, 1])
    out = sparse_flash_attention(q, k, None, every, 0.4, actual_seq_lengths_query=of_queries, **given)
    want, _ = attend(q, k, k, every, 0.4, limits=[[11, 12], [7, 0]])
    torch.testing.assert_close(out.double(), want, **CLOSE)
    out = sparse_flash_attention(q, k, None, every, 0.4, sparse_mode=0, **given)
    want, _ = attend(q, k, k, every, 0.4, limits=[[12, 12], [7, 7]])
    torch.testing.assert_close(out.double(), want, **CLOSE)


def test_absorbed_as_unabsorbed(seed: int) -> None:
    """Up-projections moved to the queries and behind the output change nothing, for the same tokens."""
    torch.manual_seed(seed)
    heads, nope, rope, latent, dv = 3, 12, 8, 16, 10
    rows, rotated = torch.randn(2, 40, 1, latent), torch.randn(2, 40, 1, rope)
    q_nope, q_rope = torch.randn(2, 3, heads, nope), torch.randn(2, 3, heads, rope)
    up_k, up_v = (torch.randn(heads, latent, n) / latent**0.5 for n in (nope, dv))
    indices, scale = drawn(2, 3, 1, 40, 11, ragged=True), (nope + rope) ** -0.5
    absorbed = torch.einsum("bqhn,hln->bqhl", q_nope, up_k)
    out = sparse_flash_attention(
        absorbed, rows, rows, indices, scale, query_rope=q_rope, key_rope=rotated, sparse_mode=0, backend=CPU
    )
    found = torch.einsum("bqhl,hlv->bqhv", out, up_v)
    k = torch.cat((torch.einsum("bkxl,hln->bkhn", rows, up_k), rotated.expand(-1, -1, heads, -1)), -1)
    v = torch.einsum("bkxl,hlv->bkhv", rows, up_v)
    want, _ = attend(torch.cat((q_nope, q_rope), -1), k, v, indices, scale)
    torch.testing.assert_close(found.double(), want, rtol=2e-4, atol=2e-5)


def test_gradients_reach_both_caches(seed: int) -> None:
    torch.manual_seed(seed)
    shapes = ((2, 3, 3, 16), (2, 40, 1, 16), (2, 3, 3, 8), (2, 40, 1, 8))
    q, k, q_rope, k_rope = given = [torch.randn(x, requires_grad=True) for x in shapes]
    indices = drawn(2, 3, 1, 40, 11, ragged=True)
    o = sparse_flash_attention(
        q, k, k, indices, 0.4, query_rope=q_rope, key_rope=k_rope, sparse_mode=0, backend=CPU
    )
    want, _ = attend(torch.cat((q, q_rope), -1), torch.cat((k, k_rope), -1), k, indices, 0.4)
    weights = torch.randn(o.shape)
    found = torch.autograd.grad(o, given, weights)
    for x, y in zip(found, torch.autograd.grad(want, given, weights.double()), strict=True):
        torch.testing.assert_close(x, y, **CLOSE)


def test_bad_arguments_are_named() -> None:
    q, k = torch.zeros(2, 1, 3, 16), torch.zeros(2, 8, 1, 16)
    indices = torch.zeros(2, 1, 1, 4, dtype=torch.int32)
    good: dict[str, Any] = {"query": q, "key": k, "value": k, "sparse_indices": indices, "scale_value": 1.0}
    bad: list[tuple[str, dict[str, Any]]] = [
        ("key.shape", {"key": k[:1], "value": None}),
        ("key.shape", {"key": k[..., :8], "value": None}),
        ("value.dtype", {"value": k.double()}),
        ("value.shape", {"value": k[:, :4]}),
        ("key_rope", {"query_rope": q}),
        ("key_rope.shape", {"query_rope": q, "key_rope": k[..., :8]}),
        ("heads of query", {"query": q[:, :, :1], "key": k.expand(2, 8, 2, 16), "value": None}),
        ("sparse_block_size", {"sparse_block_size": 64}),
        ("sparse_mode", {"sparse_mode": 1}),
        ("sparse_indices", {"sparse_indices": indices[:1]}),
        ("actual_seq_lengths_kv", {"actual_seq_lengths_kv": torch.tensor([9, 1])}),
        ("actual_seq_lengths_query", {"actual_seq_lengths_query": torch.tensor([2, 1])}),
    ]
    for name, options in bad:
        with pytest.raises((WrongArgument, WrongTokens)) as found:
            sparse_flash_attention(**{**good, **options}, backend=CPU)
        assert found.value.details["argument"] == name
    wrong: list[tuple[str, dict[str, Any]]] = [
        ("attn_sink", {"attn_sink": torch.zeros(2)}),
        ("d_v", {"d_v": 17}),
        ("kv.dtype", {"kv": k[0].double()}),
        ("topk_length", {"topk_length": torch.zeros(2, dtype=torch.int32)}),
    ]
    for name, options in wrong:
        given: dict[str, Any] = {"q": q[0], "kv": k[0], "indices": indices[0], "sm_scale": 1.0, "d_v": 16}
        with pytest.raises((WrongArgument, WrongTokens)) as found:
            flash_mla_sparse_fwd(**{**given, **options}, backend=CPU)
        assert found.value.details["argument"] == name
    with pytest.raises(WrongArgument):
        sparse_attention(q, k, indices, k, dim_v=8)

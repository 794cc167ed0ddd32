"""Lists of tokens over caches in float8: rows become numbers where they are gathered, whoever runs the kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attn_engine.errors import ShapeMismatch, WrongArgument
from attn_engine.library import (
    flash_mla_sparse_fwd,
    flash_mla_with_kvcache,
    pack_latent_bytes,
    sparse_attention,
    sparse_flash_attention,
    unpack_latent_bytes,
)
from attn_engine.runtime.cpu_compile import find_compiler
from attn_engine.runtime.gathered_rows import GatheredRows
from attn_engine.runtime.scaled import WrongScales, dequantised, numbers_of
from attn_engine.runtime.token_lists import Piece
from tests.serving.caches import filled
from tests.serving.test_float8 import engine, narrow

CPU = "cpu" if find_compiler() is not None else "torch"
BACKENDS = [CPU, pytest.param("triton-interpreter", marks=pytest.mark.slow)]
LENGTHS = [70, 0, 33]


def lists(lengths: Tensor, heads: int, topk: int, rows: int = 2) -> Tensor:
    """Positions in every sequence, invalid ones among them: a query of none, and one with a token twice."""
    n = len(lengths)
    found = (torch.rand(n, rows, heads, topk) * lengths[:, None, None, None].clamp(min=1)).to(torch.int32)
    found[torch.rand(found.shape) < 0.2] = -1
    found[0, 0, :, :3] = torch.tensor([2**31 - 1, -(2**31), int(lengths[0])], dtype=torch.int32)
    found[-1, -1] = -1
    found[0, 1, :, 3:5] = 7
    return found


@pytest.mark.parametrize("per_row", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_as_the_numbers_that_they_mean(backend: str, per_row: bool, seed: int) -> None:
    """In pages and in rows, K and V apart and V in K; everything around what is used is NaN, scales too."""
    torch.manual_seed(seed)
    cache, q = filled(LENGTHS, 16, 2, (136, 40)), torch.randn(3, 2, 4, 136)
    indices = lists(cache.lengths, 2, 12)
    (k, k_scale, k_rows), (v, v_scale, v_rows) = (narrow(x, per_row) for x in (cache.k_rows, cache.v_rows))
    options: dict[str, Any] = {"len_kv": cache.lengths, "return_lse": True, "backend": backend}
    found = sparse_attention(q, k, indices, v, k_scale=k_scale, v_scale=v_scale, **options)
    want = sparse_attention(q, k_rows, indices, v_rows, **options)
    for x, y in zip(found, want, strict=True):
        torch.testing.assert_close(x, y, rtol=2e-5, atol=2e-5)
    pages = [narrow(x, per_row) for x in (cache.k, cache.v)]
    scales = {"k_scale": pages[0][1], "v_scale": pages[1][1]}
    for _ in range(2):
        paged = sparse_attention(
            q, pages[0][0], indices, pages[1][0], block_table=cache.table, **scales, **options
        )
        assert torch.equal(paged[0], found[0])
        assert torch.equal(paged[1], found[1])
    one = sparse_attention(q, k, indices, dim_v=128, k_scale=k_scale, **options)
    wide = sparse_attention(q, k_rows, indices, dim_v=128, **options)
    torch.testing.assert_close(one[0], wide[0], rtol=2e-5, atol=2e-5)


def test_a_call_of_an_engine(seed: int) -> None:
    """The same lists as arguments of an engine with a score_mod; and its dense definition."""
    torch.manual_seed(seed)
    cache, q = filled(LENGTHS, 16, 2, (64, 64)), torch.randn(3, 2, 4, 64).bfloat16()
    (k, k_scale, _), (v, v_scale, _) = (narrow(x, True) for x in (cache.k, cache.v))
    built = engine(
        (64, 64),
        torch.bfloat16,
        backend=CPU,
        score_mod=lambda s, b, h, q_idx, kv_idx: s * 0.5 + kv_idx * 0.01,
    )
    given: dict[str, Any] = {
        "token_indices": lists(cache.lengths, 2, 12), "len_kv": cache.lengths, "block_table": cache.table,
        "k_scale": k_scale, "v_scale": v_scale,
    }  # fmt: skip
    found, want = built(q, k, v, **given), built.reference(q, k, v, **given)
    torch.testing.assert_close(found.double(), want, rtol=2e-2, atol=2e-2)  # rows are rounded to bfloat16


@pytest.mark.parametrize("backend", [CPU, "triton-interpreter"])
def test_flash_mla_over_bytes(backend: str, seed: int) -> None:
    """FlashMLA's sparse decoding: 656 bytes a token, places in the cache, counts, a row of none, a sink."""
    torch.manual_seed(seed)
    rows = pack_latent_bytes(torch.randn(6, 16, 1, 512), torch.randn(6, 16, 1, 64))
    numbers = unpack_latent_bytes(rows, torch.float32)
    q = torch.randn(2, 2, 5, 576)
    indices = torch.randint(0, 80, (2, 2, 10), dtype=torch.int32)
    indices[0, 0, 2:5] = torch.tensor([-1, 96, 2**31 - 1])
    indices[1, 1] = -1
    rows.view(-1, 656)[80:] = 0x7F  # no numbers in codes, scales and rope
    options: dict[str, Any] = {
        "head_dim_v": 512, "softmax_scale": 0.05, "indices": indices, "topk_length": torch.tensor([10, 6]),
        "attn_sink": torch.randn(5), "backend": backend,
    }  # fmt: skip
    found = flash_mla_with_kvcache(q, rows, None, None, is_fp8_kvcache=True, **options)
    want = flash_mla_with_kvcache(q, numbers, None, None, **options)
    for x, y in zip(found, want, strict=True):
        torch.testing.assert_close(x, y, rtol=2e-5, atol=2e-5)
    assert not found[0][1, 1].any()
    again = flash_mla_with_kvcache(q, rows, None, None, is_fp8_kvcache=True, **options)
    assert torch.equal(again[0], found[0])
    with pytest.raises(ShapeMismatch, match="bytes of a token"):
        flash_mla_with_kvcache(q, rows[..., :640], None, None, is_fp8_kvcache=True, **options)


def test_the_other_signatures(seed: int) -> None:
    torch.manual_seed(seed)
    kv, scale, numbers = narrow(torch.randn(90, 1, 320), False)
    q, indices = torch.randn(7, 6, 320), torch.randint(-2, 92, (7, 1, 9), dtype=torch.int32)
    found = flash_mla_sparse_fwd(q, kv, indices, 0.1, 256, k_scale=scale, backend=CPU)
    for x, y in zip(found, flash_mla_sparse_fwd(q, numbers, indices, 0.1, 256, backend=CPU), strict=True):
        torch.testing.assert_close(x, y, rtol=2e-5, atol=2e-5)
    cache, query, rope = (
        filled(LENGTHS, 16, 1, (128, 32)),
        torch.randn(3, 2, 4, 128),
        torch.randn(3, 2, 4, 32),
    )
    key, key_scale, key_numbers = narrow(cache.k, True)
    value, value_scale, value_numbers = narrow(cache.v, True)
    given: dict[str, Any] = {
        "block_table": cache.table, "actual_seq_lengths_kv": cache.lengths, "backend": CPU,
        "query_rope": rope, "key_rope": cache.v,
    }  # fmt: skip
    chosen = lists(cache.lengths, 1, 12)
    found = sparse_flash_attention(query, key, None, chosen, 0.1, k_scale=key_scale, **given)
    want = sparse_flash_attention(query, key_numbers, None, chosen, 0.1, **given)
    torch.testing.assert_close(found, want, rtol=2e-5, atol=2e-5)
    scales = {"k_scale": key_scale, "v_scale": value_scale}
    found = sparse_flash_attention(query, key, value, chosen, 0.1, **scales, **given)
    want = sparse_flash_attention(query, key_numbers, value_numbers, chosen, 0.1, **given)
    torch.testing.assert_close(found, want, rtol=2e-5, atol=2e-5)
    wrong: list[tuple[dict[str, Any], type[Exception]]] = [
        ({}, WrongArgument),
        ({"k_scale": key_scale[..., :-1]}, WrongScales),
        ({"k_scale": key_scale.double()}, WrongScales),
    ]
    for options, error in wrong:
        with pytest.raises(error):
            sparse_flash_attention(query, key, None, chosen, 0.1, **options, **given)
    with pytest.raises(WrongScales):
        flash_mla_sparse_fwd(q, numbers, indices, 0.1, 256, k_scale=scale, backend=CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_gathered_numbers(dtype: torch.dtype, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows in any order, columns of two types side by side, converted some at a time; all bytes as torch reads them."""
    monkeypatch.setattr("attn_engine.runtime.gathered_rows.AT_ONCE", 1000)
    torch.manual_seed(seed)
    codes, scale, _ = narrow(torch.randn(3, 2, 20, 200), False)
    plain, rows = torch.randn(3, 2, 20, 8).bfloat16(), torch.randint(0, 60, (5, 9))
    gathered = GatheredRows((codes, plain), (scale, None), dtype)
    piece = Piece(slice(0, 5), slice(0, 2), slice(0, 2), rows, torch.full((5,), 9), rows.int(), True)
    both = torch.cat((dequantised(codes, scale, torch.float32).to(dtype), plain.to(dtype)), -1)
    want = both.transpose(1, 2).flatten(0, 1)[rows].transpose(1, 2)
    assert torch.equal(gathered.read(piece), want)
    every = torch.arange(256, dtype=torch.uint8)
    torch.testing.assert_close(
        numbers_of(every), every.view(torch.float8_e4m3fn).float(), rtol=0, atol=0, equal_nan=True
    )

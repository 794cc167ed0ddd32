"""Latent attention in the sizes of the models: 192/128 for training and prefills, 576/512 for absorbed decoding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attn_engine import AttentionEngine, CustomIO, meta_tensor
from attn_engine.library import causal, causal_with_offset, flash_mla_with_kvcache
from attn_engine.runtime.cpu_compile import find_compiler
from tests.serving.caches import attention, filled

CPU = "cpu" if find_compiler() is not None else "torch"
LENGTHS = [70, 0, 33]
OFFSET = CustomIO({"q_offset": ("batch",)})
SCALE = 192**-0.5 * 1.36889**2  # as DeepSeek's models with YaRN: no default would give it


def engine(backend: str, dtype: torch.dtype, **options: Any) -> AttentionEngine:
    metas = [meta_tensor(None, None, None, d, dtype=dtype) for d in (192, 192, 128)]
    return AttentionEngine(metas, scale=SCALE, backend=backend, **options)


def formula(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Causal attention in float64, aligned at the first token: o (B, S, H, Dv), lse (B, H, S)."""
    score = torch.einsum("bqhd,bkhd->bhqk", q, k) * SCALE
    seen = torch.ones(score.shape[-2:], dtype=torch.bool).tril()
    score = score.masked_fill(~seen, -torch.inf)
    return torch.einsum("bhqk,bkhd->bqhd", score.softmax(-1), v), score.logsumexp(-1)


def bound(found: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    """float32 by element; bfloat16 beside the tensor's norm, and no element out of all proportion."""
    if dtype is torch.float32:
        torch.testing.assert_close(found.double(), want, rtol=3e-5, atol=3e-5)
        return
    error, want = found.detach().double() - want.detach(), want.detach()
    assert float(error.norm()) <= 1e-2 * float(want.norm())
    assert float(error.abs().max()) <= 5e-2 * float(want.abs().max())


@pytest.mark.parametrize(
    ("backend", "tokens", "heads", "dtype"),
    [
        ("torch", 37, 3, torch.float32),
        *(
            pytest.param(CPU, tokens, heads, dtype, marks=pytest.mark.slow)
            for tokens, heads in ((1, 5), (67, 3), (131, 1), (257, 2))
            for dtype in (torch.float32, torch.bfloat16)
        ),
    ],
)
def test_training(backend: str, tokens: int, heads: int, dtype: torch.dtype, seed: int) -> None:
    """Output, lse and the gradients of all three, also through lse."""
    torch.manual_seed(seed)
    shapes = ((2, tokens, heads, 192), (2, tokens, heads, 192), (2, tokens, heads, 128))
    inputs = [torch.randn(x).to(dtype).requires_grad_() for x in shapes]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    o, rows = engine(backend, dtype, mask_mod=causal())(*inputs, return_final_rowscales=True)
    want, lse = formula(*exact)
    assert o.shape == want.shape and o.dtype is dtype
    bound(o, want, dtype)
    bound(rows["lse"], lse, dtype)
    d_o, d_lse = torch.randn(want.shape).to(dtype), torch.randn(lse.shape)
    found = torch.autograd.grad((o, rows["lse"]), inputs, (d_o, d_lse))
    for x, y in zip(
        found, torch.autograd.grad((want, lse), exact, (d_o.double(), d_lse.double())), strict=True
    ):
        bound(x, y, dtype)


@pytest.mark.parametrize(
    ("backend", "rows", "dtype"),
    [
        ("torch", 19, torch.float32),
        *(
            pytest.param(CPU, rows, dtype, marks=pytest.mark.slow)
            for rows in (2, 33, 65)
            for dtype in (torch.float32, torch.bfloat16)
        ),
    ],
)
def test_a_prefill_in_pages(backend: str, rows: int, dtype: torch.dtype, seed: int) -> None:
    """The last queries of every sequence over unabsorbed keys in a cache; contiguous rows give the same bits."""
    torch.manual_seed(seed)
    heads = 3
    cache, q = filled(LENGTHS, 16, heads, (192, 128), dtype), torch.randn(3, rows, heads, 192).to(dtype)
    built = engine(backend, dtype, mask_mod=causal_with_offset(), custom_fwd_inputs=OFFSET)
    offset = cache.lengths - rows
    given: dict[str, Any] = {"q_offset": offset, "len_kv": cache.lengths, "return_final_rowscales": True}
    o, values = built(q, cache.k, cache.v, block_table=cache.table, **given)
    want, lse = attention(q, cache.k_rows, cache.v_rows, cache.lengths, SCALE, offset)
    bound(o, want, dtype)
    torch.testing.assert_close(values["lse"].double(), lse, rtol=1e-4, atol=1e-4)
    again, others = built(q, cache.k_rows, cache.v_rows, **given)
    assert torch.equal(o, again)
    assert torch.equal(values["lse"], others["lse"])


def check_decoding(heads: int, dims: tuple[int, int], backend: str, page: int = 16, rows: int = 1) -> None:
    """Absorbed decoding over pages and over contiguous rows, everything unused NaN, against the formula."""
    d, dv = dims
    cache, q = filled(LENGTHS, page, 1, (d, 8)), torch.randn(3, rows, heads, d)
    given: dict[str, Any] = {"head_dim_v": dv, "softmax_scale": SCALE / 2, "backend": backend}
    out, lse = flash_mla_with_kvcache(q, cache.k, cache.table, cache.lengths, **given)
    want, want_lse = attention(q, cache.k_rows, cache.k_rows[..., :dv], cache.lengths, SCALE / 2)
    torch.testing.assert_close(out.double(), want, rtol=3e-5, atol=3e-5)
    torch.testing.assert_close(lse.double(), want_lse, rtol=3e-5, atol=3e-5)
    again = flash_mla_with_kvcache(q, cache.k_rows, None, cache.lengths, **given)
    assert torch.equal(out, again[0])
    assert torch.equal(lse, again[1])


@pytest.mark.parametrize("heads", [3, 17, 127])
def test_odd_numbers_of_heads(heads: int, seed: int) -> None:
    """With the tile kernels that torch carries out; compiled ones are below."""
    torch.manual_seed(seed)
    check_decoding(heads, (576, 512), "torch")


@pytest.mark.slow
@pytest.mark.parametrize("first", range(1, 129, 16))
def test_every_number_of_heads(first: int, seed: int) -> None:
    torch.manual_seed(seed)
    for heads in range(first, first + 16):
        check_decoding(heads, (576, 512), CPU, page=(16, 64, 48)[heads % 3], rows=1 + heads % 2)


@pytest.mark.slow
@pytest.mark.parametrize(("heads", "rows"), [(128, 1), (16, 4), (5, 3)])
def test_absorbed_as_unabsorbed(heads: int, rows: int, seed: int) -> None:
    """In the sizes of DeepSeek-V3: keys of 128 + 64 columns and values of 128, made of latents of 512."""
    torch.manual_seed(seed)
    nope, rope, latent, dv = 128, 64, 512, 128
    cache, q = filled(LENGTHS, 64, 1, (latent + rope, 8)), torch.randn(3, rows, heads, nope + rope)
    up_k, up_v = (torch.randn(heads, latent, n) / latent**0.5 for n in (nope, dv))
    absorbed = torch.cat((torch.einsum("bqhn,hln->bqhl", q[..., :nope], up_k), q[..., nope:]), -1)
    out, lse = flash_mla_with_kvcache(
        absorbed, cache.k, cache.table, cache.lengths, latent,
        softmax_scale=SCALE, causal=True, backend=CPU,
    )  # fmt: skip
    latents, rotated = cache.k_rows[..., :latent], cache.k_rows[..., latent:]
    k = torch.cat((torch.einsum("bkxl,hln->bkhn", latents, up_k), rotated.expand(-1, -1, heads, -1)), -1)
    v = torch.einsum("bkxl,hlv->bkhv", latents, up_v)
    built = engine(CPU, torch.float32, mask_mod=causal_with_offset(), custom_fwd_inputs=OFFSET)
    want, values = built(
        q, k, v, q_offset=cache.lengths - rows, len_kv=cache.lengths, return_final_rowscales=True
    )
    found = torch.einsum("bqhl,hlv->bqhv", out, up_v)
    torch.testing.assert_close(found, want, rtol=2e-4, atol=1e-4)
    torch.testing.assert_close(lse, values["lse"], rtol=2e-4, atol=1e-4)

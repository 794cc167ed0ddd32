"""Latent attention: values as a prefix of the keys, any number of heads, absorbed and not, FlashMLA's signature."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attn_engine import AttentionEngine, meta_tensor
from attn_engine.errors import AttnEngineError, WrongArgument
from attn_engine.library import flash_mla_with_kvcache, get_mla_metadata
from attn_engine.runtime.cpu_compile import find_compiler
from tests.serving.caches import attention, filled

CPU = "cpu" if find_compiler() is not None else "torch"
LENGTHS = [70, 0, 33]


@pytest.mark.parametrize(
    ("backend", "heads", "rows", "dims"),
    [
        (CPU, 5, 2, (48, 32)),
        ("torch", 128, 1, (576, 512)),
        ("torch", 1, 3, (48, 32)),
        ("triton-interpreter", 7, 2, (48, 32)),
        pytest.param(CPU, 128, 2, (576, 512), marks=pytest.mark.slow),
        pytest.param(CPU, 1, 1, (576, 512), marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("causal", [False, True])
def test_values_are_a_prefix_of_the_keys(
    backend: str, heads: int, rows: int, dims: tuple[int, int], causal: bool, seed: int
) -> None:
    """Everything unused is NaN; in pages and in a batch the same bits."""
    torch.manual_seed(seed)
    d, dv = dims
    cache, q = filled(LENGTHS, 64, 1, (d, 8)), torch.randn(3, rows, heads, d)
    metadata, splits = get_mla_metadata(cache.lengths, rows * heads, 1)
    given: dict[str, Any] = {"head_dim_v": dv, "softmax_scale": 0.1, "causal": causal, "backend": backend}
    out, lse = flash_mla_with_kvcache(
        q, cache.k, cache.table, cache.lengths,
        tile_scheduler_metadata=metadata, num_splits=splits, **given,
    )  # fmt: skip
    offset = cache.lengths - rows if causal else None
    want, want_lse = attention(q, cache.k_rows, cache.k_rows[..., :dv], cache.lengths, 0.1, offset)
    torch.testing.assert_close(out.double(), want, rtol=3e-5, atol=3e-5)
    torch.testing.assert_close(lse.double(), want_lse, rtol=3e-5, atol=3e-5)
    again = flash_mla_with_kvcache(q, cache.k_rows, None, cache.lengths, **given)
    assert torch.equal(out, again[0])
    assert torch.equal(lse, again[1])


def test_absorbed_as_unabsorbed(seed: int) -> None:
    """The up-projections of keys and values, moved to the queries and behind the output, change nothing."""
    torch.manual_seed(seed)
    heads, nope, rope, latent, dv, rows = 6, 24, 8, 32, 16, 3
    cache = filled(LENGTHS, 16, 1, (latent + rope, 8))
    q = torch.randn(3, rows, heads, nope + rope)
    up_k, up_v = (torch.randn(heads, latent, n) / latent**0.5 for n in (nope, dv))
    scale = (nope + rope) ** -0.5
    absorbed = torch.cat((torch.einsum("bqhn,hln->bqhl", q[..., :nope], up_k), q[..., nope:]), -1)
    out, lse = flash_mla_with_kvcache(
        absorbed, cache.k, cache.table, cache.lengths, latent, softmax_scale=scale, backend=CPU
    )
    found = torch.einsum("bqhl,hlv->bqhv", out, up_v)
    rows_of, rotated = cache.k_rows[..., :latent], cache.k_rows[..., latent:]
    k = torch.einsum("bkxl,hln->bkhn", rows_of, up_k)
    k = torch.cat((k, rotated.expand(-1, -1, heads, -1)), -1)
    v = torch.einsum("bkxl,hlv->bkhv", rows_of, up_v)
    metas = [meta_tensor(None, None, None, d, dtype=torch.float32) for d in (nope + rope, nope + rope, dv)]
    plain = AttentionEngine(metas, backend="torch", scale=scale)
    want, row_values = plain(q, k, v, len_kv=cache.lengths, return_final_rowscales=True)
    torch.testing.assert_close(found, want, rtol=2e-4, atol=2e-5)
    torch.testing.assert_close(lse, row_values["lse"], rtol=2e-5, atol=2e-5)


def test_what_it_does_not_do() -> None:
    q, cache = torch.zeros(1, 1, 2, 16), torch.zeros(1, 16, 1, 16)
    given = (q, cache, torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, dtype=torch.int32), 8)
    for name, x in (("extra_k_cache", torch.zeros(2)), ("attn_sink", torch.zeros(3))):
        options: dict[str, Any] = {name: x}
        with pytest.raises(WrongArgument) as found:
            flash_mla_with_kvcache(*given, **options)
        assert found.value.details["argument"] == name


WRONG: list[tuple[str, dict[str, Any]]] = [
    ("q.shape", {"q": torch.zeros(2, 4, 24)}),
    ("q", {"q": [0.0]}),
    ("k_cache", {"k_cache": None}),
    ("k_cache.dtype", {"k_cache": torch.zeros(4, 16, 1, 24).half()}),
    ("k_cache.shape", {"k_cache": torch.zeros(4, 16, 1, 16)}),
    ("k_cache.shape", {"k_cache": torch.zeros(4, 16, 24)}),
    ("heads of q", {"k_cache": torch.zeros(4, 16, 3, 24)}),
    ("head_dim_v", {"head_dim_v": 25}),
    ("head_dim_v", {"head_dim_v": 0}),
    ("softmax_scale", {"softmax_scale": "0.1"}),
    ("block_table", {"block_table": torch.tensor([[0, 4], [2, 3]])}),
    ("block_table", {"block_table": torch.zeros(2, 2)}),
    ("cache_seqlens", {"cache_seqlens": torch.tensor([33, 1])}),
    ("cache_seqlens", {"cache_seqlens": torch.tensor([3, -1])}),
    ("cache_seqlens", {"cache_seqlens": torch.tensor([3])}),
    ("cache_seqlens", {"cache_seqlens": [3, 3]}),
    ("topk_length", {"indices": torch.zeros(2, 1, 3).int(), "topk_length": torch.ones(2, 1).int()}),
    ("topk_length", {"indices": torch.zeros(2, 1, 3).int(), "topk_length": [1, 2]}),
]


@pytest.mark.parametrize(("name", "options"), WRONG)
def test_mistakes_are_told_by_the_callers_names(name: str, options: dict[str, Any]) -> None:
    given: dict[str, Any] = {
        "q": torch.zeros(2, 1, 4, 24), "k_cache": torch.zeros(4, 16, 1, 24), "backend": "torch",
        "block_table": torch.tensor([[0, 1], [2, 3]]), "cache_seqlens": torch.tensor([20, 5]), "head_dim_v": 16,
    }  # fmt: skip
    assert flash_mla_with_kvcache(**given)[0].shape == (2, 1, 4, 16)
    with pytest.raises(AttnEngineError) as found:
        flash_mla_with_kvcache(**{**given, **options})
    assert found.value.details["argument"] == name

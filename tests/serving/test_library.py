"""Prefill and decoding by name, and grouped heads in one tile of rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attn_engine import AttentionEngine, AttentionLibrary, CustomIO, meta_tensor
from attn_engine.library import alibi, alibi_slopes, append_to_cache, causal_with_offset
from attn_engine.runtime.cpu_compile import find_compiler
from tests.serving.caches import attention, filled

CPU = "cpu" if find_compiler() is not None else "torch"
LENGTHS = [70, 0, 33, 2]


@pytest.mark.parametrize("use", ["Decode", "Prefill"])
def test_use_types(use: str, seed: int) -> None:
    """The queries are the last ones of every sequence: in a cache with lengths, in pages, and packed."""
    torch.manual_seed(seed)
    rows = 1 if use == "Decode" else 20
    cache, q = filled(LENGTHS, 16, 2), torch.randn(4, rows, 4, 16)
    built = AttentionLibrary("SoftmaxAttention", "Causal", use, backend="torch")
    want, _ = attention(q, cache.k_rows, cache.v_rows, cache.lengths, 0.25, cache.lengths - rows)
    in_batch = built(q, cache.k_rows, cache.v_rows, len_kv=cache.lengths)
    paged = built(q, cache.k, cache.v, block_table=cache.table, len_kv=cache.lengths)
    torch.testing.assert_close(paged.double(), want, rtol=2e-5, atol=2e-5)
    assert torch.equal(in_batch, paged)
    cu_len = torch.arange(5) * rows
    packed = built(
        q.flatten(0, 1), cache.k, cache.v, cu_len_q=cu_len, block_table=cache.table, len_kv=cache.lengths
    )
    assert torch.equal(packed.view_as(paged), paged)
    whole = built(q[:1], cache.k_rows[:1], cache.v_rows[:1])
    assert torch.equal(whole, paged[:1])


def test_score_mod_by_name(seed: int) -> None:
    """Positions of a score_mod move with the queries too."""
    torch.manual_seed(seed)
    cache, q = filled([30, 17], 16, 2), torch.randn(2, 1, 4, 16)
    built = AttentionLibrary("AlibiAttention", "Causal", "Decode", backend="torch", slopes=alibi_slopes(4))
    found = built(q, cache.k, cache.v, block_table=cache.table, len_kv=cache.lengths)
    for b, n in enumerate([30, 17]):
        one = built(q[b : b + 1], cache.k_rows[b : b + 1, :n], cache.v_rows[b : b + 1, :n])
        torch.testing.assert_close(found[b], one[0], rtol=1e-5, atol=1e-6)


def dense(built: AttentionEngine, *given: Any, **options: Any) -> Any:
    return built.reference(*given, **options)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("backend", [CPU, "torch", "triton-interpreter"])
def test_grouped_heads_share_tiles(backend: str, rows: int, seed: int) -> None:
    """Sequences of their own lengths are packed by head as dense calls are; heads and positions keep their meaning."""
    torch.manual_seed(seed)
    cache, q = filled(LENGTHS, 16, 2), torch.randn(4, rows + 2, 8, 16)
    slopes = torch.rand(8)
    metas = [meta_tensor(None, None, None, 16, dtype=torch.float32)] * 3
    built = AttentionEngine(
        metas, score_mod=alibi(slopes), mask_mod=causal_with_offset(), scale=0.25, backend=backend,
        custom_fwd_inputs=CustomIO({"q_offset": ("batch",)}),
    )  # fmt: skip
    places = {"start_q": torch.tensor([2, 0, 1, 0]), "len_q": torch.tensor([rows, rows, 0, 1])}
    given = (q, cache.k, cache.v, cache.lengths - rows)
    options = {**places, "block_table": cache.table, "len_kv": cache.lengths, "return_final_rowscales": True}
    o, saved = built(*given, **options)
    want, want_saved = dense(built, *given, **options)
    torch.testing.assert_close(o.double(), want, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(saved["lse"].double(), want_saved["lse"], rtol=2e-5, atol=2e-5)
    (call, _), *_ = built._calls.values()
    assert [packing.name for packing, _ in call.compiled._variants] == [
        "ONE_QUERY" if rows == 1 else "QUERIES"
    ]


def test_a_prompt_in_chunks(seed: int) -> None:
    """Chunks of a prompt, each over what the cache holds by then, give the rows of the whole prompt."""
    torch.manual_seed(seed)
    tokens, page = 75, 16
    q, k, v = torch.randn(1, tokens, 4, 16), *torch.randn(2, 1, tokens, 2, 16)
    options: dict[str, Any] = {"backend": CPU, "slopes": alibi_slopes(4)}
    whole = AttentionLibrary("AlibiAttention", "Causal", "Train", **options)(q, k, v)
    chunked = AttentionLibrary("AlibiAttention", "Causal", "Prefill", **options)
    pages = -(-tokens // page)
    caches = tuple(torch.full((pages, page, 2, 16), float("nan")) for _ in range(2))
    table, lengths = torch.randperm(pages).int()[None], torch.zeros(1, dtype=torch.int32)
    done = 0
    for rows in (1, 30, 16, 2, 26):
        new = slice(done, done + rows)
        lengths = append_to_cache((k[:, new], v[:, new]), caches, lengths, table)
        o = chunked(q[:, new], *caches, block_table=table, len_kv=lengths)
        torch.testing.assert_close(o, whole[:, new], rtol=1e-5, atol=2e-6)
        done += rows
    assert done == tokens


def test_every_past_length(seed: int) -> None:
    """A step of decoding over 0, 1, ..., 130 keys in sight; what lies behind them is poisoned."""
    torch.manual_seed(seed)
    cache = filled(range(131), 16, 2)
    q = torch.randn(131, 1, 4, 16)
    built = AttentionLibrary("SoftmaxAttention", "Causal", "Decode", backend=CPU)
    found, rows = built(q, cache.k_rows, cache.v_rows, len_kv=cache.lengths, return_final_rowscales=True)
    want, lse = attention(q, cache.k_rows, cache.v_rows, cache.lengths, 0.25)
    torch.testing.assert_close(found.double(), want, rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(rows["lse"].double(), lse, rtol=2e-5, atol=2e-6)

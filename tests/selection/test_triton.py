"""Selections in generated Triton, through its interpreter: which candidates are taken, and where keys may lie.

The interpreter takes milliseconds for a line of a kernel: shapes are as small as they can be. Sums of whole numbers are
exact in any order, so results are compared bit for bit; drawn numbers by the margin rule.
"""

from __future__ import annotations

import pytest
import torch

from attn_engine import CustomIO, Overlap, SelectionEngine, meta_tensor
from attn_engine.errors import AttnEngineError, BackendDeviceMismatch, UnsupportedOnBackend
from attn_engine.library import causal, causal_with_offset
from attn_engine.runtime import selection_triton
from tests.selection.oracle import check_by_margin, chosen, pooled, scores, summed, whole_numbers

pytest.importorskip("triton")
BIAS = CustomIO({"bias": ("batch", "heads", "seq_len", "seq_len_kv")})


def engine(
    *, dtype: torch.dtype = torch.float32, backend: str = "triton-interpreter", **options
) -> SelectionEngine:
    return SelectionEngine(
        [meta_tensor(None, None, None, 16, dtype=dtype)] * 2, backend=backend, scale=1.0, **options
    )


def of_bias(score, custom, b, h, q_idx, kv_idx):
    return custom.input_tensors["bias"]


def sometimes(b, h, q_idx, kv_idx):
    return (kv_idx % 29 == 3) & (q_idx % 2 == 0)


@pytest.mark.parametrize("topk", [3, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 40))])
def test_forced_candidates_then_ties_of_lowest_index(topk):
    """Visible or not; of more than topk the lowest; and a row of fewer candidates ends with -1."""
    q, k = whole_numbers(1, 2, 2, 16), whole_numbers(1, 150, 1, 16)
    q[:, 1] = 0  # all its importances are equal
    seen = torch.arange(150) <= torch.tensor([[20], [140]])

    def early(b, h, q_idx, kv_idx):
        return kv_idx <= 20 + 120 * q_idx

    forced = (torch.arange(150) % 29 == 3) & (torch.arange(2)[:, None] % 2 == 0)
    want = chosen(summed(scores(q, k), seen, 1), topk, forced).transpose(1, 2)
    assert torch.equal(engine(mask_mod=early, forced_mod=sometimes)(q, k, topk=topk), want)


def test_numbers_at_the_ends():
    """inf is the best, -0 equals 0, -inf and NaN are no candidates, the largest and smallest numbers are ordered."""
    values = [-0.0, 0.0, 3e38, torch.inf, -torch.inf, torch.nan, -3e38, 1e-45, -1e-45, torch.inf, 0.0, -0.0]
    bias = torch.tensor(values)[None, None, None].contiguous()
    q, k = torch.zeros(1, 1, 1, 16), torch.zeros(1, len(values), 1, 16)
    select = engine(score_mod=of_bias, custom_fwd_inputs=BIAS)
    order = [3, 9, 2, 7, 0, 1, 10, 11, 8, 6]
    for topk in (2, 4, 6, 9):
        assert select(q, k, bias, topk=topk)[0, 0, 0].tolist() == sorted(order[:topk]), topk


def blocks_case(sizes: tuple[int, int, int], tokens: int, heads: int, kv_heads: int):
    """(options of an engine, q, k, what is taken by the formula) of windows and forced blocks."""
    length, stride, block = sizes
    windows = max(1, (tokens - length) // stride + 1)
    q, k = whole_numbers(1, tokens, heads, 16), whole_numbers(1, windows, kv_heads, 16)

    def complete(b, h, q_idx, kv_idx):
        return kv_idx * stride + length - 1 <= q_idx

    def first_and_own(b, h, q_idx, block_idx):
        return (block_idx == 0) | (block_idx == q_idx // block)

    t = torch.arange(tokens)[:, None]
    seen = torch.arange(windows) * stride + length - 1 <= t
    importance = pooled(summed(scores(q, k), seen, kv_heads), length, stride, block)
    j = torch.arange(importance.shape[-1])
    want = chosen(importance, 3, (j == 0) | (j == t // block)).transpose(1, 2)
    return {"mask_mod": complete, "pool": Overlap(*sizes), "forced_mod": first_and_own}, q, k, want


def test_blocks_get_what_windows_share_with_them():
    options, q, k, want = blocks_case((4, 2, 4), 17, 2, 1)
    assert torch.equal(engine(**options)(q, k, topk=3), want)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(6, 2, 2), (2, 2, 6), (8, 4, 8)])
@pytest.mark.parametrize("heads", [1, 3, 17])
def test_windows_and_blocks_of_all_kinds(sizes, heads):
    options, q, k, want = blocks_case(sizes, 45, heads, 1)
    assert torch.equal(engine(**options)(q, k, topk=3), want)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads, kv_heads, topk", [(1, 1, 5), (6, 2, 5), (6, 1, 200), (70, 1, 3), (65, 1, 2)])
def test_of_equals_the_lowest_index_is_taken(dtype, heads, kv_heads, topk):
    q, k = whole_numbers(2, 7, heads, 16, dtype=dtype), whole_numbers(2, 150, kv_heads, 16, dtype=dtype)
    seen = torch.arange(150) <= torch.arange(7)[:, None] + 140
    late = torch.tensor([140, 140])
    options = {"mask_mod": causal_with_offset(), "custom_fwd_inputs": CustomIO({"q_offset": ("batch",)})}
    want = chosen(summed(scores(q, k), seen, kv_heads), topk).transpose(1, 2)
    assert torch.equal(engine(dtype=dtype, **options)(q, k, late, topk=topk), want)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group", [1, 3, 20])
def test_scores_of_any_kind_by_the_margin_rule(dtype, group):
    q, k = torch.randn(2, 9, 2 * group, 16).to(dtype), torch.randn(2, 131, 2, 16).to(dtype)
    w = torch.rand(2, 9, 2 * group)

    def weighed(score, custom, b, h, q_idx, kv_idx):
        return torch.relu(score) * custom.input_tensors["w"][b, q_idx, h]

    select = engine(
        dtype=dtype, score_mod=weighed, custom_fwd_inputs=CustomIO({"w": ("batch", "seq_len", "heads")})
    )
    dense = scores(q, k).relu() * w.double().transpose(1, 2)[..., None]
    importance = summed(dense, torch.ones(9, 131, dtype=torch.bool), 2)
    assert check_by_margin(select(q, k, w, topk=20).transpose(1, 2), importance, 1e-4) > 20


@pytest.mark.slow
def test_a_mask_that_depends_on_the_head():
    q, k = whole_numbers(1, 30, 6, 16), whole_numbers(1, 70, 2, 16)

    def windows(b, h, q_idx, kv_idx):
        return (kv_idx <= q_idx) & (kv_idx > q_idx - 3 - 4 * h)

    t, s, h = torch.arange(30)[:, None], torch.arange(70), torch.arange(6)[:, None, None]
    want = chosen(summed(scores(q, k), (s <= t) & (s > t - 3 - 4 * h), 2), 9).transpose(1, 2)
    assert torch.equal(engine(mask_mod=windows)(q, k, topk=9), want)


@pytest.mark.slow
@pytest.mark.parametrize("keys, topk", [(9000, 700), (5000, 64), (1500, 2000)])
def test_shares_of_the_keys_and_more_than_one_tile_of_candidates(keys, topk):
    q, k = whole_numbers(2, 1, 8, 16), whole_numbers(2, keys, 2, 16)
    for forced in (None, lambda b, h, q_idx, kv_idx: (kv_idx < 3) | (kv_idx % 4000 == 242)):
        want = engine(backend="torch", forced_mod=forced)(q, k, topk=topk)
        assert torch.equal(engine(forced_mod=forced)(q, k, topk=topk), want)


@pytest.mark.slow
def test_many_tokens_are_launched_in_turns(monkeypatch):
    q, k = torch.randn(1, 40, 4, 16), torch.randn(1, 40, 1, 16)
    whole = engine(mask_mod=causal())(q, k, topk=20)
    monkeypatch.setattr(selection_triton, "STATE_WORDS", 1000)
    monkeypatch.setattr(selection_triton, "PROGRAMS", 1)
    again = engine(mask_mod=causal())(q, k, topk=20)
    assert torch.equal(again, whole)


@pytest.mark.slow
@pytest.mark.parametrize("page", [16, 24, 64])
def test_pages_in_any_order_are_contiguous_keys(page):
    lengths = [150, 0, 37]
    q, k = whole_numbers(3, 2, 6, 16), whole_numbers(3, 150, 2, 16)
    pages = -(-150 // page)
    cache = torch.full((3 * pages + 2, page, 2, 16), torch.nan)
    table = torch.full((3, pages + 1), 2147480000)
    order = torch.randperm(3 * pages + 2).tolist()
    for b, length in enumerate(lengths):
        for j in range(-(-length // page)):
            table[b, j] = order.pop()
            rows = k[b, j * page : min((j + 1) * page, length)]
            cache[table[b, j], : len(rows)] = rows
    offset, own = torch.tensor(lengths) - 2, torch.tensor(lengths)
    options = {"mask_mod": causal_with_offset(), "custom_fwd_inputs": CustomIO({"q_offset": ("batch",)})}
    found = engine(**options)(q, cache, offset, topk=9, block_table=table, len_kv=own)
    assert torch.equal(found, engine(backend="torch", **options)(q, k, offset, topk=9, len_kv=own))


@pytest.mark.slow
@pytest.mark.parametrize("pool", [None, Overlap(4, 2, 8)])
def test_packed_sequences_are_their_own(pool):
    cu_q, cu_kv = (torch.tensor([0, *x]).cumsum(0) for x in ([20, 0, 1, 9], [40, 5, 0, 30]))
    q, k = whole_numbers(33, 4, 16), whole_numbers(75, 2, 16)

    def last(b, h, q_idx, j):
        return j == q_idx // 8

    options = {"mask_mod": causal(), "pool": pool, "forced_mod": None if pool is None else last}
    places = {"cu_len_q": cu_q, "cu_len_kv": cu_kv}
    found = engine(**options)(q, k, topk=5, **places)
    assert torch.equal(found, engine(backend="torch", **options)(q, k, topk=5, **places))
    assert (found[30:] == -1).all()


def test_what_is_refused():
    with pytest.raises(UnsupportedOnBackend, match="float64"):
        engine(dtype=torch.float64)(
            torch.zeros(1, 1, 1, 16).double(), torch.zeros(1, 1, 1, 16).double(), topk=1
        )
    with pytest.raises(AttnEngineError):  # no GPU, or tensors of a CPU where there is one
        engine(backend="triton")(torch.zeros(1, 1, 1, 16), torch.zeros(1, 1, 1, 16), topk=1)
    with pytest.raises(BackendDeviceMismatch):
        engine()(torch.zeros(1, 1, 1, 16, device="meta"), torch.zeros(1, 1, 1, 16, device="meta"), topk=1)


def test_the_text_is_a_file_of_each_kernel():
    select = engine(mask_mod=causal(), forced_mod=sometimes)
    text = select.source()
    for name in ("def select(", "def settle(", "def settle_row(", "def force_tile(", "offer_tile("):
        assert name in text
    for part in text.split("# attn_engine ")[1:]:
        compile("#" + part, "kernel", "exec")

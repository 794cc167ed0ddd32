"""Which candidates are taken: exactly, where numbers are exact, and by the margin rule elsewhere."""

from __future__ import annotations

import pytest
import torch

from attn_engine import CustomIO, Overlap, SelectionEngine, meta_tensor
from attn_engine.library import causal
from tests.selection.oracle import check_by_margin, chosen, pooled, scores, summed, whole_numbers

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
BACKENDS = ("cpu", "torch")
BIAS = CustomIO({"bias": ("batch", "heads", "seq_len", "seq_len_kv")})


def engine(*, dim: int = 16, dtype: torch.dtype = F32, backend: str = "cpu", **options) -> SelectionEngine:
    return SelectionEngine([meta_tensor(None, None, None, dim, dtype=dtype)] * 2, backend=backend, **options)


def lower_triangle(t: int, s: int) -> torch.Tensor:
    return torch.arange(s) <= torch.arange(t)[:, None]


def of_bias(score, custom, b, h, q_idx, kv_idx):
    return custom.input_tensors["bias"]


@pytest.mark.parametrize("dtype", [F32, BF16, F64])
@pytest.mark.parametrize(
    "heads, kv_heads, topk", [(1, 1, 5), (6, 2, 5), (6, 1, 200), (16, 1, 16), (70, 1, 3)]
)
def test_of_equals_the_lowest_index_is_taken(dtype, heads, kv_heads, topk):
    q, k = whole_numbers(2, 77, heads, 16, dtype=dtype), whole_numbers(2, 90, kv_heads, 16, dtype=dtype)
    select = engine(dtype=dtype, mask_mod=causal(), scale=1.0)
    want = chosen(summed(scores(q, k), lower_triangle(77, 90), kv_heads), topk).transpose(1, 2)
    found = select(q, k, topk=topk)
    assert found.dtype is torch.int32 and torch.equal(found, want)
    assert torch.equal(
        engine(dtype=dtype, mask_mod=causal(), scale=1.0, backend="torch")(q, k, topk=topk), want
    )
    assert torch.equal(select.reference(q, k, topk=topk), want)


SLOW_SIZES = [(16, 16, 64), (64, 16, 64), (32, 32, 64), (32, 8, 64)]


@pytest.mark.parametrize(
    "sizes", [(32, 16, 64), (6, 2, 4), *(pytest.param(x, marks=pytest.mark.slow) for x in SLOW_SIZES)]
)
def test_blocks_get_what_windows_share_with_them(sizes):
    length, stride, block = sizes
    tokens = 333
    windows = (tokens - length) // stride + 1
    q, k = whole_numbers(1, tokens, 6, 16), whole_numbers(1, windows, 2, 16)

    def complete(b, h, q_idx, kv_idx):
        return kv_idx * stride + length - 1 <= q_idx

    def first_and_local(b, h, q_idx, block_idx):
        own = q_idx // block
        return (block_idx == 0) | ((block_idx <= own) & (block_idx >= own - 1))

    t = torch.arange(tokens)[:, None]
    seen = torch.arange(windows) * stride + length - 1 <= t
    importance = pooled(summed(scores(q, k), seen, 2), length, stride, block)
    j, own = torch.arange(importance.shape[-1]), t // block
    forced = (j == 0) | ((j <= own) & (j >= own - 1))
    want = chosen(importance, 5, forced).transpose(1, 2)
    for backend in BACKENDS:
        select = engine(
            backend=backend, mask_mod=complete, pool=Overlap(*sizes), forced_mod=first_and_local, scale=1.0
        )
        assert torch.equal(select(q, k, topk=5), want), backend
    found = select.importance(q, k, dtype=F64).transpose(1, 2)
    assert torch.equal(found, importance)


def test_taps_are_the_segments_that_are_shared():
    pool = Overlap(32, 16, 64)
    assert pool.taps == {-1: 1, 0: 2, 1: 2, 2: 2, 3: 1} and Overlap(16, 16, 16).taps == {0: 1}


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("group", [1, 3, 6])
def test_scores_of_any_kind_by_the_margin_rule(dtype, group):
    """relu of every head, weighed: what an indexer computes."""
    q, k = torch.randn(2, 70, 2 * group, 40).to(dtype), torch.randn(2, 131, 2, 40).to(dtype)
    w = torch.rand(2, 70, 2 * group)

    def weighed(score, custom, b, h, q_idx, kv_idx):
        return torch.relu(score) * custom.input_tensors["w"][b, q_idx, h]

    shapes = CustomIO({"w": ("batch", "seq_len", "heads")})
    select = engine(dim=40, dtype=dtype, score_mod=weighed, custom_fwd_inputs=shapes)
    dense = scores(q, k).relu() * w.double().transpose(1, 2)[..., None]
    importance = summed(dense, torch.ones(70, 131, dtype=torch.bool), 2)
    assert check_by_margin(select(q, k, w, topk=20).transpose(1, 2), importance, 1e-4) > 150


def test_probabilities_of_another_attention():
    """The importances of NSA: exp(score - lse), with the lse of a call before."""
    q, k = torch.randn(1, 65, 4, 16), torch.randn(1, 65, 1, 16)
    logits = (scores(q, k) / 4).masked_fill(~lower_triangle(65, 65), -torch.inf)
    lse = logits.logsumexp(-1)

    def probability(score, custom, b, h, q_idx, kv_idx):
        return torch.exp(score / 4 - custom.input_tensors["lse"][b, h, q_idx])

    shapes = CustomIO({"lse": ("batch", "heads", "seq_len")})
    select = engine(score_mod=probability, mask_mod=causal(), custom_fwd_inputs=shapes)
    importance = summed(logits.softmax(-1), lower_triangle(65, 65), 1)
    assert check_by_margin(select(q, k, lse.float(), topk=9).transpose(1, 2), importance, 1e-5) > 50


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_mask_that_depends_on_the_head(backend):
    """A key is a candidate where some head of the group sees it, and only those heads count."""
    q, k = whole_numbers(1, 150, 6, 16), whole_numbers(1, 150, 2, 16)

    def windows(b, h, q_idx, kv_idx):
        return (kv_idx <= q_idx) & (kv_idx > q_idx - 3 - 20 * h)

    t, s, h = torch.arange(150)[:, None], torch.arange(150), torch.arange(6)[:, None, None]
    want = chosen(summed(scores(q, k), (s <= t) & (s > t - 3 - 20 * h), 2), 27).transpose(1, 2)
    assert torch.equal(engine(backend=backend, mask_mod=windows, scale=1.0)(q, k, topk=27), want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("topk", [1, 3, 40])
def test_forced_candidates_come_first(backend, topk):
    """Visible or not; of more than topk the lowest; they are not taken twice."""
    q, k = whole_numbers(1, 50, 2, 16), whole_numbers(1, 150, 1, 16)
    every = 29

    def sometimes(b, h, q_idx, kv_idx):
        return (kv_idx % every == 3) & (q_idx % 2 == 0)

    select = engine(backend=backend, mask_mod=causal(), forced_mod=sometimes, scale=1.0)
    forced = (torch.arange(150) % every == 3) & (torch.arange(50)[:, None] % 2 == 0)
    want = chosen(summed(scores(q, k), lower_triangle(50, 150), 1), topk, forced).transpose(1, 2)
    assert torch.equal(select(q, k, topk=topk), want)


def test_forced_mod_reads_what_it_captures():
    q, k = whole_numbers(2, 20, 4, 16), whole_numbers(2, 30, 2, 16)
    table = torch.rand(2, 30) < 0.1

    def listed(b, h, q_idx, kv_idx):
        return table[h, kv_idx]

    want = chosen(summed(scores(q, k), torch.ones(20, 30, dtype=torch.bool), 2), 4, table[None, :, None])
    assert torch.equal(engine(forced_mod=listed, scale=1.0)(q, k, topk=4), want.transpose(1, 2))


@pytest.mark.parametrize("backend", BACKENDS)
def test_numbers_at_the_ends(backend):
    """inf is the best, -0 equals 0, -inf and NaN are no candidates, the largest and smallest numbers are ordered."""
    values = [-0.0, 0.0, 3e38, torch.inf, -torch.inf, torch.nan, -3e38, 1e-45, -1e-45, torch.inf, 0.0, -0.0]
    bias = torch.tensor(values)[None, None, None].expand(1, 1, 3, -1).contiguous()
    q, k = torch.zeros(1, 3, 1, 16), torch.zeros(1, len(values), 1, 16)
    select = engine(backend=backend, score_mod=of_bias, custom_fwd_inputs=BIAS)
    order = [3, 9, 2, 7, 0, 1, 10, 11, 8, 6]  # 1e-45 is not flushed to 0
    for topk in (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12):
        want = sorted(order[:topk])
        assert select(q, k, bias, topk=topk)[0, 1, 0].tolist() == want + [-1] * (topk - len(want)), topk


@pytest.mark.parametrize("backend", BACKENDS)
def test_windows_that_are_no_candidates_add_nothing_to_blocks(backend):
    values = torch.tensor([1.0, torch.nan, -torch.inf, 2.0, torch.nan, -torch.inf, torch.nan, torch.nan])
    bias = values[None, None, None].expand(1, 1, 2, -1).contiguous()
    select = engine(backend=backend, score_mod=of_bias, custom_fwd_inputs=BIAS, pool=Overlap(1, 1, 2))
    q, k = torch.zeros(1, 2, 1, 16), torch.zeros(1, 8, 1, 16)
    assert select(q, k, bias, topk=3)[0, 0, 0].tolist() == [0, 1, -1]
    assert select(q, k, bias, topk=1)[0, 0, 0].tolist() == [1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_choose_from(backend):
    select = engine(backend=backend, mask_mod=lambda b, h, q_idx, kv_idx: kv_idx < q_idx - 5)
    found = select(torch.randn(1, 9, 2, 16), torch.randn(1, 40, 1, 16), topk=4)
    assert (found[0, :6] == -1).all() and found[0, 6, 0].tolist() == [0, -1, -1, -1]
    assert select(torch.randn(1, 9, 2, 16), torch.randn(1, 0, 1, 16), topk=4).tolist() == [[[[-1] * 4]] * 9]
    assert select(torch.randn(1, 0, 2, 16), torch.randn(1, 3, 1, 16), topk=4).shape == (1, 0, 1, 4)
    assert select(torch.randn(0, 2, 2, 16), torch.randn(0, 3, 1, 16), topk=4).shape == (0, 2, 1, 4)


def test_many_more_candidates_than_states_hold():
    """States are pruned many times, also where candidates come in rising order, the worst one."""
    rising = torch.arange(3000.0)[None, None, None].expand(1, 1, 2, -1).contiguous()
    q, k = torch.zeros(1, 2, 1, 16), torch.zeros(1, 3000, 1, 16)
    select = engine(score_mod=of_bias, custom_fwd_inputs=BIAS)
    for bias in (rising, rising.flip(-1), (rising / 100).floor(), rising * 0):
        want = chosen(bias[:, :, :, :].double(), 37).transpose(1, 2)
        assert torch.equal(select(q, k, bias, topk=37), want)


def test_double_inputs_are_compared_in_double():
    bias = torch.tensor([1.0, 1.0 + 1e-12, 1.0, 1.0 + 2e-12], dtype=F64)[None, None, None]
    select = engine(dtype=F64, score_mod=of_bias, custom_fwd_inputs=BIAS)
    q, k = torch.zeros(1, 1, 1, 16, dtype=F64), torch.zeros(1, 4, 1, 16, dtype=F64)
    assert select(q, k, bias, topk=2).flatten().tolist() == [1, 3]


def test_any_layout_and_strides():
    q, k = whole_numbers(2, 40, 6, 16), whole_numbers(2, 50, 2, 16)
    want = engine(mask_mod=causal())(q, k, topk=8)
    other = engine(mask_mod=causal(), layout="bhsd")
    assert torch.equal(other(q.transpose(1, 2), k.transpose(1, 2).contiguous(), topk=8), want.transpose(1, 2))
    wide = torch.full((2, 50, 2, 33), torch.nan)
    wide[..., 1::2] = k
    assert torch.equal(engine(mask_mod=causal())(q, wide[..., 1::2], topk=8), want)


def test_nothing_is_differentiated():
    q, k = torch.randn(1, 5, 2, 16, requires_grad=True), torch.randn(1, 5, 1, 16, requires_grad=True)
    assert not engine()(q, k, topk=2).requires_grad and not engine().importance(q, k).requires_grad

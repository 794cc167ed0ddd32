"""Sequences, pages, threads: what a call may bring changes where tensors lie, and nothing else."""

from __future__ import annotations

import copy

import pytest
import torch

from attn_engine import CustomIO, Overlap, SelectionEngine, meta_tensor
from attn_engine.library import causal, causal_with_offset
from tests.selection.oracle import whole_numbers

OFFSET = CustomIO({"q_offset": ("batch",)})
BACKENDS = ("cpu", "torch")


def engine(backend: str = "cpu", dtype: torch.dtype = torch.float32, **options) -> SelectionEngine:
    metas = [meta_tensor(None, None, None, 16, dtype=dtype)] * 2
    return SelectionEngine(metas, backend=backend, scale=1.0, **options)


def at_offset(backend: str = "cpu", **options) -> SelectionEngine:
    return engine(backend, mask_mod=causal_with_offset(), custom_fwd_inputs=OFFSET, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("page", [16, 24, pytest.param(64, marks=pytest.mark.slow)])
def test_pages_in_any_order_are_contiguous_keys(backend, page):
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
    offset = torch.tensor(lengths) - 2
    select = at_offset(backend)
    found = select(q, cache, offset, topk=9, block_table=table, len_kv=torch.tensor(lengths))
    in_batch = select(q, k, offset, topk=9, len_kv=torch.tensor(lengths))
    assert torch.equal(found, in_batch)
    for b, length in enumerate(lengths):
        alone = select(q[b : b + 1], k[b : b + 1, :length], offset[b : b + 1], topk=9)
        assert torch.equal(found[b], alone[0])
    assert (found[1] == -1).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pool", [None, Overlap(4, 2, 8)])
def test_packed_sequences_are_their_own(backend, pool):
    of_q, of_kv = [70, 0, 1, 33], [90, 5, 0, 40]
    cu_q, cu_kv = (torch.tensor([0, *x]).cumsum(0) for x in (of_q, of_kv))
    q, k = whole_numbers(sum(of_q) + 3, 4, 16), whole_numbers(sum(of_kv), 2, 16)

    def last(b, h, q_idx, j):
        return j == q_idx // 8

    select = engine(backend, mask_mod=causal(), pool=pool, forced_mod=None if pool is None else last)
    found = select(q, k, topk=5, cu_len_q=cu_q, cu_len_kv=cu_kv)
    assert found.shape == (len(q), 2, 5) and (found[sum(of_q) :] == -1).all()
    for b in range(4):
        own = q[None, cu_q[b] : cu_q[b + 1]], k[None, cu_kv[b] : cu_kv[b + 1]]
        assert torch.equal(found[cu_q[b] : cu_q[b + 1]], select(*own, topk=5)[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_sequences_in_a_batch(backend):
    q, k = whole_numbers(2, 30, 4, 16), whole_numbers(2, 60, 2, 16)
    places = {"start_q": [3, 0], "len_q": [20, 7], "start_kv": [5, 1], "len_kv": [50, 0]}
    found = engine(backend, mask_mod=causal())(
        q, k, topk=5, **{n: torch.tensor(x) for n, x in places.items()}
    )
    alone = engine(backend, mask_mod=causal())(q[:1, 3:23], k[:1, 5:55], topk=5)
    assert torch.equal(found[0, 3:23], alone[0])
    assert (found[0, :3] == -1).all() and (found[0, 23:] == -1).all() and (found[1] == -1).all()


def test_packed_queries_of_paged_keys():
    q, k = whole_numbers(5, 4, 16), whole_numbers(2, 32, 1, 16)
    cache = k.reshape(4, 16, 1, 16).flip(0)
    table, lengths, cu = torch.tensor([[3, 2], [1, 0]]), torch.tensor([31, 20]), torch.tensor([0, 2, 5])
    offset = lengths - cu.diff()
    found = at_offset()(q, cache, offset, topk=6, block_table=table, len_kv=lengths, cu_len_q=cu)
    for b in range(2):
        own = q[None, cu[b] : cu[b + 1]], k[b : b + 1, : lengths[b]]
        assert torch.equal(found[cu[b] : cu[b + 1]], at_offset()(*own, offset[b : b + 1], topk=6)[0])


@pytest.mark.parametrize(
    "tokens, keys, topk", [(1, 9000, 700), (3, 5000, 64), (200, 300, 16), (1, 1500, 2000)]
)
def test_the_same_for_any_number_of_threads(tokens, keys, topk):
    """Few queries split the keys; which are best does not depend on how. Drawn numbers: rounding would show."""
    q, k = torch.randn(2, tokens, 8, 16), torch.randn(2, keys, 2, 16)
    offset = torch.tensor([keys - tokens, keys - tokens - 100])
    select, before = at_offset(), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            found += [select(q, k, offset, topk=topk), select(q, k, offset, topk=topk)]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], x) for x in found[1:])
    whole = whole_numbers(2, tokens, 8, 16), whole_numbers(2, keys, 2, 16)
    assert torch.equal(select(*whole, offset, topk=topk), at_offset("torch")(*whole, offset, topk=topk))


def test_split_keys_of_sequences():
    q, k = whole_numbers(2, 1, 4, 16), whole_numbers(2, 6000, 1, 16)
    lengths = torch.tensor([5500, 1700])
    found = [engine(b)(q, k, topk=20, len_kv=lengths) for b in BACKENDS]
    assert torch.equal(*found)


def test_split_keys_with_forced_candidates():
    q, k = whole_numbers(1, 1, 4, 16), whole_numbers(1, 6000, 1, 16)

    def first_and_far(b, h, q_idx, kv_idx):
        return (kv_idx < 3) | (kv_idx == 4242)

    found = [engine(b, forced_mod=first_and_far)(q, k, topk=20) for b in BACKENDS]
    assert torch.equal(*found) and {0, 1, 2, 4242} <= set(found[0].flatten().tolist())


def test_many_tokens_are_launched_in_turns(monkeypatch):
    from attn_engine.runtime import selection_cpu

    q, k = torch.randn(2, 500, 4, 16), torch.randn(2, 500, 1, 16)
    whole = engine(mask_mod=causal())(q, k, topk=20)
    monkeypatch.setattr(selection_cpu, "STATE_WORDS", 100_000)
    assert torch.equal(engine(mask_mod=causal())(q, k, topk=20), whole)


def test_two_queries_at_once_are_two_steps():
    q, k = torch.randn(1, 2, 8, 16), torch.randn(1, 300, 1, 16)
    both = at_offset()(q, k, torch.tensor([298]), topk=30)
    first = at_offset()(q[:, :1], k[:, :299], torch.tensor([298]), topk=30)
    second = at_offset()(q[:, 1:], k, torch.tensor([299]), topk=30)
    assert torch.equal(both, torch.cat((first, second), 1))


def test_numbers_and_tensors_are_read_anew():
    bias = torch.zeros(40)
    select = engine(score_mod=lambda score, b, h, q_idx, kv_idx: bias[kv_idx])
    q, k = torch.randn(1, 2, 1, 16), torch.randn(1, 40, 1, 16)
    assert select(q, k, topk=1).flatten().tolist() == [0, 0]
    bias[7] = 1.0
    assert select(q, k, topk=1).flatten().tolist() == [7, 7]
    again = copy.deepcopy(select)
    assert torch.equal(again(q, k, topk=3), select(q, k, topk=3))


def test_texts():
    def weighed(score, b, h, q_idx, kv_idx):
        positive = torch.relu(score)
        return positive * 2

    select = engine(score_mod=weighed, mask_mod=causal(), pool=Overlap(32, 16, 64))
    text = select.source()
    assert "positive" in text and "offer" in text and "settle" in text
    assert "2 * importance[4 * block +1]" in str(select.explain()) and "kv_idx <= q_idx" in str(
        select.explain()
    )
    assert "float32" in repr(select)


@pytest.mark.slow
def test_memory_does_not_grow_with_pairs():
    """32768 x 32768 importances would be 4 GB; a process that selects stays far below."""
    import resource

    q, k = torch.randn(1, 32768, 1, 16), torch.randn(1, 32768, 1, 16)
    engine(mask_mod=causal())(q[:, :64], k[:, :64], topk=4)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    engine(mask_mod=causal())(q, k, topk=16)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KB

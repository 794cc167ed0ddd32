"""create_block_mask: exactly the blocks of torch's, for masks of every kind, and never another one."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import flex_attention as flex

from attn_engine import BlockMask, and_masks, create_block_mask, library, or_masks
from attn_engine.masks.lists import BlockLists, Csr
from tests.masks.random_masks import dense, random_masks


def listed(csr: Csr, shape: tuple[int, int], other: int) -> Tensor:
    """bool (batch, heads, blocks, other): which blocks a row lists. Checks the form of the rows on the way."""
    batch, heads, blocks = csr.starts.shape
    assert csr.starts.dtype is csr.indices.dtype is torch.int32
    assert csr.starts.is_contiguous() and csr.indices.is_contiguous()
    assert int(csr.starts.min()) == 0 and int(csr.starts.max()) == len(csr.indices)
    grid = torch.zeros(batch, heads, blocks - 1, other, dtype=torch.bool)
    for b in range(batch):
        for h in range(heads):
            for i in range(blocks - 1):
                row = csr.row(b, h, i).tolist()
                assert row == sorted(set(row))
                grid[b, h, i, row] = True
    return grid.expand(*shape, -1, -1)


def expected_blocks(seen: Tensor, block_q: int, block_kv: int) -> tuple[Tensor, Tensor]:
    """(partial, full) of a dense mask, from the definition: a block that sticks out is not full."""
    batch, heads, q_len, kv_len = seen.shape
    rows, columns = -(-q_len // block_q), -(-kv_len // block_kv)
    grid = torch.zeros(batch, heads, rows * block_q, columns * block_kv, dtype=torch.bool)
    grid[:, :, :q_len, :kv_len] = seen
    cut = grid.reshape(batch, heads, rows, block_q, columns, block_kv)
    full = cut.all(5).all(3)
    return cut.any(5).any(3) & ~full, full


def check(mask: BlockMask, mask_mod, sizes: tuple[int, int, int, int]) -> None:
    """Both sides hold exactly the blocks of the definition."""
    lists: BlockLists = mask.lists()
    shape = sizes[:2]
    partial, full = expected_blocks(dense(mask_mod, *sizes), lists.block_q, lists.block_kv)
    assert torch.equal(listed(lists.by_q.partial, shape, lists.kv_blocks), partial)
    assert torch.equal(listed(lists.by_q.full, shape, lists.kv_blocks), full)
    assert torch.equal(listed(lists.by_kv.partial, shape, lists.q_blocks), partial.transpose(2, 3))
    assert torch.equal(listed(lists.by_kv.full, shape, lists.q_blocks), full.transpose(2, 3))


# -- random masks

masks = random_masks(40)
lengths = st.integers(1, 80)
blocks = st.sampled_from([1, 8, 16, 32])


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(masks, lengths, lengths, blocks, blocks)
def test_exactly_the_blocks_of_the_definition(mask_mod, q_len: int, kv_len: int, block_q: int, block_kv: int):
    sizes = (2, 2, q_len, kv_len)
    check(create_block_mask(mask_mod, *sizes, "cpu", (block_q, block_kv)), mask_mod, sizes)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(masks, lengths, lengths, blocks)
def test_intervals_alone_drop_nothing_and_call_no_partial_block_full(mask_mod, q_len, kv_len, block):
    """Before any block is looked into."""
    from attn_engine.masks.classes import classes_from_grid, classes_from_ranges

    mask = create_block_mask(mask_mod, 2, 2, q_len, kv_len, "cpu", block)
    plan = mask.plan
    assert plan is not None
    partial, full = expected_blocks(dense(mask_mod, 2, 2, q_len, kv_len), block, block)
    count = plan.blocks.count["kv"]
    known = [classes_from_grid(plan.program.analysis, plan.blocks)]
    if plan.ranges is not None:
        known.append(classes_from_ranges(plan.ranges, plan.blocks))
    for classes in known:
        grids = []
        for part in (classes.full, classes.partial, classes.open):
            grid = torch.zeros(len(part.counts), count, dtype=torch.bool)
            grid[part.rows, part.columns] = True
            grids.append(grid.reshape(plan.blocks.batch, plan.blocks.heads, -1, count).expand_as(full))
        found_full, found_partial, undecided = grids
        assert not (found_full & ~full).any() and not (found_partial & ~partial).any()
        assert not ((partial | full) & ~(found_full | found_partial | undecided)).any()
    if len(known) == 2:  # ranges know exactly what the same conditions on a grid know
        assert all(
            np.array_equal(a.columns, b.columns) and np.array_equal(a.counts, b.counts)
            for a, b in zip(*((c.full, c.partial, c.open) for c in known))
        )


# -- torch's own function


def per_batch(offsets, b, h, q_idx, kv_idx):
    return kv_idx <= q_idx + offsets[b]


NAMED = {
    "noop": flex.noop_mask,
    "causal": library.causal(),
    "inverse causal": lambda b, h, q, k: q <= k,
    "window": library.sliding_window(100),
    "and of torch": flex.and_masks(library.causal(), library.sliding_window(200)),
    "or of none": or_masks(),
    "and of none": and_masks(),
    "and of one": and_masks(library.causal()),
    "and of four": and_masks(*[library.causal(n) for n in (3, 0, 9, 100)]),
    "documents": library.document(torch.arange(700) // 90),
    "clamped documents": lambda b, h, q, k: (torch.arange(700) // 90)[torch.clamp(q, 0, 600)] == k // 90,
    "offsets by partial": functools.partial(per_batch, torch.tensor([0, 300])),
    "two ends": lambda b, h, q, k: (k < 256) | (k >= 600),
    "flipped batch": lambda b, h, q, k: torch.where(b == 0, q >= k, q <= k),
    "dense random": lambda b, h, q, k: dense_random[b, h, q, k],
    "by head": lambda b, h, q, k: q - k < 64 * (h + 1),
    "all masked": lambda b, h, q, k: q < 0,
}  # fmt: skip
dense_random = torch.rand(2, 2, 700, 700, generator=torch.Generator().manual_seed(0)) < 0.001
documents = torch.arange(700) // 90
NAMED["clamped documents"] = lambda b, h, q, k: documents[torch.clamp(q, 0, 600)] == documents[k]


@pytest.mark.parametrize("size", [128, (128, 256), 64], ids=str)
@pytest.mark.parametrize("name", NAMED)
def test_the_same_blocks_as_torch(name: str, size):
    sizes = (2, 2, 700, 640)
    ours = create_block_mask(NAMED[name], *sizes, "cpu", size)
    theirs = flex.create_block_mask(NAMED[name], *sizes, "cpu", size)
    assert ours.shape == theirs.shape and ours.numel() == theirs.numel()
    assert ours.sparsity() == pytest.approx(theirs.sparsity(), abs=1e-4)
    assert torch.equal(ours.to_dense(), theirs.to_dense())
    for part in ("kv", "full_kv", "q", "full_q"):
        counts, indices = (getattr(theirs, f"{part}_{what}") for what in ("num_blocks", "indices"))
        assert torch.equal(getattr(ours, f"{part}_num_blocks"), counts)
        width = torch.arange(indices.shape[-1])
        inside = width < counts[..., None]
        assert torch.equal(getattr(ours, f"{part}_indices")[inside], indices[inside])


def test_what_is_the_same_for_all_is_kept_once():
    assert create_block_mask(library.causal(), 4, 8, 300, 300).lists().shape == (1, 1)
    assert create_block_mask(NAMED["by head"], 4, 8, 300, 300).lists().shape == (1, 8)
    assert create_block_mask(NAMED["by head"], None, None, 300, 300).shape == (1, 1, 300, 300)


@pytest.mark.parametrize(
    "mask_mod, kind",
    [
        (and_masks(), "nothing"),
        (library.and_masks(library.document(torch.arange(9000) // 700), library.sliding_window(1024)), "ranges"),
        (lambda b, h, q, k: (k <= q) & ((k < 4) | (q - k <= 100)), "ranges"),
        (lambda b, h, q, k: (q // 500 == k // 500) & ((q - k) % 4 == 0), "ranges"),
        (library.document(torch.tensor([5, 2, 7, 2, 9])[torch.arange(9000) // 2000]), "lists"),
    ],
)  # fmt: skip
def test_masks_with_a_closed_form_have_one(mask_mod, kind: str):
    plan = create_block_mask(mask_mod, None, None, 9000, 9000).plan
    assert plan is not None and plan.kind == kind


def test_full_blocks_among_the_partial_ones_where_asked():
    ours = create_block_mask(library.causal(), 1, 1, 512, 512, "cpu", separate_full_blocks=False)
    theirs = flex.create_block_mask(library.causal(), 1, 1, 512, 512, "cpu", separate_full_blocks=False)
    assert torch.equal(ours.kv_num_blocks, theirs.kv_num_blocks) and ours.full_kv_num_blocks is None
    assert not len(ours.lists().by_q.full.indices) and torch.equal(ours.q_num_blocks, theirs.q_num_blocks)


# -- what changes


def test_a_captured_tensor_that_changes_is_seen_and_nothing_else_plans_again():
    document_ids = torch.arange(1000) // 100
    mask = create_block_mask(library.document(document_ids), None, None, 1000, 1000, BLOCK_SIZE=32)
    before = mask.lists()
    assert mask.lists() is before
    document_ids.copy_(torch.arange(1000) // 333)
    assert mask.lists() is not before
    check(mask, library.document(document_ids), (1, 1, 1000, 1000))


def test_a_captured_number_and_another_tensor_are_seen_without_tracing_again(monkeypatch):
    from attn_engine.masks import program

    window, chunk = 10, torch.arange(300) // 20

    def mask_mod(b, h, q_idx, kv_idx):
        return (q_idx - kv_idx <= window) & (chunk[q_idx] == chunk[kv_idx])

    mask = create_block_mask(mask_mod, None, None, 300, 300, BLOCK_SIZE=16)
    check(mask, mask_mod, (1, 1, 300, 300))
    monkeypatch.setattr(program, "trace_plain_mask", None)
    window, chunk = 50, torch.arange(300) // 70
    check(mask, mask_mod, (1, 1, 300, 300))


def test_a_mask_made_anew_is_not_analysed_again():
    from attn_engine.masks.program import analysis_of

    for window in range(3):
        create_block_mask(lambda b, h, q, k: (q - k <= window) & (k <= q + 3), 1, 1, 256, 256).lists()
    before = analysis_of.cache_info().misses
    create_block_mask(lambda b, h, q, k: (q - k <= window) & (k <= q + 3), 1, 1, 256, 256).lists()
    assert analysis_of.cache_info().misses == before

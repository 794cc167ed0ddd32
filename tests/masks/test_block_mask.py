"""BlockMask: torch's surface, to and from torch, slices, and the mistakes that have a name."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch.nn.attention import flex_attention as flex
from torch.utils import _pytree as pytree

from attn_engine import BlockMask, create_block_mask, errors, library
from attn_engine.masks.mistakes import BlockMaskMismatch, MaskOnOtherDevice, NotABlockMask, WrongBlockMask

windows = torch.tensor([40, 300, 90])
offsets = torch.tensor([0, 200])


def by_batch_and_head(b, h, q_idx, kv_idx):
    return (q_idx + offsets[b] >= kv_idx) & (q_idx - kv_idx <= windows[h])


def ours(size=128) -> BlockMask:
    return create_block_mask(by_batch_and_head, 2, 3, 700, 900, "cpu", size)


def theirs(size=128):
    return flex.create_block_mask(by_batch_and_head, 2, 3, 700, 900, "cpu", size)


def same_blocks(mask: BlockMask, other) -> None:
    for part in ("kv", "full_kv", "q", "full_q"):
        counts, indices = (getattr(other, f"{part}_{what}") for what in ("num_blocks", "indices"))
        assert torch.equal(getattr(mask, f"{part}_num_blocks"), counts)
        inside = torch.arange(indices.shape[-1]) < counts[..., None]
        assert torch.equal(getattr(mask, f"{part}_indices")[inside], indices[inside])


def test_attributes():
    mask = ours((128, 64))
    assert mask.shape == (2, 3, 700, 900) and mask.numel() == 2 * 3 * 700 * 900
    assert mask.BLOCK_SIZE == (128, 64) and mask.seq_lengths == (700, 900)
    assert mask.mask_mod is by_batch_and_head and mask.device.type == "cpu"
    assert mask.kv_indices.dtype is torch.int32 and mask.kv_indices.shape == (2, 3, 6, 15)
    assert mask.q_indices.shape == (2, 3, 15, 6)


def test_the_views_are_those_of_torch():
    assert ours().to_string() == theirs().to_string()
    assert ours().to_string(grid_size=3, limit=2) == theirs().to_string(grid_size=3, limit=2)
    assert "sparsity" in repr(ours()) and "█" in str(ours())


@pytest.mark.parametrize(
    "index", [0, -1, (1, 2), (0, slice(1, 3)), (slice(None), -2), (1, slice(None), 3)], ids=str
)
def test_slices_are_those_of_torch(index):
    same_blocks(ours()[index], theirs()[index])


@pytest.mark.parametrize("which", [0, 1, 2])
def test_tensors_as_indices(which: int):
    index = [slice(None)] * 3
    index[which] = torch.tensor([1, 0, 1], dtype=torch.int32)
    same_blocks(ours()[tuple(index)], theirs()[tuple(index)])


def test_a_slice_keeps_its_meaning():
    """torch's slices lose their mask_mod; ours ask about where each position lay before."""
    whole = flex.create_mask(by_batch_and_head, 2, 3, 700, 900, "cpu")
    part = ours()[1, torch.tensor([2, 0]), 2:]
    assert part.shape == (1, 2, 700 - 256, 900)
    seen = flex.create_mask(part.mask_mod, *part.shape, "cpu")
    assert torch.equal(seen, whole[1:2, [2, 0], 256:])
    again = create_block_mask(part.mask_mod, *part.shape)
    same_blocks(again, part)


@pytest.mark.parametrize(
    "index", [2, (0, 3), (0, 0, 6), (0, 0, 0, 0), 1.5, (slice(5, 6),), torch.tensor([7])], ids=str
)
def test_an_index_outside(index):
    with pytest.raises(WrongBlockMask, match="index"):
        ours()[index]


def test_recipe_for_one_query():
    """What torch's users do for decoding: the row of one block, another mask_mod and length."""
    row = create_block_mask(library.causal(), 1, 1, 1024, 1024)[:, :, 4]

    def at_position_600(b, h, q_idx, kv_idx):
        return kv_idx <= q_idx + 600

    row.mask_mod = at_position_600
    row.seq_lengths = (1, 1024)
    assert row.shape == (1, 1, 1, 1024) and row.mask_mod is at_position_600
    assert row.kv_num_blocks.tolist() == [[[1]]] and row.full_kv_num_blocks.tolist() == [[[4]]]
    with pytest.raises(WrongBlockMask, match="1 and 8 blocks"):
        row.seq_lengths = (300, 1024)


def test_there_and_back_again():
    mask = BlockMask.from_torch(theirs())
    same_blocks(mask, theirs())
    assert mask.shape == theirs().shape and mask.mask_mod is by_batch_and_head
    given = ours().to_torch()
    assert isinstance(given, flex.BlockMask)
    same_blocks(BlockMask.from_torch(given), theirs())
    assert given.sparsity() == pytest.approx(theirs().sparsity(), abs=1e-4)
    assert BlockMask.from_torch(mask) is mask


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_torch_computes_with_what_we_give():
    q = torch.randn(2, 3, 700, 16)
    k, v = torch.randn(2, 2, 3, 900, 16).unbind(0)
    given = flex.flex_attention(q, k, v, block_mask=ours().to_torch())
    torch.testing.assert_close(given, flex.flex_attention(q, k, v, block_mask=theirs()))


@pytest.mark.parametrize("compute_q_blocks", [True, False])
def test_from_kv_blocks(compute_q_blocks: bool):
    counts = torch.tensor([[[2, 0, 1]]], dtype=torch.int32)
    indices = torch.tensor([[[[2, 0, 9], [7, 7, 7], [1, 0, 0]]]], dtype=torch.int32)
    full_counts, full_indices = torch.tensor([[[1, 0, 0]]]), torch.tensor([[[[1], [0], [0]]]])
    mask = BlockMask.from_kv_blocks(
        counts, indices, full_counts, full_indices, 32, library.causal(), (96, 70), compute_q_blocks
    )
    assert mask.shape == (1, 1, 96, 70)
    assert mask.lists().by_q.partial.row(0, 0, 0).tolist() == [0, 2]
    assert mask.lists().by_kv.partial.row(0, 0, 1).tolist() == [2]
    assert mask.lists().by_kv.full.row(0, 0, 1).tolist() == [0]
    assert (mask.q_num_blocks is not None) is compute_q_blocks
    assert mask.to_dense().tolist() == [[[[1, 1, 1], [0, 0, 0], [0, 1, 0]]]]


def test_from_kv_blocks_without_lengths_and_of_fewer_dimensions():
    mask = BlockMask.from_kv_blocks(torch.tensor([1, 2]), torch.tensor([[0, 0], [1, 0]]), BLOCK_SIZE=(64, 32))
    assert mask.shape == (1, 1, 128, 64) and mask.mask_mod is None and mask.full_kv_num_blocks is None
    assert mask.to_torch().full_kv_num_blocks is None


def test_no_block_at_all():
    mask = create_block_mask(lambda b, h, q, k: q < 0, 2, 2, 500, 500)
    assert mask.sparsity() == 100 and not len(mask.lists().by_kv.partial.indices)
    assert mask.kv_num_blocks.sum() == 0 and mask.to_dense().sum() == 0


BAD_BLOCKS = {
    "too many": (torch.tensor([[[3]]]), torch.tensor([[[[0, 1]]]]), None, None),
    "negative count": (torch.tensor([[[-1]]]), torch.tensor([[[[0, 1]]]]), None, None),
    "no such block": (torch.tensor([[[2]]]), torch.tensor([[[[0, 2]]]]), None, None),
    "twice": (torch.tensor([[[2]]]), torch.tensor([[[[1, 1]]]]), None, None),
    "both partial and full": (torch.tensor([[[1]]]), torch.tensor([[[[1, 0]]]])) * 2,
    "only one of the full ones": (torch.tensor([[[1]]]), torch.tensor([[[[1, 0]]]]), torch.tensor([[[1]]]), None),
    "floats": (torch.tensor([[[1.0]]]), torch.tensor([[[[1, 0]]]]), None, None),
    "other rows": (torch.tensor([[[1, 1]]]), torch.tensor([[[[1, 0]]]]), None, None),
    "one dimension": (torch.tensor([[[1]]]), torch.tensor([1, 0]), None, None),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_BLOCKS)
def test_blocks_that_fit_nothing(name: str):
    with pytest.raises(WrongBlockMask):
        BlockMask.from_kv_blocks(*BAD_BLOCKS[name])


def test_lengths_that_do_not_fit_the_blocks():
    with pytest.raises(WrongBlockMask, match="seq_lengths"):
        BlockMask.from_kv_blocks(torch.tensor([[[1]]]), torch.tensor([[[[0]]]]), seq_lengths=(300, 128))


def test_what_is_no_block_mask():
    with pytest.raises(NotABlockMask, match="kv_num_blocks"):
        BlockMask.from_torch(torch.ones(3))
    with pytest.raises(NotABlockMask, match="list"):
        BlockMask.from_kv_blocks([[[1]]], torch.tensor([[[[0]]]]))


def test_flattened_and_made_again():
    mask = ours()
    leaves, structure = pytree.tree_flatten({"mask": mask})
    assert leaves and all(isinstance(x, torch.Tensor) for x in leaves)
    again = pytree.tree_unflatten(leaves, structure)["mask"]
    same_blocks(again, mask)
    assert again.shape == mask.shape and again.mask_mod is by_batch_and_head
    assert pytree.tree_flatten({"mask": mask})[1] == structure


def test_copied_and_pickled():
    for again in (copy.deepcopy(ours()), pickle.loads(pickle.dumps(ours()))):
        same_blocks(again, ours())


def test_moved():
    mask = ours()
    same_blocks(mask.to("cpu"), mask)
    moved = mask.to("meta")
    assert moved.device.type == "meta" and moved.shape == mask.shape


def test_a_call_of_other_sizes():
    mask = ours()
    mask.check_call(2, 3, 700, 900)
    create_block_mask(library.causal(), None, None, 64, 64).check_call(5, 7, 64, 64)
    for what, sizes in {
        "B 2": (3, 3, 700, 900),
        "H 3": (2, 6, 700, 900),
        "Q_LEN 700": (2, 3, 701, 900),
        "KV_LEN 900": (2, 3, 700, 128),
    }.items():
        with pytest.raises(BlockMaskMismatch, match=what):
            mask.check_call(*sizes)


@pytest.mark.parametrize(
    "sizes", [(0, 1, 8, 8), (1, -1, 8, 8), (1, 1, 0, 8), (1, 1, 8, 0), (1, 1, 8.0, 8), (True, 1, 8, 8)]
)
def test_sizes_below_one(sizes):
    with pytest.raises(WrongBlockMask, match="int of 1 or more"):
        create_block_mask(library.causal(), *sizes)


@pytest.mark.parametrize("size", [0, -128, (128, 0), (1, 2, 3), 1.5, "128"])
def test_block_sizes_that_are_none(size):
    with pytest.raises(WrongBlockMask, match="BLOCK_SIZE"):
        create_block_mask(library.causal(), 1, 1, 256, 256, BLOCK_SIZE=size)


def reads_the_score(score, b, h, q_idx, kv_idx):
    return score > 0


def is_a_number(b, h, q_idx, kv_idx):
    return q_idx - kv_idx


def branches(b, h, q_idx, kv_idx):
    if q_idx > kv_idx:
        return q_idx >= 0
    return kv_idx > 3


def reads_too_far(b, h, q_idx, kv_idx):
    return windows[q_idx] > kv_idx


@pytest.mark.parametrize(
    "mask_mod, error, line",
    [
        (reads_the_score, errors.WrongParameters, "def reads_the_score"),
        (is_a_number, errors.MaskIsNotBool, "return q_idx - kv_idx"),
        (branches, errors.ControlFlowOnTraced, "if q_idx > kv_idx"),
        (reads_too_far, errors.IndexOutOfRange, "windows"),
        ("causal", WrongBlockMask, "create_block_mask"),
        (lambda b, h: True, errors.WrongParameters, "lambda"),
    ],
)  # fmt: skip
def test_masks_that_are_none(mask_mod, error, line: str):
    with pytest.raises(error) as caught:
        create_block_mask(mask_mod, 1, 1, 256, 256)
    assert line in str(caught.value) and "test_block_mask.py" in str(caught.value)


def test_tensors_on_another_device():
    ids = torch.empty(64, dtype=torch.int64, device="meta")
    with pytest.raises(MaskOnOtherDevice, match="ids' on meta"):
        create_block_mask(lambda b, h, q, k: ids[q] == ids[k], 1, 1, 64, 64, "cpu")


@pytest.mark.parametrize("combine", [library.and_masks, library.or_masks, library.not_mask])
def test_only_masks_can_be_combined(combine):
    with pytest.raises(errors.WrongArgument, match=r"masks\[0\]"):
        combine(3)

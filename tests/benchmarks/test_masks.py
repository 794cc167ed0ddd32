"""The benchmark of block masks: both contenders list the same blocks, and its table shows what was measured."""

from __future__ import annotations

import pytest

from attn_engine import BlockMask, create_block_mask
from benchmarks import masks, masks_report


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("name", masks.NAMES)
def test_the_same_blocks(name: str, heads: int):
    from torch.nn.attention import flex_attention

    case = masks.Case(name, 3000, heads)
    mask_mod = masks.mask_of(case, masks.data(case))
    ours = create_block_mask(mask_mod, None, heads, case.length, case.length, "cpu")
    theirs = flex_attention.create_block_mask(mask_mod, None, heads, case.length, case.length, "cpu")
    assert (BlockMask.from_torch(theirs).to_dense() == ours.to_dense()).all()
    assert (ours.full_kv_num_blocks == theirs.full_kv_num_blocks).all()


def test_table():
    measured = {
        "ms on one core": 1.0, "new function ms on one core": 2.0, "again ms on one core": 60.0, "MB": 4.0,
    }  # fmt: skip
    ratios = {"eager ratio": 150.0, "compiled ratio": 15.0}
    cases = {"window, 16384, 1 head": measured | ratios, "documents & window, 131072, 1 head": measured}
    lines = masks_report.markdown({"machine": {"processor": "p"}, "cases": cases}).splitlines()
    assert lines[-2] == "| window | 16384 | 1 | 1 | 2 | 60 | 4 | 150 x ✓ | 15 x ✗ 20 |"
    assert lines[-1] == "| documents & window | 131072 | 1 | 1 ✓ | 2 ✓ | 60 ✗ 50 | 4 ✓ |  |  |"

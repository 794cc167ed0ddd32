"""Blocks that a call cannot run on: the error names the argument, what was expected and what to do."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attn_engine import AttentionEngine, CustomIO, create_block_mask, meta_tensor
from attn_engine.errors import AttnEngineError, NotATensor
from attn_engine.runtime.block_sparse import WrongBlockSparse
from tests.lists.given import causal, drawn, engine

MASK = torch.ones(1, 2, 4, 4, dtype=torch.bool)
INDICES = torch.zeros(1, 2, 4, 3, dtype=torch.int32)
COUNTS = torch.ones(1, 2, 4, dtype=torch.int64)

WRONG = {
    "block_sparse_mask: its dtype is torch.float32": {"block_sparse_mask": MASK.float()},
    "block_sparse_mask: its dtype is torch.int32": {"block_sparse_mask": MASK.int()},
    "block_sparse_mask: its shape": {"block_sparse_mask": MASK[0]},
    "block_sparse_mask: its number of heads is 3": {"block_sparse_mask": MASK[:, :1].expand(1, 3, 4, 4)},
    "block_sparse_mask: its first size is 2": {"block_sparse_mask": MASK.expand(2, 2, 4, 4)},
    "block_sparse_mask: its number of rows is 5": {
        "block_sparse_mask": torch.ones(1, 2, 5, 4, dtype=torch.bool)
    },
    "block_sparse_mask: its number of kv blocks is 5": {
        "block_sparse_mask": torch.ones(1, 2, 4, 5, dtype=torch.bool)
    },
    "block_sparse_mask: an argument beside block_sparse_indices": {
        "block_sparse_mask": MASK,
        "block_sparse_indices": INDICES,
    },
    "block_sparse_indices: its dtype is torch.float32": {"block_sparse_indices": INDICES + 0.5},
    "block_sparse_indices: its dtype is torch.bool": {"block_sparse_indices": INDICES.bool()},
    "block_sparse_indices: a kv block is 4, not less than 4": {"block_sparse_indices": INDICES + 4},
    "block_num: it is given, not given with block_sparse_indices": {
        "block_sparse_mask": MASK,
        "block_num": COUNTS,
    },
    "block_num: its shape": {"block_sparse_indices": INDICES, "block_num": COUNTS[..., :2]},
    "block_num: its dtype": {"block_sparse_indices": INDICES, "block_num": COUNTS.float()},
    "block_num: its smallest element is -1": {"block_sparse_indices": INDICES, "block_num": COUNTS - 2},
    "block_num: its largest element is 4": {"block_sparse_indices": INDICES, "block_num": COUNTS + 3},
    "block_num: it is given alone": {"block_num": COUNTS, "block_size": None},
    "block_size: it is given alone": {"block_size": 32},
    "block_size: it is 24, not a power of two": {"block_sparse_mask": MASK, "block_size": 24},
    "block_size: it is 32.0, not a power of two": {"block_sparse_mask": MASK, "block_size": 32.0},
    "block_size: it is True, not a power of two": {"block_sparse_mask": MASK, "block_size": True},
    "block_size: it is 0, not a power of two": {"block_sparse_mask": MASK, "block_size": (32, 0)},
    "block_size: it is (1, 2, 3), not a number": {"block_sparse_mask": MASK, "block_size": (1, 2, 3)},
    "block_size: it is left out": {
        "block_sparse_indices": INDICES[:, :, :1].expand(1, 2, 100, 3),
        "block_size": None,
    },
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments(message: str) -> None:
    x, given = drawn((1, 2, 2), (100, 100)), dict(WRONG[message])
    if "block_size" not in given and "alone" not in message:
        given["block_size"] = 32
    for call in (engine("cpu"), engine("cpu").reference):
        with pytest.raises(WrongBlockSparse) as error:
            call(*x.tensors, **given)
        assert message in " ".join(str(error.value).split())


def test_no_tensor() -> None:
    x = drawn((1, 2, 2), (100, 100))
    with pytest.raises(NotATensor):
        engine("cpu")(*x.tensors, block_sparse_mask=[[True]], block_size=32)


def test_sequences_need_a_size_and_room() -> None:
    x, cu_len = drawn((1, 2, 2), (100, 100)), torch.tensor([0, 60, 100])
    q, k, v = (t[0] for t in x.tensors)
    blocks = torch.ones(2, 2, 2, 2, dtype=torch.bool)
    run = engine("cpu")
    run(q, k, v, cu_len_q=cu_len, block_sparse_mask=blocks, block_size=(32, 32))
    with pytest.raises(WrongBlockSparse, match="block_size: it is left out"):
        run(q, k, v, cu_len_q=cu_len, block_sparse_mask=blocks)
    with pytest.raises(WrongBlockSparse, match="its number of rows is 2, not 4 or more"):
        run(q, k, v, cu_len_q=cu_len, block_sparse_mask=blocks, block_size=(16, 32))


def test_indices_between_a_sequence_and_its_cache_are_ignored() -> None:
    x = drawn((2, 2, 2), (1, 100))
    numbers, lengths = torch.tensor([0, 2, 3]).expand(2, 2, 1, 3), torch.tensor([40, 90])
    run = engine("cpu", mask=None)
    o = run(*x.tensors, len_kv=lengths, block_sparse_indices=numbers, block_size=32)
    short = run(*x.tensors, len_kv=lengths.clamp(max=96), block_sparse_indices=numbers, block_size=32)
    assert torch.equal(o, short)
    with pytest.raises(WrongBlockSparse, match="a kv block is 4, not less than 4"):
        run(*x.tensors, len_kv=lengths, block_sparse_indices=numbers + 1, block_size=32)


def test_one_way_to_give_blocks() -> None:
    x = drawn((1, 2, 2), (128, 128))
    mask = create_block_mask(causal, None, None, 128, 128, "cpu", BLOCK_SIZE=32)
    with pytest.raises(WrongBlockSparse, match="an argument beside block_mask"):
        engine("cpu")(*x.tensors, block_mask=mask, block_sparse_mask=MASK, block_size=32)


def test_a_custom_input_keeps_its_name() -> None:
    def shifted(score: Any, custom: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return score + custom.input_tensors["block_num"][h]

    x = drawn((1, 2, 2), (40, 40))
    metas = [meta_tensor(None, None, None, 32, dtype=torch.float32)] * 3
    run = AttentionEngine(metas, shifted, CustomIO({"block_num": ("heads",)}), backend="cpu")
    assert torch.isfinite(run(*x.tensors, block_num=torch.randn(2))).all()


def test_other_arguments_are_still_refused() -> None:
    x = drawn((1, 2, 2), (40, 40))
    with pytest.raises(AttnEngineError):
        engine("cpu")(*x.tensors, block_sparse=MASK)

"""Tables of extremes are kept while what they were made from is unchanged, and made again after every change."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch
from torch import Tensor

from attn_engine import AttentionEngine, library, meta_tensor
from attn_engine.ir.expr import Load
from attn_engine.ir.ops import DType
from attn_engine.ir.program import Q_IDX
from attn_engine.ir.tile import TileTable
from attn_engine.runtime import tile_tables as module
from attn_engine.runtime.tile_tables import tile_tables

TABLE = TileTable("range", Load("ids", DType.INT, (Q_IDX,)), 4)


def table(ids: Tensor, length: int = 12) -> Tensor:
    sizes = {"q_len": length, "kv_len": length, "batches": 1, "heads": 1}
    return tile_tables((TABLE,), {"ids": ids}, {}, sizes, torch.float32)["range"]


def expected(ids: Tensor, length: int = 12) -> Tensor:
    return torch.stack([torch.stack(torch.aminmax(part)) for part in ids[:length].split(4)])


def test_kept_while_unchanged_and_made_again_after_an_in_place_change():
    ids = torch.arange(12)
    first = table(ids)
    assert table(ids) is first and torch.equal(first, expected(ids))
    ids[5] = 99
    assert torch.equal(table(ids), expected(ids))
    with torch.no_grad():
        ids.zero_()
    assert torch.equal(table(ids), expected(ids))
    view = ids[:6]
    view.add_(3)  # through a view of the same memory
    assert torch.equal(table(ids), expected(ids))


def test_another_length_and_another_tensor_have_their_own():
    ids = torch.arange(12)
    assert len(table(ids, 8)) == 2 and len(table(ids, 12)) == 3
    assert torch.equal(table(ids + 7), expected(ids + 7))


def shared_with_numpy() -> Tensor:
    return torch.from_numpy(np.arange(12))


def of_inference_mode() -> Tensor:
    with torch.inference_mode():
        return torch.arange(12)


def shared_with_processes() -> Tensor:
    return torch.arange(12).share_memory_()


@pytest.mark.parametrize("make", [shared_with_numpy, of_inference_mode, shared_with_processes])
def test_contents_that_can_change_uncounted_are_never_kept(make):
    ids = make()
    assert table(ids) is not table(ids)
    if make is shared_with_numpy:
        ids.numpy()[3] = -5
        assert torch.equal(table(ids), expected(ids))


def test_nothing_is_kept_of_a_tensor_that_is_gone():
    gc.collect()  # what other tests have left
    ids = torch.arange(12)
    table(ids)
    held = len(module._kept)
    del ids
    gc.collect()
    assert len(module._kept) == held - 1


def test_a_call_sees_documents_that_changed_in_place_and_makes_no_table_twice(monkeypatch):
    made: list[TileTable] = []
    make = module._table
    monkeypatch.setattr(module, "_table", lambda table, *rest: made.append(table) or make(table, *rest))
    ids = torch.zeros(96, dtype=torch.int64)
    meta = meta_tensor(None, None, None, 8, dtype=torch.float32)
    engine = AttentionEngine([meta] * 3, mask_mod=library.document(ids))
    q, k, v = torch.randn(3, 1, 96, 2, 8, generator=torch.Generator().manual_seed(0)).unbind(0)
    for _ in range(3):
        made.clear()
        torch.testing.assert_close(engine(q, k, v), engine.reference(q, k, v, dtype=torch.float32))
        assert len(made) == 2
        engine(q, k, v)
        assert len(made) == 2
        ids.copy_(torch.randint(0, 4, (96,)))

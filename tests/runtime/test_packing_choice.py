"""Heads are packed into a tile of rows where that hides no tile that one of them would skip."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attn_engine import AttentionEngine, meta_tensor
from attn_engine.ir.passes.pack_heads import Packing
from attn_engine.library import LocalStrideSparseAttention, causal
from attn_engine.runtime.backends import CpuBackend
from attn_engine.runtime.few_rows import choose_packing

METAS = [meta_tensor(None, None, None, 16, dtype=torch.float32)] * 3


def chosen(engine: AttentionEngine, rows: int) -> Packing:
    q, k = torch.empty(1, 8, rows, 16), torch.empty(1, 2, 200, 16)
    return choose_packing(engine.program, CpuBackend().schedule(engine.program), q, k)


@pytest.mark.parametrize("mask", [None, causal()])
def test_masks_that_bounds_decide_are_packed(mask: Any) -> None:
    engine = AttentionEngine(METAS, mask_mod=mask, layout="bhsd", backend="cpu")
    assert chosen(engine, 1) is Packing.ONE_QUERY and chosen(engine, 3) is Packing.QUERIES


def test_patterns_of_blocks_are_not() -> None:
    def engine_of(stride: int) -> AttentionEngine:
        module = LocalStrideSparseAttention(8, 256, 16, 2, stride, num_kv_heads=2, seq_dim=2)
        q, k = torch.randn(1, 8, 1, 16), torch.randn(1, 2, 200, 16)
        module(q, k, k)
        return next(iter(module._engines.values()))

    assert chosen(engine_of(4), 1) is Packing.NONE
    assert chosen(engine_of(1), 1) is Packing.ONE_QUERY  # all blocks: causal attention

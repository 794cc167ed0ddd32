"""Listed and given blocks in generated TileLang, run through its CPU target."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from attn_engine.codegen.lower.placed import Steps, walk_placed
from attn_engine.codegen.lower.placement import place
from attn_engine.codegen.pipeline import lower
from attn_engine.ir.program import ListedBlocks
from attn_engine.runtime.tilelang_backend import tilelang_schedule
from tests.lists import test_block_sparse
from tests.lists.given import causal, engine
from tests.lists.test_block_sparse import Case


def window(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return (kv_idx <= q_idx) & (q_idx - kv_idx < 50)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_block_outside_of_the_masks_bounds_is_no_trip(direction: str) -> None:
    """Its first tile would be one of another block: a masked tile that is visible."""
    program = engine("torch", torch.bfloat16, window, (64, 64)).program
    given = replace(program, listed=ListedBlocks(64, 64, tested=True))
    kernels = [k for k in lower(given, tilelang_schedule(64), direction).kernels if k.name != "delta"]
    assert kernels
    for kernel in kernels:
        placed = place(kernel, rounds=True)
        tiles = [s for s in walk_placed(placed.body) if isinstance(s, Steps) and s.pipelined]
        assert tiles and not placed.waits, "copies before such a loop are the threads' own"
    (dense,) = (k for k in lower(program, tilelang_schedule(64), "forward").kernels)
    assert place(dense, rounds=True).waits


CASES = (
    Case("window", sizes=(64, 64), mask=window, density=0.9),
    Case("small window", sizes=(16, 16), mask=window, density=0.9),
    Case("per token", lengths=(70, 70), sizes=(1, 16), mask=causal),
    Case("per token, window", lengths=(70, 70), sizes=(1, 64), mask=window, density=0.8),
    Case("small blocks", lengths=(70, 70), sizes=(8, 8)),
    Case("smallest blocks, no mask", lengths=(70, 130), sizes=(4, 4), mask=None, heads=1),
    *test_block_sparse.CASES,
)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_given_blocks(case: Case, seed: int) -> None:
    pytest.importorskip("tilelang")
    torch.manual_seed(seed)
    test_block_sparse.test_mask_of_blocks(case, "tilelang-cpu")

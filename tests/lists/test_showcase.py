"""The showcase of kernels that walk over lists, kept as text and read in review (see tests/test_golden.py)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from attn_engine import AttentionEngine, meta_tensor
from attn_engine.codegen.backends.cpu import CpuTarget, render_cpu
from attn_engine.codegen.pipeline import lower, with_header
from attn_engine.codegen.schedule import cpu_schedule, within_blocks
from attn_engine.ir.program import ListedBlocks
from tests.lists.test_listed import causal


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_listed_blocks(direction: str, golden: Callable[[str, str], None]) -> None:
    metas = [meta_tensor(None, None, None, 64, dtype=torch.float32)] * 3
    program = replace(
        AttentionEngine(metas, mask_mod=causal, backend="torch").program, listed=ListedBlocks(64, 64)
    )
    schedule = within_blocks(cpu_schedule(CpuTarget().lanes(program.element)), program.listed)
    kernel = lower(program, schedule, direction).kernel(direction)
    golden(
        f"softmax_listed_blocks_{direction}.cpp",
        render_cpu(with_header(kernel, "cpu", "golden"), CpuTarget()),
    )


def test_tokens_that_share_a_list(golden: Callable[[str, str], None]) -> None:
    """Two tokens of eight heads, side by side, over blocks of which each sees its own."""
    metas = [meta_tensor(None, None, None, 64, dtype=torch.float32)] * 3
    listed = ListedBlocks(16, 64, tested=True, parts=(2, 1), part_rows=8, group=8)
    traced = AttentionEngine(metas, mask_mod=causal, backend="torch")._present.with_lists(listed)
    schedule = within_blocks(cpu_schedule(CpuTarget().lanes(traced.program.element)), listed)
    kernel = lower(traced.program, schedule, "forward").kernel("forward")
    golden("softmax_tokens_forward.cpp", render_cpu(with_header(kernel, "cpu", "golden"), CpuTarget()))

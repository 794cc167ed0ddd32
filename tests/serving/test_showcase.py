"""The showcase of kernels over keys in pages, kept as text and read in review (see tests/test_golden.py)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from attn_engine import AttentionEngine, meta_tensor
from attn_engine.codegen.backends.cpu import CpuTarget, render_cpu
from attn_engine.codegen.backends.triton import render_triton
from attn_engine.codegen.pipeline import lower, with_header
from attn_engine.codegen.schedule import few_rows_schedule
from attn_engine.ir.program import Attention, Sequences
from tests.gpu_tiles import gpu_schedule
from tests.packed.programs import causal


def program(page: int) -> Attention:
    metas = [meta_tensor(None, None, None, 64, dtype=torch.float32)] * 3
    built = AttentionEngine(metas, mask_mod=causal, backend="torch").program
    return replace(built, sequences=Sequences(packed=False, page=page))


def test_cpu(golden: Callable[[str, str], None]) -> None:
    kernel = lower(program(16), few_rows_schedule(1), "decode").kernel("decode")
    golden("softmax_paged_decode.cpp", render_cpu(with_header(kernel, "cpu", "golden"), CpuTarget()))


def test_triton(golden: Callable[[str, str], None]) -> None:
    """A tile within a page, and a tile of several pages."""
    kernels = {n: lower(program(n), gpu_schedule(64, 64, 2), "forward").kernel("forward") for n in (64, 16)}
    golden("softmax_paged_forward.py", render_triton(with_header(kernels[64], "triton", "golden")))
    text = render_triton(with_header(kernels[16], "triton", "golden"))
    assert "K_rows = K + K_places[:, None]" in text
    assert text.count("tl.load(\n            block_table_base") == 1

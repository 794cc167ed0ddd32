"""The showcase of kernels over packed sequences, kept as text and read in review (see tests/test_golden.py)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from attn_engine import AttentionEngine, meta_tensor
from attn_engine.codegen.backends.cpu import CpuTarget, render_cpu
from attn_engine.codegen.backends.triton import render_triton
from attn_engine.codegen.pipeline import lower, with_header
from attn_engine.codegen.schedule import cpu_schedule
from attn_engine.ir.program import Attention, Sequences
from tests.gpu_tiles import gpu_schedule
from tests.packed.programs import causal


def program() -> Attention:
    metas = [meta_tensor(None, None, None, 64, dtype=torch.float32)] * 3
    built = AttentionEngine(metas, mask_mod=causal, backend="torch").program
    return replace(built, sequences=Sequences(packed=True))


def test_cpu(golden: Callable[[str, str], None]) -> None:
    schedule = cpu_schedule(CpuTarget().lanes(program().element))
    kernel = lower(program(), schedule, "forward").kernel("forward")
    golden("softmax_packed_forward.cpp", render_cpu(with_header(kernel, "cpu", "golden"), CpuTarget()))


def test_triton(golden: Callable[[str, str], None]) -> None:
    kernel = lower(program(), gpu_schedule(64, 64, 2), "backward").kernel("dkdv")
    golden("softmax_packed_dkdv.py", render_triton(with_header(kernel, "triton", "golden")))

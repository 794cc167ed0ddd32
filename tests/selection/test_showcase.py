"""Showcase kernels of a selection: the indexer of DeepSeek-V3.2 in C++ and in Triton."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from attn_engine import CustomIO, SelectionEngine, meta_tensor
from attn_engine.codegen.backends.cpu import CpuTarget, render_cpu
from attn_engine.codegen.backends.triton import render_triton
from attn_engine.codegen.lower.selection import SelectionSchedule, lower_selection
from attn_engine.ir.selection import Selection
from attn_engine.ir.tile import Kernel
from attn_engine.library import causal
from attn_engine.runtime.selection_triton import options_for, schedule_for


def indexer(dtype: torch.dtype, dim: int) -> Selection:
    def weighed(score: Any, custom: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        positive = torch.relu(score)
        return positive * custom.input_tensors["w"][b, q_idx, h]

    shapes = CustomIO({"w": ("batch", "seq_len", "heads")})
    metas = [meta_tensor(None, None, None, dim, dtype=dtype)] * 2
    return SelectionEngine(metas, weighed, causal(), shapes, backend="torch").program


def named(kernel: Kernel, backend: str) -> Kernel:
    return replace(kernel, header=(f"attn_engine golden | {kernel.header[0]} | {backend}", *kernel.header[1:]))


def test_showcase_of_a_selection(golden: Callable[[str, str], None]) -> None:
    program, target = indexer(torch.float32, 64), CpuTarget()
    schedule = SelectionSchedule(64, 4 * target.width(program.pairs.element))
    (kernel,) = lower_selection(program, schedule, split=False).kernels
    golden("selection_select.cpp", render_cpu(named(kernel, "cpu"), target))
    program = indexer(torch.bfloat16, 128)
    for kernel in lower_selection(program, schedule_for(program, 64), split=True).kernels:
        text = render_triton(named(kernel, "triton"), options_for(kernel))
        golden(f"selection_{kernel.name}.py", text)

"""The showcase of chunk kernels, kept as text and read in review. `--update-golden` rewrites it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from attn_engine import LinearAttentionEngine, meta_tensor
from attn_engine.codegen.backends.chunk_cpu import render_chunk_cpu
from attn_engine.codegen.backends.cpu import CpuTarget
from attn_engine.codegen.lower.chunked import lower_chunked_forward
from attn_engine.codegen.lower.chunked_backward import lower_chunked_backward
from attn_engine.library.linear import gated_delta_net


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_gated_delta_net(direction: str, golden: Callable[[str, str], None]) -> None:
    metas = [meta_tensor(None, None, None, 64, dtype=torch.float32)] * 3
    program = LinearAttentionEngine(metas, **gated_delta_net(64), backend="torch").program
    wanted = ("q", "k", "v", "decay", "beta", *(c.name for c in program.captures))
    forward = direction == "forward"
    kernel = lower_chunked_forward(program) if forward else lower_chunked_backward(program, wanted)
    text = render_chunk_cpu(kernel, CpuTarget(), 32, (f"gated delta net: {direction} | cpu | golden",))
    golden(f"gated_delta_net_{direction}.cpp", text)

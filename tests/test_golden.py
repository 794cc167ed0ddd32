"""The showcase: a fixed handful of generated kernels, kept as text and read in review. `--update-golden` rewrites them.

The C++ is rendered for a named target (AVX-512), not for the machine that runs the test.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from attn_engine import AttentionEngine, meta_tensor
from attn_engine.codegen.backends.cpu import CpuTarget, render_cpu
from attn_engine.codegen.backends.triton import TritonOptions, render_triton
from attn_engine.codegen.pipeline import lower, with_header
from attn_engine.codegen.schedule import Schedule, cpu_schedule, few_rows_schedule
from attn_engine.ir.tile import Kernel
from attn_engine.library import OnlineRetention
from tests.gpu_tiles import gpu_schedule


def causal(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return kv_idx <= q_idx


def softmax_causal() -> dict[str, Any]:
    return {"mask_mod": causal}


def soft_cap_alibi_window() -> dict[str, Any]:
    cap, window = 30.0, 512
    slopes = torch.zeros(8, requires_grad=True)

    def score_mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        squashed = cap * torch.tanh(score / cap)
        distance = q_idx - kv_idx
        return squashed - slopes[h] * distance

    def mask_mod(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        in_past = kv_idx <= q_idx
        in_window = q_idx - kv_idx < window
        return in_past & in_window

    return {"score_mod": score_mod, "mask_mod": mask_mod}


def retention_documents() -> dict[str, Any]:
    documents = torch.zeros(4096, dtype=torch.int32)

    def mask_mod(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        same_document = documents[q_idx] == documents[kv_idx]
        return same_document & (kv_idx <= q_idx)

    return {"online_func": OnlineRetention(), "mask_mod": mask_mod}


def learned_pair_bias() -> dict[str, Any]:
    bias = torch.zeros(8, 4096, 4096, requires_grad=True)

    def score_mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return score + bias[h, q_idx, kv_idx]

    return {"score_mod": score_mod}


SHOWCASE: dict[str, Callable[[], dict[str, Any]]] = {
    f.__name__: f for f in (softmax_causal, soft_cap_alibi_window, retention_documents, learned_pair_bias)
}


def _cpp(kernel: Kernel, _: Schedule) -> str:
    return render_cpu(with_header(kernel, "cpu", "golden"), CpuTarget())


def _triton(kernel: Kernel, schedule: Schedule) -> str:
    launch = schedule.launch(kernel.name)
    options = TritonOptions(launch.num_warps, launch.num_stages, schedule.descriptors)
    return render_triton(with_header(kernel, "triton", "golden"), options)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("name", SHOWCASE)
def test_showcase(name: str, backend: str, direction: str, golden: Callable[[str, str], None]) -> None:
    dtype = torch.float32 if backend == "cpu" else torch.bfloat16
    engine = AttentionEngine(
        [meta_tensor(None, None, None, 64, dtype=dtype)] * 3, **SHOWCASE[name](), backend="torch"
    )
    program = engine.program
    schedule = (
        cpu_schedule(CpuTarget().lanes(program.element, program.dim_qk, program.dim_v))
        if backend == "cpu"
        else gpu_schedule(64, 64, 2)
    )
    learned = tuple(c.name for c in program.differentiable_captures)
    render, ending = (_cpp, "cpp") if backend == "cpu" else (_triton, "py")
    for kernel in lower(program, schedule, direction, learned).kernels:
        if kernel.name != "delta":
            golden(f"{name}_{kernel.name}.{ending}", render(kernel, schedule))


def test_showcase_of_few_query_rows(golden: Callable[[str, str], None]) -> None:
    metas = [meta_tensor(None, None, None, 64, dtype=torch.bfloat16)] * 3
    program = AttentionEngine(metas, **soft_cap_alibi_window(), backend="torch").program
    schedule = few_rows_schedule(2)
    (kernel,) = lower(program, schedule, "forward").kernels
    golden("soft_cap_alibi_window_few_rows_forward.cpp", _cpp(kernel, schedule))


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_showcase_of_pairs(direction: str, golden: Callable[[str, str], None]) -> None:
    metas = [meta_tensor(None, None, None, 64, dtype=torch.bfloat16)] * 3
    program = AttentionEngine(metas, **softmax_causal(), backend="torch").program
    target = CpuTarget(bfloat16_dot=True)
    kernel = lower(program, cpu_schedule(target.lanes(program.element)), direction).kernel(direction)
    golden(f"softmax_causal_pairs_{direction}.cpp", render_cpu(with_header(kernel, "cpu", "golden"), target))

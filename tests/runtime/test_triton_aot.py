"""Generated Triton compiles for GPUs that this machine does not have, and fits them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from attn_engine import AttentionEngine, meta_tensor
from attn_engine.codegen.pipeline import lower
from attn_engine.codegen.schedule import gpu_schedule
from attn_engine.ir.tile import Kernel
from attn_engine.library import causal
from attn_engine.runtime.backends import TritonBackend
from attn_engine.runtime.triton_aot import SHARED_LIMITS, TARGETS, AotReport, compile_ahead

BACKEND = TritonBackend("triton", interpret=False)
NOISE = 16  # bytes that ptxas keeps on the stack of some kernels, outside their loops
KERNELS = ("forward", "delta", "dq", "dkdv")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an earlier run compiled says nothing about this one."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def showcase(
    name: str, element: torch.dtype = torch.bfloat16, dims: int = 64, mask: Callable[..., Any] | None = None
) -> Kernel:
    """A kernel of the heaviest built-in description: soft-cap and learned ALiBi slopes under a causal mask."""
    slopes = torch.zeros(8, requires_grad=True)
    engine = AttentionEngine(
        [meta_tensor(None, None, None, dims, dtype=element)] * 3,
        score_mod=lambda s, b, h, q_idx, kv_idx: 30 * torch.tanh(s / 30) - slopes[h] * (q_idx - kv_idx),
        mask_mod=mask or causal(),
        backend="triton",
    )
    schedule = gpu_schedule(dims, dims, element.itemsize)
    kernels = [
        k for d in ("forward", "backward") for k in lower(engine.program, schedule, d, ("slopes",)).kernels
    ]
    return next(k for k in kernels if k.name == name)


def compiled(kernel: Kernel, target: str, element: torch.dtype = torch.bfloat16) -> AotReport:
    """With the schedule and the options of a launch."""
    dims = kernel.block("d") if any(axis == "d" for axis, _ in kernel.tile) else 64
    schedule = gpu_schedule(dims, dims, element.itemsize)
    options = BACKEND.options(kernel, schedule)
    return compile_ahead(kernel, BACKEND.source(kernel, schedule), target, options)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", KERNELS)
def test_showcase_fits_the_target(name: str, target: str) -> None:
    report = compiled(showcase(name), target)
    assert 0 < report.registers <= 255, report
    assert report.spill_bytes <= NOISE, report
    assert 0 < report.shared_bytes <= SHARED_LIMITS[target], report
    units = {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma", "gfx942": "v_mfma"}
    products = dict(report.products)
    assert (units[target] in products) == (name != "delta"), report
    assert f"{name} on {target}" in str(report)


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("name", ["forward", "dq", "dkdv"])
def test_head_dimension_128_does_not_spill(name: str, target: str) -> None:
    report = compiled(showcase(name, dims=128), target)
    assert report.spill_bytes <= NOISE, report
    assert report.shared_bytes <= SHARED_LIMITS[target], report


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("name", ["forward", "dq", "dkdv"])
def test_skipping_tiles_while_the_loop_runs_does_not_spill(name: str, target: str) -> None:
    ids = torch.arange(64)

    def documents(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return (ids[q_idx] == ids[kv_idx]) & (kv_idx <= q_idx)

    report = compiled(showcase(name, mask=documents), target)
    assert report.spill_bytes <= NOISE, report
    assert report.shared_bytes <= SHARED_LIMITS[target], report


@pytest.mark.parametrize("element", [torch.float16, torch.float32])
def test_other_elements_compile(element: torch.dtype) -> None:
    report = compiled(showcase("forward", element, dims=24), "sm_90", element)
    assert report.shared_bytes <= SHARED_LIMITS["sm_90"], report
    assert ("wgmma.mma_async" in dict(report.products)) == (element is torch.float16), (
        report
    )  # float32 stays exact


def test_a_kernel_too_large_does_not_fit() -> None:
    report = AotReport("forward", "sm_90", 255, 0, 228 * 1024 + 1, SHARED_LIMITS["sm_90"], (), 1.0)
    assert not report.fits
    assert not AotReport("forward", "sm_90", 255, 128, 1024, SHARED_LIMITS["sm_90"], (), 1.0).fits


def test_unknown_target() -> None:
    with pytest.raises(KeyError):
        compile_ahead(showcase("delta"), "", "sm_1")


def test_disassembler_is_in_the_wheel() -> None:
    import triton

    tools = Path(str(triton.__file__)).parent / "backends" / "nvidia" / "bin"
    assert all(shutil.which(str(tools / tool)) for tool in ("cuobjdump", "nvdisasm"))

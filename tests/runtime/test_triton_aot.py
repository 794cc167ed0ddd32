"""Generated Triton compiles for GPUs that this machine does not have, and fits them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from attn_engine.codegen.backends.triton import TritonOptions, render_triton
from attn_engine.codegen.pipeline import lower
from attn_engine.codegen.schedule import Edges, Gradients, Schedule
from attn_engine.ir.expr import Load, call
from attn_engine.ir.ops import DType, Op, Storage
from attn_engine.ir.program import HEAD, KV_IDX, Q_IDX, SCORE, Captured
from attn_engine.ir.tile import Kernel
from attn_engine.runtime.triton_aot import SHARED_LIMITS, TARGETS, AotReport, compile_ahead
from tests.runtime.rules import function, program

SLOPES = Captured("slopes", Storage.FLOAT32, 1)
SOFT_CAP = function(
    30.0 * call(Op.TANH, SCORE / 30.0) - Load("slopes", DType.FLOAT, (HEAD,)) * (Q_IDX - KV_IDX), SLOPES
)
CAUSAL = function(KV_IDX <= Q_IDX)
WIDE = Schedule(128, 64, 32, 64, Edges.BRANCH, Gradients.TWO_KERNELS)  # forward and dQ, dK and dV at D = 64
NOISE = 16  # bytes that ptxas keeps on the stack of some kernels, outside their loops
KERNELS = ("forward", "delta", "dq", "dkdv")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an earlier run compiled says nothing about this one."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def showcase(name: str, element: Storage = Storage.BFLOAT16, dims: int = 64) -> Kernel:
    attention = program(SOFT_CAP, CAUSAL, element=element, dim_qk=dims, dim_v=dims)
    kernels = [k for d in ("forward", "backward") for k in lower(attention, WIDE, d, ("slopes",)).kernels]
    return next(k for k in kernels if k.name == name)


def compiled(kernel: Kernel, target: str) -> AotReport:
    options = TritonOptions(4, 1) if kernel.name == "dkdv" else TritonOptions(8, 2)
    return compile_ahead(kernel, render_triton(kernel, options), target, options)


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


@pytest.mark.parametrize("element", [Storage.FLOAT16, Storage.FLOAT32])
def test_other_elements_compile(element: Storage) -> None:
    report = compiled(showcase("forward", element, dims=24), "sm_90")
    assert report.shared_bytes <= SHARED_LIMITS["sm_90"], report
    assert ("wgmma.mma_async" in dict(report.products)) == (element is Storage.FLOAT16), (
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

"""TileLang text is lowered without a GPU, compiled by nvcc where there is one, and read back."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from attn_engine.errors import BackendNotInstalled, CompilationFailed
from attn_engine.runtime import tilelang_aot
from attn_engine.runtime.tilelang_aot import LoweredKernel, cubin_of, find_nvcc, lower_tilelang

pytest.importorskip("tilelang")
needs_nvcc = pytest.mark.skipif(find_nvcc() is None, reason="no nvcc on this machine")

# A product of matrices, long enough for a pipelined loop; `length` is an argument of the factory.
PRODUCT = """
import tilelang.language as T


def product(length=1024):
    @T.prim_func
    def main(
        A: T.Tensor((128, length), T.bfloat16), B: T.Tensor((128, length), T.bfloat16),
        C: T.Tensor((128, 128), T.float32),
    ):
        with T.Kernel(1, threads=256):
            a = T.alloc_shared((128, 64), T.bfloat16)
            b = T.alloc_shared((128, 64), T.bfloat16)
            c = T.alloc_fragment((128, 128), T.float32)
            T.fill(c, 0)
            for k in T.Pipelined(length // 64, num_stages=2):
                T.copy(A[0, k * 64], a)
                T.copy(B[0, k * 64], b)
                T.gemm(a, b, c, transpose_B=True, policy=T.GemmWarpPolicy.FullRow)
            T.copy(c, C)

    return main
"""


@pytest.fixture(scope="module")
def lowered() -> LoweredKernel:
    return lower_tilelang(PRODUCT, "product", "sm_90", length=512)


def test_lowered_without_a_gpu(lowered: LoweredKernel) -> None:
    assert "tma_load" in lowered.text
    assert "wgmma" in lowered.text
    assert lowered.threads >= 256
    assert lowered.shared_bytes >= 2 * 2 * 128 * 64 * 2, "two stages of two tiles"


@needs_nvcc
def test_compiled_to_machine_code(lowered: LoweredKernel) -> None:
    report = cubin_of(lowered)
    assert report.fits, report
    assert dict(report.products)["HGMMA"] > 0, report
    code = report.machine_code()
    assert code.count("UTMALDG") > 0
    assert code.main_loop is not None
    assert report.shared_bytes >= lowered.shared_bytes


@pytest.mark.slow
def test_lowered_for_amd() -> None:
    assert "mfma" in lower_tilelang(PRODUCT, "product", "gfx942").text


@needs_nvcc
def test_text_that_nvcc_rejects(lowered: LoweredKernel) -> None:
    broken = LoweredKernel("product", "sm_90", "extern int x = ;", 1, 0, 0.0)
    with pytest.raises(CompilationFailed, match="source kept at") as caught:
        cubin_of(broken)
    assert Path(caught.value.source).read_text() == broken.text


def test_no_nvcc(lowered: LoweredKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tilelang_aot, "find_nvcc", lambda: None)
    with pytest.raises(BackendNotInstalled, match=r"tilelang\[nvcc\]"):
        cubin_of(lowered)


def test_where_nvcc_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert find_nvcc.__wrapped__() == nvcc


def test_tilelang_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tilelang", None)
    with pytest.raises(BackendNotInstalled, match="pip install 'tilelang"):
        lower_tilelang(PRODUCT, "product", "sm_90")


def test_unknown_target() -> None:
    with pytest.raises(KeyError):
        lower_tilelang(PRODUCT, "product", "sm_1")

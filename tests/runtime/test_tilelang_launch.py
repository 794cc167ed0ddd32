"""Everything around a TileLang launch on a GPU that needs none: targets, arguments, alignment, refusals."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

import pytest
import torch

from attn_engine import AttentionEngine, meta_tensor
from attn_engine.codegen.pipeline import lower
from attn_engine.errors import BackendNotInstalled, LaunchFailed, UnsupportedOnBackend
from attn_engine.ir.ops import Storage
from attn_engine.ir.tile import Kernel, Param
from attn_engine.runtime.backends import backend_named
from attn_engine.runtime.tilelang_backend import (
    TileLangBackend,
    has_bulk_copies,
    stages_for,
    tilelang_schedule,
)
from attn_engine.runtime.tilelang_launch import TileLangKernel, architecture, in_whole_lines, target_of

WIDE = Param("Q", Storage.BFLOAT16, ("batches", "heads", "q_len", "dim_qk"))
OUT = Param("O", Storage.BFLOAT16, ("batches", "heads", "q_len", "dim_v"), True)


def causal(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return kv_idx <= q_idx


def engine(dtype: torch.dtype = torch.bfloat16, dim: int = 64, backend: str = "torch") -> AttentionEngine:
    return AttentionEngine(
        [meta_tensor(None, None, None, dim, dtype=dtype)] * 3, mask_mod=causal, backend=backend
    )


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.bfloat16)


def forward(dim: int = 64) -> Kernel:
    (kernel,) = lower(engine(dim=dim).program, tilelang_schedule(dim), "forward").kernels
    return kernel


def tensors(kernel: Kernel, dim: int = 64, q_len: int = 70) -> dict[str, torch.Tensor]:
    sizes = {
        "batches": 2,
        "heads": 4,
        "kv_heads": 2,
        "q_len": q_len,
        "kv_len": 90,
        "dim_qk": dim,
        "dim_v": dim,
    }
    types = {Storage.BFLOAT16: torch.bfloat16, Storage.FLOAT32: torch.float32}
    return {
        p.name: torch.full([sizes[s] for s in p.shape], float("nan"), dtype=types[p.storage])
        for p in kernel.params
    }


def test_tensors_come_first_and_numbers_follow() -> None:
    kernel = forward()
    launch = TileLangKernel(kernel, lambda arch: "")
    given = tensors(kernel, q_len=72)
    arguments, back = launch.arguments(given, {"scale": 1, "unread": 3})
    assert [x.data_ptr() for x in arguments[:-1]] == [given[p.name].data_ptr() for p in kernel.params]
    assert isinstance(arguments[-1], float) and not back


def test_the_grid_counts_tiles_of_the_first_axis() -> None:
    launch = TileLangKernel(forward(), lambda arch: "")
    assert launch.grid({"q_len": 129, "heads": 4, "batches": 2, "kv_heads": 2, "kv_len": 1}) == (2, 4, 2)


def test_empty_grids_are_not_launched() -> None:
    kernel = forward()
    sizes = {"q_len": 0, "heads": 4, "batches": 2, "kv_heads": 2, "kv_len": 90}
    TileLangKernel(kernel, lambda arch: "").launch(tensors(kernel, q_len=0), {"scale": 1.0}, sizes)


def test_too_many_blocks_are_an_error_of_ours() -> None:
    kernel = forward()
    sizes = {"q_len": 70, "heads": 70000, "batches": 2, "kv_heads": 2, "kv_len": 90}
    with pytest.raises(LaunchFailed, match="at most"):
        TileLangKernel(kernel, lambda arch: "").launch(tensors(kernel), {"scale": 1.0}, sizes)


@pytest.mark.parametrize(
    ("x", "copied"),
    [
        (drawn(2, 3, 5, 64), False),
        (drawn(2, 5, 3, 64).transpose(1, 2), False),
        (drawn(2, 3, 5, 36), True),  # rows of 72 bytes
        (drawn(2, 3, 5, 128)[..., :64], False),
        (drawn(2, 3, 5, 72)[..., 4:68], True),  # begins in the middle of a line
        (drawn(2, 3, 64, 5).transpose(2, 3), True),
        (drawn(2, 1, 5, 64).expand(2, 3, 5, 64), True),
        (drawn(1, 1, 1, 64), False),
    ],
    ids=["whole", "other layout", "36 wide", "half of rows", "shifted", "columns", "expanded", "single"],
)
def test_rows_begin_at_whole_lines(x: torch.Tensor, copied: bool) -> None:
    fit = in_whole_lines(x, WIDE)
    assert torch.equal(fit, x)
    assert all(stride % 8 == 0 for stride in fit.stride()[:-1]) and fit.stride(-1) == 1
    assert (fit.data_ptr() != x.data_ptr()) is copied


def test_outputs_that_do_not_fit_are_copied_back() -> None:
    kernel = forward(36)
    given = tensors(kernel, 36)
    _, back = TileLangKernel(kernel, lambda arch: "").arguments(given, {"scale": 1.0})
    assert given["O"].data_ptr() in [to.data_ptr() for to, _ in back]
    assert all(to.shape == source.shape for to, source in back)


def test_targets_and_stages() -> None:
    assert target_of("sm_90a") == {"kind": "cuda", "arch": "sm_90a"}
    assert target_of("gfx942") == {"kind": "hip", "mcpu": "gfx942"}
    assert [stages_for(arch, 2) for arch in ("sm_90a", "sm_100a", "sm_80", "sm_89", "gfx942")] == [
        2,
        2,
        1,
        1,
        1,
    ]
    assert not has_bulk_copies("gfx942")


@pytest.mark.parametrize(
    ("capability", "arch"), [((9, 0), "sm_90a"), ((8, 0), "sm_80"), ((8, 9), "sm_89"), ((12, 0), "sm_120a")]
)
def test_architectures(capability: tuple[int, int], arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    assert architecture() == arch


def test_old_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    with pytest.raises(UnsupportedOnBackend, match=r"8\.0"):
        architecture()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_wide_elements_are_refused_on_a_gpu(dtype: torch.dtype) -> None:
    with pytest.raises(UnsupportedOnBackend, match="triton"):
        TileLangBackend("tilelang", on_cpu=False).refuse(engine(dtype).program, ())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_elements_are_refused_on_the_cpu(dtype: torch.dtype) -> None:
    q = torch.randn(1, 8, 1, 64, dtype=dtype)
    with pytest.raises(UnsupportedOnBackend, match="float32"):
        engine(dtype, backend="tilelang-cpu")(q, q, q)


def test_without_tilelang_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tilelang", None)
    backend = backend_named("tilelang")
    with pytest.raises(BackendNotInstalled, match="pip install"):
        backend.compile(forward(), tilelang_schedule(64))


def test_the_source_needs_neither_tilelang_nor_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tilelang", None)
    shown = engine(backend="cpu").source(backend="tilelang")
    assert "@T.prim_func" in shown and 'engine.source(backend="tilelang", kernel="forward")' in shown
    assert all(word in engine().source("tilelang", "backward") for word in ("def dq(", "def dkdv("))


@pytest.mark.slow
def test_tilelang_compiles_it_for_a_gpu_that_is_not_here() -> None:
    from attn_engine.runtime.tilelang_aot import find_nvcc

    if importlib.util.find_spec("tilelang") is None or find_nvcc() is None:
        pytest.skip("needs tilelang and nvcc")
    kernel = forward()
    backend = TileLangBackend("tilelang", on_cpu=False)
    launch = TileLangKernel(kernel, lambda arch: backend.source_for(kernel, tilelang_schedule(64), arch))
    compiled = launch.compiled("sm_90a")
    assert "wgmma" in compiled.get_kernel_source()  # pyright: ignore[reportFunctionMemberAccess]

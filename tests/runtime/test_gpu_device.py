"""Bad luck with GPUs: none, an old driver, one that is not supported, tensors that cannot be addressed."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

from attn_engine import errors
from attn_engine.runtime import gpu_device
from attn_engine.runtime.gpu_device import check_properties, check_strides, explained, missing_gpu
from attn_engine.runtime.triton_launch import compile_triton
from tests.small_engine import engine, qkv

OLD = (
    "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver by downloading "
    "and installing a new version from the URL: http://www.nvidia.com/Download/index.aspx"
)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_no_gpu() -> None:
    with pytest.raises(errors.NoGpu, match=r"(?s)triton.*finds none here.*triton-interpreter"):
        engine(backend="triton")(*qkv())


def test_a_gpu_and_tensors_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(errors.BackendDeviceMismatch, match="does not run tensors on cpu"):
        engine(backend="triton")(*qkv())


def test_an_old_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        raise RuntimeError(OLD)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", fails)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(
        errors.OldDriver, match=r"(?s)supports CUDA 11\.4.*for CUDA 13\.0.*driver\s+580\.65 or newer"
    ):
        engine(backend="triton")(*qkv())


def test_other_messages_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = "Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU"
    assert "Found no NVIDIA driver" in str(explained("triton", reason))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    assert "there is no CUDA" in str(missing_gpu("triton"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert missing_gpu("triton") is None


@pytest.mark.parametrize(("major", "minor"), [(7, 5), (6, 0), (13, 0)])
def test_an_unsupported_architecture(major: int, minor: int) -> None:
    with pytest.raises(errors.UnsupportedGpu, match=f"(?s)sm_{major}{minor}.*sm_80"):
        check_properties(SimpleNamespace(name="some GPU", major=major, minor=minor))


def test_architectures_of_amd() -> None:
    check_properties(SimpleNamespace(name="MI300X", gcnArchName="gfx942:sramecc+:xnack-", major=9, minor=4))
    with pytest.raises(errors.UnsupportedGpu, match="gfx1030"):
        check_properties(SimpleNamespace(name="RX 6800", gcnArchName="gfx1030", major=10, minor=3))


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)])
def test_supported_architectures(capability: tuple[int, int]) -> None:
    check_properties(SimpleNamespace(name="some GPU", major=capability[0], minor=capability[1]))


def test_a_call_asks_for_the_device_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def properties(index: int) -> SimpleNamespace:
        asked.append(index)
        return SimpleNamespace(name="some GPU", major=7, minor=0)

    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    gpu_device._check_properties.cache_clear()
    with pytest.raises(errors.UnsupportedGpu):
        gpu_device.check_gpu(torch.device("cuda", 3))
    assert asked == [3]


def test_rows_too_far_apart_for_a_tile() -> None:
    def strided(row: int, column: int = 1) -> torch.Tensor:
        x = torch.empty(1, device="meta")
        return x.as_strided((1, 1, 256, 64), (2**40, 2**40, row, column))

    check_strides("k", strided(2**31 // 256))
    check_strides("k", torch.empty((2**20, 2**10, 8, 64), device="meta"))
    with pytest.raises(errors.StridesTooLarge, match=r"(?s)k has strides.*k\.contiguous\(\)"):
        check_strides("k", strided(2**31 // 255 + 1))
    with pytest.raises(errors.StridesTooLarge):
        check_strides("k", strided(2**31 // 256, 2**20))


def test_triton_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(errors.BackendNotInstalled, match=r"pip\s+install\s+'triton"):
        compile_triton(SimpleNamespace(name="forward"), "")  # type: ignore[arg-type]

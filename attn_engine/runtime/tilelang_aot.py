"""Compile generated TileLang ahead of time: to CUDA or HIP text without any toolkit, and with nvcc to machine code."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from attn_engine.errors import BackendNotInstalled, CompilationFailed
from attn_engine.runtime.aot_report import SHARED_LIMITS, AotReport
from attn_engine.runtime.sass import PRODUCTS, read_cubin
from attn_engine.runtime.source_module import load_source

# What TileLang calls our targets. "sm_90" without the a has no instructions of warp groups, and does not compile.
_TARGETS = {
    "sm_80": {"kind": "cuda", "arch": "sm_80"},
    "sm_90": {"kind": "cuda", "arch": "sm_90a"},
    "sm_100": {"kind": "cuda", "arch": "sm_100a"},
    "gfx942": {"kind": "hip", "mcpu": "gfx942"},
}
INSTALL = "Install it: pip install 'tilelang>=0.1.15,<0.2' (without a network: put its wheels on PYTHONPATH)."
_SECONDS_TO_COMPILE = 300


@dataclass(frozen=True, slots=True)
class LoweredKernel:
    """A TileLang kernel as CUDA or HIP text. threads: per block. shared_bytes: that a launch asks for, per block."""

    kernel: str
    target: str
    text: str
    threads: int
    shared_bytes: int
    seconds: float


def lower_tilelang(source: str, name: str, target: str, **arguments: Any) -> LoweredKernel:
    """The CUDA or HIP text of the TileLang function `name` in `source`, for a target of SHARED_LIMITS.

    arguments: given to the function where it makes the prim_func instead of being it. Needs no GPU and no toolkit.
    Raises BackendNotInstalled without tilelang, KeyError for another target, and TileLang's own errors.
    """
    tilelang = import_tilelang()
    wanted = dict(_TARGETS[target])
    function = getattr(load_source(source, name), name)
    begin = time.perf_counter()
    with tilelang.tvm.target.Target(wanted):
        function = function if isinstance(function, tilelang.tvm.tirx.PrimFunc) else function(**arguments)
        lowered = tilelang.lower(function, target=wanted)
    seconds = time.perf_counter() - begin
    (device,) = lowered.device_mod.functions.values()
    return LoweredKernel(
        name,
        target,
        str(lowered.kernel_source),
        int(device.attrs["thread_extent"]["threadIdx.x"]),
        int(device.attrs.get("dyn_shared_memory_buf", 0)),
        seconds,
    )


def cubin_of(lowered: LoweredKernel, *, fast_math: bool = False) -> AotReport:
    """What the kernel asks of its NVIDIA target, compiled by nvcc as a launch would.

    Raises BackendNotInstalled without nvcc, and CompilationFailed where nvcc rejects the text.
    """
    nvcc, arch = find_nvcc(), _TARGETS[lowered.target]["arch"]
    if nvcc is None:
        raise BackendNotInstalled(
            backend="tilelang",
            needs="nvcc",
            instead="Install it: pip install 'tilelang[nvcc]', or point CUDA_HOME at a CUDA toolkit.",
        )
    root = Path(str(import_tilelang().__file__)).parent
    folder = Path(tempfile.mkdtemp(prefix="attn_engine_nvcc_"))
    text, cubin = folder / f"{lowered.kernel}.cu", folder / f"{lowered.kernel}.cubin"
    text.write_text(lowered.text)
    command = [
        str(nvcc), "-std=c++20", "-gencode", f"arch=compute_{arch[3:]},code={arch}", "-cubin", "-w",
        *(["--use_fast_math"] if fast_math else []),
        f"-I{root / 'src'}", f"-I{root / '3rdparty' / 'cutlass' / 'include'}", "-o", str(cubin), str(text),
    ]  # fmt: skip
    begin = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS_TO_COMPILE)
    seconds = lowered.seconds + time.perf_counter() - begin
    if done.returncode != 0:
        raise CompilationFailed(command=" ".join(command), source=text, output=done.stderr or done.stdout)
    code = cubin.read_bytes()
    shutil.rmtree(folder)
    return _report(lowered, code, seconds)


def _report(lowered: LoweredKernel, cubin: bytes, seconds: float) -> AotReport:
    code = read_cubin(cubin)
    return AotReport(
        lowered.kernel,
        lowered.target,
        code.registers,
        code.spill_bytes,
        lowered.shared_bytes + code.static_shared_bytes,
        SHARED_LIMITS[lowered.target],
        tuple((name, code.count(name)) for name in PRODUCTS if code.count(name)),
        seconds,
        cubin,
    )


@cache
def find_nvcc() -> Path | None:
    """CUDA's compiler: below $CUDA_HOME, on the PATH, from tilelang[nvcc], or in its usual place; None: nowhere."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    on_path = shutil.which("nvcc")
    candidates = [
        *([Path(home) / "bin" / "nvcc"] if home else []),
        *([Path(on_path)] if on_path else []),
        *_nvcc_of_the_package(),
        Path("/usr/local/cuda/bin/nvcc"),
    ]
    return next((path for path in candidates if path.exists()), None)


def _nvcc_of_the_package() -> list[Path]:
    try:
        files = importlib.metadata.files("nvidia-cuda-nvcc") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    return [Path(str(file.locate())) for file in files if file.name == "nvcc"]


def import_tilelang() -> Any:
    """The package. Raises BackendNotInstalled, with how to install it, where it is missing or does not load."""
    try:
        import tilelang
    except ImportError as error:
        raise BackendNotInstalled(
            backend="tilelang", needs=f"the package tilelang ({error})", instead=INSTALL
        ) from error
    return tilelang

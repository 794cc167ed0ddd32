"""The backends by name, and what each can do. An explicit choice never falls back to another."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from attn_engine.codegen.backends.cpu import render_cpu
from attn_engine.codegen.backends.triton import TritonOptions, render_triton
from attn_engine.codegen.gpu_schedule import default_schedule
from attn_engine.codegen.lower.capture import CaptureGradient, runs_side_by_side
from attn_engine.codegen.lower.scaled import COLUMNS_OF_SCALE, SCALED, is_scaled, scale_param
from attn_engine.codegen.pipeline import with_header
from attn_engine.codegen.schedule import Schedule, cpu_schedule, torch_schedule, within_blocks
from attn_engine.errors import (
    BackendNotInstalled,
    CompilerMissing,
    GradientNotSupported,
    UnknownBackend,
    UnsupportedOnBackend,
)
from attn_engine.ir.expr import MOST_PIECES
from attn_engine.ir.ops import Number, Storage
from attn_engine.ir.printer import format_kernel
from attn_engine.ir.program import Attention
from attn_engine.ir.tile import Kernel
from attn_engine.runtime.backend import Backend, Launchable
from attn_engine.runtime.gpu_target import current_device_name, current_target
from attn_engine.runtime.scaled import dequantised
from attn_engine.runtime.tilelang_backend import TileLangBackend
from attn_engine.version import VERSION

NAMES = (
    "auto", "cpu", "torch", "triton", "triton-interpreter", "tilelang", "tilelang-cpu", "reference",
)  # fmt: skip
DEVICES = {
    "cpu": "cpu", "torch": "cpu", "triton-interpreter": "cpu", "triton": "cuda",
    "tilelang-cpu": "cpu", "tilelang": "cuda",
}  # fmt: skip


class CpuBackend:
    """Generated C++, compiled by the machine's compiler."""

    name = "cpu"

    def schedule(self, program: Attention) -> Schedule:
        from attn_engine.runtime.cpu_compile import host_target

        lanes = host_target().lanes(program.element, program.dim_qk, program.dim_v)
        return cpu_schedule(lanes, masked=program.mask is not None)

    def refuse(self, program: Attention, captures: Sequence[CaptureGradient]) -> None:
        """Nothing is refused."""

    def source(self, kernel: Kernel, schedule: Schedule) -> str:
        from attn_engine.runtime.cpu_compile import host_target

        return render_cpu(with_header(kernel, self.name, VERSION), host_target())

    def compile(self, kernel: Kernel, schedule: Schedule) -> Launchable:
        from attn_engine.runtime.cpu_compile import compile_cpu

        return compile_cpu(kernel, self.source(kernel, schedule))


@dataclass(frozen=True)
class TileProgram:
    """A tile kernel carried out by torch, statement by statement."""

    kernel: Kernel

    def launch(
        self, tensors: Mapping[str, Tensor], scalars: Mapping[str, Number], sizes: Mapping[str, int]
    ) -> None:
        from attn_engine.runtime.tile_program import run_kernel

        if is_scaled(self.kernel):  # for checking numbers: the caches are copied
            wide = {n: dequantised(tensors[n], tensors[scale_param(n)], torch.float32) for n in SCALED}
            tensors = {**tensors, **wide}
        run_kernel(self.kernel, tensors, scalars, sizes)


class TorchBackend:
    """The same tile kernels with torch as the machine: needs no compiler, works wherever torch does."""

    name = "torch"

    def schedule(self, program: Attention) -> Schedule:
        return torch_schedule()

    def refuse(self, program: Attention, captures: Sequence[CaptureGradient]) -> None:
        """Nothing is refused."""

    def source(self, kernel: Kernel, schedule: Schedule) -> str:
        return format_kernel(with_header(kernel, self.name, VERSION))

    def compile(self, kernel: Kernel, schedule: Schedule) -> Launchable:
        return TileProgram(kernel)


class ReferenceBackend(TorchBackend):
    """The dense float64 evaluation: the engine answers calls itself; the tile kernels are there to be read."""

    name = "reference"


@dataclass(frozen=True)
class TritonBackend:
    """Generated Triton, launched on a GPU or carried out by Triton's interpreter on the CPU."""

    name: str
    interpret: bool

    def schedule(self, program: Attention) -> Schedule:
        chosen = default_schedule(program, current_target(), current_device_name())
        return interpreter_schedule(chosen) if self.interpret else chosen

    def refuse(self, program: Attention, captures: Sequence[CaptureGradient]) -> None:
        most = COLUMNS_OF_SCALE * MOST_PIECES
        if program.cache is not None and max(program.dim_qk, program.dim_v) > most:
            feature = f"keys and values in float8 of more than {most} columns"
            raise UnsupportedOnBackend(backend=self.name, feature=feature, instead='Use backend="cpu".')
        if program.element is Storage.FLOAT64 and not self.interpret:
            raise UnsupportedOnBackend(
                backend=self.name, feature="float64", instead='Use backend="cpu", or float32 tensors.'
            )
        if (clash := runs_side_by_side(tuple(captures))) is not None:
            raise GradientNotSupported(
                backend=self.name,
                what=f"{clash.load.tensor!r}: several pairs of one tile read the same element of it, and the order of "
                "their sum would not be fixed",
                instead='Index it with q_idx and kv_idx themselves, detach it, or use backend="cpu".',
            )

    def options(self, kernel: Kernel, schedule: Schedule) -> TritonOptions:
        launch = schedule.launch(kernel.name)
        return TritonOptions(launch.num_warps, launch.num_stages, schedule.descriptors)

    def source(self, kernel: Kernel, schedule: Schedule) -> str:
        return render_triton(with_header(kernel, self.name, VERSION), self.options(kernel, schedule))

    def compile(self, kernel: Kernel, schedule: Schedule) -> Launchable:
        if importlib.util.find_spec("triton") is None:
            raise BackendNotInstalled(
                backend=self.name,
                needs="the package triton",
                instead="Install it: pip install 'triton>=3.6,<3.8'.",
            )
        from attn_engine.runtime.triton_launch import compile_triton

        options = self.options(kernel, schedule)
        return compile_triton(
            kernel,
            self.source(kernel, schedule),
            options,
            interpret=self.interpret,
            pointers=lambda: self.source(kernel, replace(schedule, descriptors=False)),
        )


def interpreter_schedule(schedule: Schedule) -> Schedule:
    """The interpreter's cost is per step, nearly whatever the tile: large tiles, same structure."""
    return replace(
        schedule, block_q=64, block_kv=64, backward_q=64, backward_kv=64, d_query=None, delta_rows=0
    )


def schedule_for(program: Attention, backend: Backend, schedule: Schedule | None = None) -> Schedule:
    """That schedule, or the backend's choice for a program, in tiles that its listed blocks can be cut into."""
    return within_blocks(schedule or backend.schedule(program), program.listed)


@cache
def backend_named(name: str) -> Backend:
    """The backend of that name; raises UnknownBackend.

    "cpu" without a C++ compiler on the machine is carried out by torch, with one warning.
    """
    match name:
        case "cpu":
            from attn_engine.runtime.cpu_compile import find_compiler

            if find_compiler() is None:
                warnings.warn(
                    "no C++ compiler found (tried $CXX, c++, g++, clang++): attention runs as a torch program, slower. "
                    "Install g++ or clang++, or choose backend='torch' to silence this.",
                    CompilerMissing,
                    stacklevel=2,
                )
                return TorchBackend()
            return CpuBackend()
        case "torch":
            return TorchBackend()
        case "reference":
            return ReferenceBackend()
        case "triton":
            return TritonBackend("triton", interpret=False)
        case "triton-interpreter":
            return TritonBackend("triton-interpreter", interpret=True)
        case "tilelang":
            return TileLangBackend("tilelang", on_cpu=False)
        case "tilelang-cpu":
            return TileLangBackend("tilelang-cpu", on_cpu=True)
        case _:
            raise UnknownBackend(backend=name, known=", ".join(repr(n) for n in NAMES))


def backend_for(chosen: str, device: str | None = None) -> str:
    """The backend that runs on a type of device where "auto" was chosen; None: on the best device of this machine."""
    if chosen != "auto":
        return chosen
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    found = {"cpu": "cpu", "cuda": "triton"}.get(device)
    if found is None:
        raise UnsupportedOnBackend(
            backend="auto", feature=f"{device} tensors", instead="Move them to the CPU or to a CUDA device."
        )
    return found

"""Backend "tilelang" of linear attentions: on a GPU, or ("tilelang-cpu") through TileLang's CPU target."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attn_engine.codegen.backends.tilelang_chunk import TileLangPhase, render_chunk_tilelang
from attn_engine.codegen.backends.triton_chunk_params import ChunkOptions
from attn_engine.codegen.chunk_schedule import ChunkSchedule, tilelang_chunk_schedule
from attn_engine.codegen.lower.chunk_phases import ChunkPhase
from attn_engine.errors import BackendDeviceMismatch, LaunchFailed, UnsupportedOnBackend
from attn_engine.ir.ops import Number, Storage
from attn_engine.runtime.gpu_device import check_gpu, missing_gpu
from attn_engine.runtime.linear_phases import PhaseChunks
from attn_engine.runtime.phase_arguments import ArgumentValue, TensorText, argument_values
from attn_engine.runtime.tilelang_cpu import CpuFunction, library_of
from attn_engine.runtime.tilelang_launch import architecture, compile_text
from attn_engine.version import VERSION


@dataclass(eq=False)
class TileLangChunks(PhaseChunks):
    """on_cpu: the same text without threads, for tests. schedule: None: the default."""

    on_cpu: bool = False
    schedule: ChunkSchedule | None = None

    def __post_init__(self) -> None:
        wide = self.program.element in (Storage.FLOAT32, Storage.FLOAT64)
        if wide != self.on_cpu or self.program.element is Storage.FLOAT64:
            instead = 'Use backend="triton", or bfloat16 or float16 tensors: TileLang would round products to 10 bits.'
            if self.on_cpu:
                instead = "Use float32 tensors: TileLang's CPU target has no arithmetic for this dtype."
            raise UnsupportedOnBackend(backend=self.name, feature=self.program.element.value, instead=instead)

    @property
    def name(self) -> str:
        return "tilelang-cpu" if self.on_cpu else "tilelang"

    def chosen(self) -> ChunkSchedule:
        return self.schedule or tilelang_chunk_schedule(self.program, self.chunk)

    def source(self, direction: str, wanted: Sequence[str] = ()) -> str:
        """The TileLang of "forward" or "backward"."""
        phases, options = self.phases(direction, wanted)
        header = (
            f"attn_engine {VERSION} | {self.program.name}: {direction} | {self.name} | "
            f"chunks of {options[0].chunk} tokens",
            f'regenerate: engine.source("{direction}")',
        )
        return render_chunk_tilelang(phases, options, self.on_cpu, header)

    def load(
        self, source: str, phases: Sequence[ChunkPhase], options: Sequence[ChunkOptions]
    ) -> tuple[TileLangLaunch, ...]:
        return tuple(TileLangLaunch(p, o, source, self.on_cpu) for p, o in zip(phases, options, strict=True))

    def check_device(self, device: torch.device) -> None:
        needed = "cpu" if self.on_cpu else "cuda"
        if device.type != needed:
            missing = None if self.on_cpu else missing_gpu(self.name)
            instead = (
                'Use backend="tilelang".' if self.on_cpu else "Move the tensors, or choose another backend."
            )
            raise missing or BackendDeviceMismatch(backend=self.name, device=device, instead=instead)
        if needed == "cuda":
            check_gpu(device)


class TileLangLaunch:
    """One phase, compiled at its first launch."""

    def __init__(self, phase: ChunkPhase, options: ChunkOptions, source: str, on_cpu: bool) -> None:
        self.name, self.over_sequences = phase.name, phase.carried is not None
        self._source, self._on_cpu = source, on_cpu
        renderer = TileLangPhase(phase, options, on_cpu)
        renderer.kernel_lines()
        self._known = _values(renderer)
        self._order = [self._known[a.tensor.name] for a in renderer.arguments]
        self._order += [self._known[n] for n in renderer.numbers]
        self._compiled: dict[str, Callable[..., Any]] = {}

    def __call__(
        self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Number], grid: tuple[int, int]
    ) -> None:
        """Run it; outputs are written in place. Raises LaunchFailed with TileLang's own error as its cause."""
        if 0 in grid:
            return
        if self._on_cpu:
            self._cpu()(tensors, numbers)
            return
        try:
            self._launch(tensors, numbers)
        except Exception as error:
            raise LaunchFailed(
                kernel=self.name, backend="tilelang", reason=str(error) or repr(error)
            ) from error

    def _cpu(self) -> Callable[..., Any]:
        found = self._compiled.get("cpu")
        if found is None:
            known = {
                name: (lambda t, n, f=value: x.data_ptr() if isinstance(x := f(t, n), Tensor) else x)
                for name, value in self._known.items()
            }
            library = library_of(self.name, self._source)
            found = self._compiled["cpu"] = CpuFunction(self.name, library, known)
        return found

    def _launch(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Number]) -> None:
        arguments = [value(tensors, numbers) for value in self._order]
        device = next(x.device for x in arguments if isinstance(x, Tensor))
        arch = architecture(device)
        if arch not in self._compiled:
            self._compiled[arch] = compile_text(self._source, self.name, arch)
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            self._compiled[arch](*arguments)


def _values(renderer: TileLangPhase) -> dict[str, ArgumentValue]:
    """How to get each argument's value from a launch's tensors and numbers, by the name that the text has for it."""
    scalars = {renderer.spelled[v.name]: v.name for v in renderer.program.scalars}
    own = {spelled: name for name, spelled in renderer.spelled.items()}
    tensors = [
        TensorText(own.get(a.tensor.name, a.tensor.name), a.tensor.name, a.shape, a.strides)
        for a in renderer.arguments
    ]
    return argument_values(scalars, tensors)

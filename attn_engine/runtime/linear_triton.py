"""Backend "triton" of linear attentions: on a GPU, or through Triton's interpreter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from attn_engine.codegen.backends.triton_chunk import render_chunk_triton
from attn_engine.codegen.backends.triton_chunk_params import ChunkOptions
from attn_engine.codegen.chunk_schedule import ChunkSchedule, chunk_schedule, interpreter_schedule
from attn_engine.codegen.lower.chunk_phases import ChunkPhase
from attn_engine.errors import BackendDeviceMismatch, UnsupportedOnBackend
from attn_engine.ir.ops import Storage
from attn_engine.runtime.gpu_device import check_gpu, missing_gpu
from attn_engine.runtime.gpu_target import current_target
from attn_engine.runtime.linear_inputs import LinearInputs
from attn_engine.runtime.linear_phases import PhaseChunks
from attn_engine.runtime.linear_triton_launch import ChunkLaunch, load_phases
from attn_engine.version import VERSION


@dataclass(eq=False)
class TritonChunks(PhaseChunks):
    """schedule: None: the default of the GPU at hand."""

    interpret: bool = False
    schedule: ChunkSchedule | None = None

    def __post_init__(self) -> None:
        if self.program.element is Storage.FLOAT64 and not self.interpret:
            instead = 'Use backend="torch" or "cpu", or float32 tensors.'
            raise UnsupportedOnBackend(backend=self.name, feature="float64", instead=instead)

    @property
    def name(self) -> str:
        return "triton-interpreter" if self.interpret else "triton"

    def chosen(self) -> ChunkSchedule:
        if self.schedule is not None:
            return self.schedule
        found = chunk_schedule(self.program, current_target(), self.chunk)
        return interpreter_schedule(found) if self.interpret else found

    def source(self, direction: str, wanted: Sequence[str] = ()) -> str:
        """The Triton of "forward" or "backward"."""
        phases, options = self.phases(direction, wanted)
        header = (
            f"attn_engine {VERSION} | {self.program.name}: {direction} | triton | chunks of {options[0].chunk} tokens",
            f'regenerate: engine.source("{direction}")',
        )
        return render_chunk_triton(phases, options, header)

    def load(
        self, source: str, phases: Sequence[ChunkPhase], options: Sequence[ChunkOptions]
    ) -> tuple[ChunkLaunch, ...]:
        return load_phases(source, phases, options, self.interpret)

    def states_dtype(self, inputs: LinearInputs) -> torch.dtype:
        return inputs.v.dtype

    def check_device(self, device: torch.device) -> None:
        needed = "cpu" if self.interpret else "cuda"
        if device.type != needed:
            missing = missing_gpu(self.name) if needed == "cuda" else None
            instead = (
                "Move the tensors, or choose another backend."
                if needed == "cuda"
                else 'Use backend="triton".'
            )
            raise missing or BackendDeviceMismatch(backend=self.name, device=device, instead=instead)
        if needed == "cuda":
            check_gpu(device)

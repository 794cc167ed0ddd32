"""Launch generated chunk kernels: on the GPU, or through Triton's interpreter on the CPU."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from attn_engine.codegen.backends.triton_chunk import PhaseRenderer, chunk_arguments
from attn_engine.codegen.backends.triton_chunk_params import ChunkOptions
from attn_engine.codegen.lower.chunk_phases import ChunkPhase
from attn_engine.errors import BackendNotInstalled, LaunchFailed
from attn_engine.ir.ops import Number
from attn_engine.runtime.phase_arguments import ArgumentValue, TensorText, argument_values
from attn_engine.runtime.source_module import load_source


class ChunkLaunch:
    """One phase, ready to launch."""

    def __init__(self, phase: ChunkPhase, options: ChunkOptions, function: Any, interpret: bool) -> None:
        self.name, self.options, self.interpret = phase.name, options, interpret
        self.over_sequences = phase.carried is not None
        self._function = function
        known = _values(PhaseRenderer(phase, options))
        self._values = [known[name] for name in chunk_arguments(phase, options)]

    def __call__(
        self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Number], grid: tuple[int, int]
    ) -> None:
        """Run it; outputs are written in place. grid: programs for sequences or chunks and parts, and heads. Raises
        LaunchFailed with Triton's own error as its cause."""
        if 0 in grid:
            return
        try:
            self._run(grid, [value(tensors, numbers) for value in self._values])
        except Exception as error:
            backend = "triton-interpreter" if self.interpret else "triton"
            raise LaunchFailed(kernel=self.name, backend=backend, reason=str(error) or repr(error)) from error

    def _run(self, grid: tuple[int, int], args: list[Any]) -> None:
        if self.interpret:
            from attn_engine.runtime.triton_interpreter import interpret

            interpret(self._function, grid, *args)
            return
        device = next(x.device for x in args if isinstance(x, Tensor))
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            self._function[grid](*args, num_warps=self.options.num_warps, num_stages=self.options.num_stages)


def load_phases(
    source: str, phases: Sequence[ChunkPhase], options: Sequence[ChunkOptions], interpret: bool
) -> tuple[ChunkLaunch, ...]:
    """The kernels of a file. Raises BackendNotInstalled where there is no triton package."""
    if importlib.util.find_spec("triton") is None:
        instead = "Install it: pip install 'triton>=3.6,<3.8'."
        raise BackendNotInstalled(backend="triton", needs="the package triton", instead=instead)
    module = load_source(source, "linear_attention")
    return tuple(
        ChunkLaunch(p, o, getattr(module, p.name), interpret) for p, o in zip(phases, options, strict=True)
    )


def _values(renderer: PhaseRenderer) -> dict[str, ArgumentValue]:
    """How to get each argument's value from a launch's tensors and numbers."""
    scalars = {renderer.spelled[v.name]: v.name for v in renderer.program.scalars}
    tensors = [TensorText(t.name, x.name, x.sizes, x.strides) for t, x in renderer.spelled_tensors()]
    return argument_values(scalars, tensors)

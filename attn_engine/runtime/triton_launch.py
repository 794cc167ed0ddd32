"""Launch generated Triton kernels: on the GPU, or through the interpreter on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from attn_engine.codegen.backends.triton import TritonOptions, argument_names
from attn_engine.codegen.backends.triton_address import GRID_SIZES, captured, stride_names
from attn_engine.errors import BackendNotInstalled, LaunchFailed
from attn_engine.ir.ops import DType, Number
from attn_engine.ir.tile import Kernel
from attn_engine.runtime.source_module import load_source

_LENGTHS = {"q": "q_len", "kv": "kv_len"}
_MOST_PROGRAMS = (2**31 - 1, 65535, 65535)  # CUDA's limits of a grid's three dimensions
_Call = tuple[Mapping[str, Tensor], Mapping[str, Number], Mapping[str, int]]


class TritonKernel:
    """A generated kernel, ready to launch. Triton compiles it at the first launch on a GPU, and keeps it on disk."""

    def __init__(self, kernel: Kernel, source: str, options: TritonOptions, interpret: bool) -> None:
        self.name = kernel.name
        self.options = options
        self.interpret = interpret
        self._function = getattr(load_source(source, kernel.name), kernel.name)
        known = _arguments(kernel)
        self._values = [known[name] for name in argument_names(kernel)]
        self._grid = [
            (_LENGTHS.get(a) or GRID_SIZES[a], kernel.block(a) if a in _LENGTHS else 1) for a in kernel.grid
        ]

    def launch(
        self, tensors: Mapping[str, Tensor], scalars: Mapping[str, Number], sizes: Mapping[str, int]
    ) -> None:
        """Launch the kernel; outputs are written in place.

        tensors: one per parameter, by name, in logical order of dimensions with any strides, on one device.
        scalars: the kernel's run-time numbers. sizes: "batches", "heads", "kv_heads", "q_len", "kv_len" and, where the
        grid has splits, "splits". Raises LaunchFailed with Triton's own error as its cause.
        """
        grid = self.grid({**scalars, **sizes})
        if 0 in grid:
            return
        call = (tensors, scalars, sizes)
        args = [value(call) for value in self._values]
        try:
            self._run(grid, args)
        except Exception as error:
            raise LaunchFailed(
                kernel=self.name, backend=self._backend, reason=str(error) or repr(error)
            ) from error

    def grid(self, sizes: Mapping[str, Number]) -> tuple[int, int, int]:
        """How many program instances there are along each of the launch's three dimensions."""
        counts = [-(-int(sizes[size]) // block) for size, block in self._grid]
        shared = 1
        for count in counts[2:]:
            shared *= count
        first, second = (*counts[:2], 1, 1)[:2]
        return first, second, shared

    @property
    def _backend(self) -> str:
        return "triton-interpreter" if self.interpret else "triton"

    def _run(self, grid: tuple[int, int, int], args: list[Any]) -> None:
        if self.interpret:
            from attn_engine.runtime.triton_interpreter import interpret

            interpret(self._function, grid, *args)
            return
        for count, most in zip(grid, _MOST_PROGRAMS, strict=True):
            if count > most:
                raise ValueError(
                    f"a grid of {grid} program instances; the device takes at most {_MOST_PROGRAMS}"
                )
        device = next(x.device for x in args if isinstance(x, Tensor))
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            self._function[grid](*args, num_warps=self.options.num_warps, num_stages=self.options.num_stages)


def compile_triton(
    kernel: Kernel, source: str, options: TritonOptions | None = None, *, interpret: bool = False
) -> TritonKernel:
    """`source` as a kernel to launch. Raises BackendNotInstalled where there is no triton package."""
    try:
        import triton  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError as error:
        raise BackendNotInstalled(
            backend="triton",
            needs="the package triton",
            instead="Install it: pip install 'triton>=3.6,<3.8'.",
        ) from error
    return TritonKernel(kernel, source, options or TritonOptions(), interpret)


def _arguments(kernel: Kernel) -> dict[str, Callable[[_Call], Any]]:
    """How to get each argument's value from a launch's tensors, numbers and sizes."""

    def tensor(name: str) -> Callable[[_Call], Any]:
        return lambda call: call[0][name]

    def stride(name: str, dimension: int) -> Callable[[_Call], Any]:
        return lambda call: call[0][name].stride(dimension)

    def extent(name: str, dimension: int) -> Callable[[_Call], Any]:
        return lambda call: call[0][name].shape[dimension]

    def number(name: str, kind: Callable[[Number], Number]) -> Callable[[_Call], Any]:
        return lambda call: kind(call[1][name])

    def size(name: str) -> Callable[[_Call], Any]:
        return lambda call: call[2][name]

    found: dict[str, Callable[[_Call], Any]] = {
        n: size(n) for n in (*GRID_SIZES.values(), *_LENGTHS.values())
    }
    found |= {s.name: number(s.name, float if s.dtype is DType.FLOAT else int) for s in kernel.scalars}
    for p in kernel.params:
        found[p.name] = tensor(p.name)
        found |= {name: stride(p.name, i) for i, name in enumerate(stride_names(p))}
        if captured(p):
            found |= {own: extent(p.name, i) for i, own in enumerate(p.shape)}
    return found

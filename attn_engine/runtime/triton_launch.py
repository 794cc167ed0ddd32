"""Launch generated Triton kernels: on the GPU, or through the interpreter on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from attn_engine.codegen.backends.triton import TritonOptions, argument_names
from attn_engine.codegen.backends.triton_address import GRID_SIZES, captured, stride_names
from attn_engine.codegen.backends.triton_descriptors import TileDescriptor, tile_descriptors
from attn_engine.codegen.backends.triton_grid import section_size
from attn_engine.codegen.lower.scaled import SCALES
from attn_engine.errors import BackendNotInstalled, LaunchFailed
from attn_engine.ir.ops import DType, Number, Storage
from attn_engine.ir.tile import Kernel
from attn_engine.runtime.gpu_target import converts_float8
from attn_engine.runtime.source_module import load_source

_LENGTHS = {"q": "q_len", "kv": "kv_len"}
_MOST_PROGRAMS = (2**31 - 1, 65535, 65535)  # CUDA's limits of a grid's three dimensions
_DESCRIPTOR_BYTES = 16  # what a tensor descriptor's address and strides are multiples of
_Call = tuple[Mapping[str, Tensor], Mapping[str, Number], Mapping[str, int]]


class TritonKernel:
    """A generated kernel, ready to launch. Triton compiles it at the first launch on a GPU, and keeps it on disk.

    pointers: makes the same kernel without tensor descriptors, for calls whose tensors do not fit them.
    """

    def __init__(
        self,
        kernel: Kernel,
        source: str,
        options: TritonOptions,
        interpret: bool,
        pointers: Callable[[], TritonKernel] | None = None,
    ) -> None:
        self.name = kernel.name
        self.options = options
        self.interpret = interpret
        self._function = getattr(load_source(source, kernel.name), kernel.name)
        described = tile_descriptors(kernel) if options.descriptors else ()
        self._described = tuple(dict.fromkeys(d.tensor for d in described))
        self._pointers = cache(pointers) if pointers is not None else None
        known = {**_arguments(kernel, described), **_float8_arguments(kernel, interpret)}
        self._values = [known[name] for name in argument_names(kernel, options.descriptors)]
        self._kernel = kernel
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
        if self._pointers is not None and not all(fits_descriptor(tensors[name]) for name in self._described):
            self.with_pointers().launch(tensors, scalars, sizes)
            return
        call = (tensors, scalars, sizes)
        try:
            self._run(grid, [value(call) for value in self._values])
        except Exception as error:
            raise LaunchFailed(
                kernel=self.name, backend=self._backend, reason=str(error) or repr(error)
            ) from error

    def grid(self, sizes: Mapping[str, Number]) -> tuple[int, int, int]:
        """How many program instances there are along each of the launch's three dimensions."""
        counts = [-(-int(sizes[size]) // block) for size, block in self._grid]
        if self._kernel.sections:
            tiles, heads, batches = counts
            section = section_size(self._kernel, sizes)
            return section, tiles, heads * batches // section
        shared = 1
        for count in counts[2:]:
            shared *= count
        first, second = (*counts[:2], 1, 1)[:2]
        return first, second, shared

    def with_pointers(self) -> TritonKernel:
        """The same kernel without tensor descriptors, made once."""
        assert self._pointers is not None
        return self._pointers()

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


def fits_descriptor(x: Tensor) -> bool:
    """Whether the tensor memory accelerator can address a tensor (batch, head, row, dimension).

    It wants elements side by side in the last dimension, and everything else at multiples of 16 bytes.
    """
    steps = [
        step * x.element_size() for step, size in zip(x.stride()[:-1], x.shape, strict=False) if size > 1
    ]
    return (
        x.numel() > 0
        and x.stride(-1) == 1
        and x.data_ptr() % _DESCRIPTOR_BYTES == 0
        and all(step > 0 and step % _DESCRIPTOR_BYTES == 0 for step in steps)
    )


def tensor_descriptor(x: Tensor, block: Sequence[int]) -> Any:
    """Tiles of a tensor that fits; the strides of dimensions of one position, which mean nothing, become legal."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    aligned = _DESCRIPTOR_BYTES // x.element_size()
    steps = [step if size > 1 else aligned for step, size in zip(x.stride(), x.shape, strict=True)]
    return TensorDescriptor(x, list(x.shape), [*steps[:-1], 1], list(block))


def compile_triton(
    kernel: Kernel,
    source: str,
    options: TritonOptions | None = None,
    *,
    interpret: bool = False,
    pointers: Callable[[], str] | None = None,
) -> TritonKernel:
    """`source` as a kernel to launch. Raises BackendNotInstalled where there is no triton package.

    pointers: the text without tensor descriptors, where options.descriptors; it is made when a call needs it.
    """
    try:
        import triton  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError as error:
        raise BackendNotInstalled(
            backend="triton",
            needs="the package triton",
            instead="Install it: pip install 'triton>=3.6,<3.8'.",
        ) from error
    options = options or TritonOptions()
    if pointers is None or not options.descriptors:
        return TritonKernel(kernel, source, options, interpret)
    plain = replace(options, descriptors=False)
    return TritonKernel(
        kernel, source, options, interpret, lambda: TritonKernel(kernel, pointers(), plain, interpret)
    )


def _arguments(kernel: Kernel, described: Sequence[TileDescriptor]) -> dict[str, Callable[[_Call], Any]]:
    """How to get each argument's value from a launch's tensors, numbers and sizes."""

    def tiles(d: TileDescriptor) -> Callable[[_Call], Any]:
        return lambda call: tensor_descriptor(call[0][d.tensor], d.shape)

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
    return {**found, **{d.name: tiles(d) for d in described}}


def _float8_arguments(kernel: Kernel, interpret: bool) -> dict[str, Callable[[_Call], Any]]:
    """Those of caches in float8: bytes for what has no instructions for it, and steps between scales of a row."""

    def codes(name: str) -> Callable[[_Call], Any]:
        return lambda call: call[0][name].view(torch.uint8)

    def step(name: str) -> Callable[[_Call], Any]:
        return lambda call: call[0][name].stride(3) if call[0][name].shape[3] > 1 else 0

    narrow = [p.name for p in kernel.params if p.storage is Storage.FLOAT8]
    found = {} if not narrow or (not interpret and converts_float8()) else {n: codes(n) for n in narrow}
    return found | {stride_names(p)[-1]: step(p.name) for p in kernel.params if p.name in SCALES}

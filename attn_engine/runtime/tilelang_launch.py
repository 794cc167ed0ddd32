"""Compile generated TileLang for the GPU that its tensors are on, and launch it there.

TileLang compiles at a kernel's first launch on an architecture and keeps the result on disk (TILELANG_CACHE_DIR).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from attn_engine.codegen.backends.tilelang_sequences import sized
from attn_engine.codegen.backends.tilelang_types import BYTES, LINE
from attn_engine.codegen.backends.triton_address import GRID_SIZES, captured
from attn_engine.errors import LaunchFailed, UnsupportedOnBackend
from attn_engine.ir.ops import DType, Number
from attn_engine.ir.tile import Kernel, Param
from attn_engine.runtime.source_module import load_source
from attn_engine.runtime.tilelang_aot import import_tilelang

# exp2 and quotients as single instructions, which is what Triton emits; --use_fast_math would also take the tanh of the
# machine, which is good to three digits.
NVCC_FLAGS = ["-ftz=true", "-prec-div=false", "-prec-sqrt=false"]
_LENGTHS = {"q": "q_len", "kv": "kv_len"}
_MOST_BLOCKS = (2**31 - 1, 65535, 65535)  # CUDA's limits of a grid's three dimensions
_OLDEST = 80  # the first whose matrix units take bfloat16


def architecture(device: torch.device | None = None) -> str:
    """What TileLang calls a GPU, None: the current one: "sm_80", "sm_90a", "gfx942"; raises UnsupportedOnBackend."""
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(device).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    number = 10 * major + minor
    if number < _OLDEST:
        raise UnsupportedOnBackend(
            backend="tilelang",
            feature=f"sm_{number}",
            instead='It needs a GPU of compute capability 8.0 or newer; use backend="cpu".',
        )
    return f"sm_{number}{'a' if major >= 9 else ''}"


def target_of(arch: str) -> dict[str, str]:
    """TileLang's description of an architecture."""
    return {"kind": "hip", "mcpu": arch} if arch.startswith("gfx") else {"kind": "cuda", "arch": arch}


class TileLangKernel:
    """A generated kernel, compiled at the first launch on each architecture. source(arch): its text."""

    def __init__(self, kernel: Kernel, source: Callable[[str], str]) -> None:
        self.name = kernel.name
        self._kernel, self._source = kernel, source
        self._lock = threading.Lock()
        self._compiled: dict[str, Callable[..., Any]] = {}
        sizes = {size for p in sized(kernel).params for size in p.shape}
        self._numbers = [
            (s.name, float if s.dtype is DType.FLOAT else int) for s in kernel.scalars if s.name not in sizes
        ]
        self._grid = [
            (_LENGTHS.get(a) or GRID_SIZES[a], kernel.block(a) if a in _LENGTHS else 1) for a in kernel.grid
        ]

    def launch(
        self, tensors: Mapping[str, Tensor], scalars: Mapping[str, Number], sizes: Mapping[str, int]
    ) -> None:
        """Launch the kernel; outputs are written in place.

        tensors: in logical order of dimensions with any strides, on one GPU. What does not begin at whole 16 bytes is
        copied first. Raises LaunchFailed with TileLang's own error as its cause.
        """
        grid = self.grid({**scalars, **sizes})
        if 0 in grid:
            return
        try:
            self._run(grid, tensors, scalars)
        except Exception as error:
            raise LaunchFailed(
                kernel=self.name, backend="tilelang", reason=str(error) or repr(error)
            ) from error

    def grid(self, sizes: Mapping[str, Number]) -> tuple[int, ...]:
        """How many blocks there are along each dimension of the launch; further axes share the third."""
        counts = [-(-int(sizes[size]) // block) for size, block in self._grid]
        shared = 1
        for count in counts[2:]:
            shared *= count
        return (*counts[:2], shared)

    def arguments(
        self, tensors: Mapping[str, Tensor], scalars: Mapping[str, Number]
    ) -> tuple[list[Any], list[tuple[Tensor, Tensor]]]:
        """The arguments in the order of the text: tensors, then numbers; and what must be copied back: (to, from)."""
        found: list[Any] = []
        back: list[tuple[Tensor, Tensor]] = []
        for p in self._kernel.params:
            x = tensors[p.name].detach()
            x, count = once_for_all(x, p)
            fit = x if captured(p) or len(p.shape) not in (3, 4) else in_whole_lines(x, p)
            if fit is not x and p.output and fit.data_ptr() != x.data_ptr():
                back.append((x, fit))
            found.append(fit if count is None else fit.expand(count, *fit.shape[1:]))
        return [*found, *(kind(scalars[name]) for name, kind in self._numbers)], back

    def _run(
        self, grid: tuple[int, ...], tensors: Mapping[str, Tensor], scalars: Mapping[str, Number]
    ) -> None:
        for count, most in zip(grid, _MOST_BLOCKS, strict=False):
            if count > most:
                raise ValueError(f"a grid of {grid} blocks; the device takes at most {_MOST_BLOCKS}")
        arguments, back = self.arguments(tensors, scalars)
        device = next(x.device for x in arguments if isinstance(x, Tensor))
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            self.compiled(architecture(device))(*arguments)
        for target, source in back:
            target.copy_(source)

    def compiled(self, arch: str) -> Callable[..., Any]:
        """The kernel for an architecture. Needs nvcc (or hipcc), but no GPU."""
        with self._lock:
            if arch not in self._compiled:
                self._compiled[arch] = compile_text(self._source(arch), self.name, arch)
            return self._compiled[arch]


def compile_text(source: str, name: str, arch: str) -> Callable[..., Any]:
    """TileLang's own kernel object of the function `name` in a generated file."""
    tilelang, target = import_tilelang(), target_of(arch)
    function = getattr(load_source(source, name), name)
    with tilelang.tvm.target.Target(target):
        flags = NVCC_FLAGS if target["kind"] == "cuda" else None
        return tilelang.compile(function, target=target, compile_flags=flags)


def once_for_all(x: Tensor, p: Param) -> tuple[Tensor, int | None]:
    """The rows that several sequences share, once, and how many see them; (x, None) for other tensors."""
    shared = p.shape[0] == "batches" and x.shape[0] > 1 and x.stride(0) == 0
    return (x[:1], x.shape[0]) if shared else (x, None)


def in_whole_lines(x: Tensor, p: Param) -> Tensor:
    """The tensor itself, or a copy in which rows begin at whole 16 bytes and neighbours lie side by side.

    A dimension of size one has a stride too, which bulk copies look at: it gets one that suits them.
    """
    whole = LINE // BYTES[p.storage]
    *outer, last = x.shape
    plain = all(s % whole == 0 and s > 0 for n, s in zip(outer, x.stride(), strict=False) if n > 1)
    if not plain or (last > 1 and x.stride(-1) != 1) or x.data_ptr() % LINE:
        padded = x.new_empty((*outer, -(-last // whole) * whole))[..., :last]
        x = padded if p.output else padded.copy_(x)
    room = max([whole, *(n * s for n, s in zip(x.shape, x.stride(), strict=True))])
    single = -(-room // whole) * whole
    strides = [s if n > 1 else single for n, s in zip(outer, x.stride(), strict=False)]
    return x if [*strides, 1] == list(x.stride()) else x.as_strided(x.shape, [*strides, 1])


def compile_tilelang(kernel: Kernel, source: Callable[[str], str]) -> TileLangKernel:
    """A kernel to launch; `source` makes its text for an architecture. Raises BackendNotInstalled without tilelang."""
    import_tilelang()
    return TileLangKernel(kernel, source)

"""Run generated TileLang kernels on the CPU: lowered by TileLang to C, compiled by the machine's compiler.

For tests and for reading: the C is plain scalar loops on one thread. TileLang's own launcher takes neither strides nor
a disk cache of ours, so the C function is compiled and called here.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor

from attn_engine.errors import BackendNotInstalled, CompilationFailed, LaunchFailed
from attn_engine.ir.ops import Number
from attn_engine.ir.tile import Kernel
from attn_engine.runtime.cache import cache_folder, key_of, stored
from attn_engine.runtime.cpu_compile import Compiler, find_compiler, run_compiler
from attn_engine.runtime.source_module import load_source
from attn_engine.runtime.tilelang_aot import import_tilelang
from attn_engine.runtime.tilelang_arguments import argument_values

NAME = "tilelang-cpu"
# Small shapes run for no time at all; optimised, the loops of a large kernel would compile for ten seconds.
LITTLE = ("-O1", "-w")
_NUMBERS: dict[str, Any] = {
    "int32_t": ctypes.c_int32, "int64_t": ctypes.c_int64, "float": ctypes.c_float, "double": ctypes.c_double,
}  # fmt: skip


class CpuFunction:
    """A function of TileLang's C as machine code. known: where the value of an argument of some name comes from."""

    def __init__(self, name: str, library: Path, known: Mapping[str, Callable[..., Any]]) -> None:
        self.name = name
        text = (library / "kernel.cpp").read_text()
        found = re.search(r"^int32_t (\w+)\((.*)\) \{$", text, re.M)
        assert found is not None, "TileLang's C has one function"
        self._function = ctypes.CDLL(str(library / "kernel.so"))[found[1]]
        types, self._values = list[Any](), list[Callable[..., Any]]()
        for argument in found[2].split(", "):
            kind, name = argument.rsplit(" ", 1)
            types.append(_NUMBERS.get(kind, ctypes.c_void_p))
            self._values.append(known[name])
        self._function.argtypes = types

    def __call__(self, *call: Any) -> None:
        """Run it to its end. call: what the values are taken from."""
        failed = self._function(*(value(*call) for value in self._values))
        if failed:
            raise LaunchFailed(kernel=self.name, backend=NAME, reason=f"it returned {failed}")


class TileLangCpuKernel:
    """A generated kernel as machine code."""

    def __init__(self, kernel: Kernel, library: Path) -> None:
        self.name = kernel.name
        self._function = CpuFunction(kernel.name, library, argument_values(kernel))

    def launch(
        self, tensors: Mapping[str, Tensor], scalars: Mapping[str, Number], sizes: Mapping[str, int]
    ) -> None:
        """Run the kernel to its end; outputs are written in place. Tensors in logical order with any strides."""
        self._function((tensors, scalars, sizes))


def compile_tilelang_cpu(kernel: Kernel, source: str) -> TileLangCpuKernel:
    """`source` as machine code, from the disk cache where it is there.

    Raises BackendNotInstalled without tilelang or a C++ compiler, CompilationFailed with the compiler's message.
    """
    return TileLangCpuKernel(kernel, library_of(kernel.name, source))


def library_of(name: str, source: str) -> Path:
    """The folder with the machine code of the function `name` of a generated file; raises as compile_tilelang_cpu."""
    tilelang = import_tilelang()
    compiler = find_compiler()
    if compiler is None:
        raise BackendNotInstalled(backend=NAME, needs="a C++ compiler", instead="Install g++ or clang++.")
    key = key_of(
        source, name, version("tilelang"), *compiler.command, compiler.version, *compiler.flags, *LITTLE
    )
    return stored(f"tilelang_{name}_{key}", lambda path: _build(path, name, source, tilelang, compiler))


@lru_cache(maxsize=2)
def _module(source: str) -> ModuleType:
    """A generated file, whose functions TileLang traces when it is loaded: once for all of them."""
    return load_source(source, "tilelang")


def lower_to_c(name: str, source: str, tilelang: Any) -> str:
    """The C text that TileLang makes of a rendered function."""
    function = getattr(_module(source), name)
    with tilelang.tvm.target.Target("c"):
        return str(tilelang.lower(function, target="c", target_host="c").kernel_source)


def _build(folder: Path, name: str, source: str, tilelang: Any, compiler: Compiler) -> None:
    folder.mkdir()
    text = folder / "kernel.cpp"
    text.write_text(lower_to_c(name, source, tilelang))
    include = Path(str(tilelang.__file__)).parent / "src"
    command = [
        *compiler.command,
        *compiler.flags,
        *LITTLE,
        f"-I{include}",
        str(text),
        "-o",
        str(folder / "kernel.so"),
    ]
    problem = run_compiler(command)
    if problem is not None:
        kept = cache_folder() / f"{folder.name}.cpp"
        text.replace(kept)
        raise CompilationFailed(command=" ".join(command), source=kept, output=problem)

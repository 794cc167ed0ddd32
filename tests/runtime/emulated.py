"""Kernels for another processor, run by an emulator: the backend that the tests of NEON use."""

from __future__ import annotations

import ctypes
import struct
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from attn_engine.codegen.backends.cpu import SIZES, argument_slots, symbol
from attn_engine.codegen.backends.cpu_names import INCLUDE
from attn_engine.codegen.schedule import Schedule
from attn_engine.ir.ops import DType, Number
from attn_engine.ir.tile import Kernel
from attn_engine.runtime.cpu_compile import Compiler
from tests.runtime.cpu_attention import CpuOn

DRIVER = Path(__file__).parent / "run_kernel.cpp"


def build(source: Path, compiler: Compiler, function: str) -> Path:
    """A program of its own for the compiler's processor: the kernel and the driver around it."""
    program = source.with_suffix("")
    flags = [flag for flag in compiler.flags if flag not in ("-shared", "-fPIC")]
    command = [*compiler.command, *flags, "-static", f"-I{INCLUDE}", f"-DKERNEL={function}"]
    subprocess.run([*command, str(source), str(DRIVER), "-o", str(program)], check=True)
    return program


@dataclass(frozen=True)
class EmulatedKernel:
    """What CpuKernel is for this processor."""

    kernel: Kernel
    program: Path
    emulator: str

    def launch(
        self, tensors: Mapping[str, Tensor], scalars: Mapping[str, Number], sizes: Mapping[str, int]
    ) -> None:
        names = argument_slots(self.kernel)
        named = [tensors[p.name] for p in self.kernel.params]
        slots = self.slots(dict(zip((p.name for p in self.kernel.params), named)), scalars, sizes)
        data = struct.pack("=qq", len(names), len(named)) + slots
        where: list[int] = []
        for p, tensor in zip(self.kernel.params, named):
            memory = tensor.untyped_storage()
            offset = tensor.storage_offset() * tensor.element_size()
            data += struct.pack("=qqq", names.index(p.name), offset, memory.nbytes())
            where.append(len(data))
            data += ctypes.string_at(memory.data_ptr(), memory.nbytes())
        file = self.program.with_suffix(".arguments")
        file.write_bytes(data)
        subprocess.run([self.emulator, str(self.program), str(file)], check=True, timeout=300)
        result = file.read_bytes()
        for p, tensor, start in zip(self.kernel.params, named, where):
            if p.output:
                memory = tensor.untyped_storage()
                ctypes.memmove(memory.data_ptr(), result[start : start + memory.nbytes()], memory.nbytes())

    def slots(
        self, tensors: Mapping[str, Tensor], scalars: Mapping[str, Number], sizes: Mapping[str, int]
    ) -> bytes:
        """8 bytes each; the driver fills in the addresses."""
        integers: list[int] = [0]
        for tensor in tensors.values():
            integers += [0, *(tensor.shape or (1,)), *(tensor.stride() or (0,))]
        integers += [sizes[name] for name in SIZES]
        kinds = "".join("d" if v.dtype is DType.FLOAT else "q" for v in self.kernel.scalars)
        numbers = [scalars[v.name] for v in self.kernel.scalars]
        return struct.pack(f"={len(integers)}q{kinds}", *integers, *numbers)


@dataclass
class CpuEmulated(CpuOn):
    """The CPU backend for a processor that this machine can only emulate; `folder` is where its programs are built."""

    folder: Path = Path()
    emulator: str = ""

    def compile(self, kernel: Kernel, schedule: Schedule) -> EmulatedKernel:
        source = self.folder / f"{kernel.name}.cpp"
        source.write_text(self.source(kernel, schedule))
        return EmulatedKernel(kernel, build(source, self.compiler, symbol(kernel)), self.emulator)

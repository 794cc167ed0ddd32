"""Compile generated Triton ahead of time, for GPUs that this machine does not have, and read what they will need."""

from __future__ import annotations

import re
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attn_engine.codegen.backends.triton import TritonOptions, argument_names
from attn_engine.codegen.backends.triton_address import captured, stride_names
from attn_engine.errors import BackendNotInstalled
from attn_engine.ir.ops import DType, Storage
from attn_engine.ir.tile import Kernel
from attn_engine.runtime.source_module import load_source

KIB = 1024
# Shared memory (LDS) that one block may have, from the vendors' documents. Triton checks it at launch, not before.
SHARED_LIMITS = {"sm_80": 163 * KIB, "sm_90": 227 * KIB, "sm_100": 227 * KIB, "gfx942": 64 * KIB}
TARGETS = tuple(SHARED_LIMITS)
_POINTERS = {
    Storage.FLOAT64: "*fp64", Storage.FLOAT32: "*fp32", Storage.FLOAT16: "*fp16", Storage.BFLOAT16: "*bf16",
    Storage.INT64: "*i64", Storage.INT32: "*i32", Storage.INT16: "*i16", Storage.INT8: "*i8", Storage.UINT8: "*u8",
    Storage.BOOL: "*i1",
}  # fmt: skip
_PRODUCTS = r"wgmma\.mma_async|tcgen05\.mma|mma\.sync|v_mfma"
_ALIGNED = [["tt.divisibility", 16]]


@dataclass(frozen=True, slots=True)
class AotReport:
    """What a compiled kernel asks of the target.

    registers: per thread (on AMD: vector and accumulation registers). spill_bytes: of stack per thread.
    shared_bytes of shared_limit: per block. products: instructions of the matrix unit by name.
    """

    kernel: str
    target: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    shared_limit: int
    products: tuple[tuple[str, int], ...]
    seconds: float

    @property
    def fits(self) -> bool:
        """Whether the kernel launches, and keeps its values in registers."""
        return self.shared_bytes <= self.shared_limit and self.spill_bytes == 0

    def __str__(self) -> str:
        products = ", ".join(f"{count} {name}" for name, count in self.products) or "no matrix instructions"
        return (
            f"{self.kernel} on {self.target}: {self.registers} registers, {self.spill_bytes} bytes spilled, "
            f"{self.shared_bytes} of {self.shared_limit} bytes shared, {products}, compiled in {self.seconds:.1f} s"
        )


def compile_ahead(
    kernel: Kernel, source: str, target: str, options: TritonOptions | None = None
) -> AotReport:
    """Compile `source` for "sm_80", "sm_90", "sm_100" or "gfx942". Needs no GPU and no toolkit besides triton.

    Assumes what a usual launch has: aligned tensors whose last dimension is contiguous. Raises BackendNotInstalled
    without triton, KeyError for another target, and triton's own errors for a kernel that does not compile.
    """
    try:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
    except ImportError as error:
        raise BackendNotInstalled(
            backend="triton",
            needs="the package triton",
            instead="Install it: pip install 'triton>=3.6,<3.8'.",
        ) from error
    options, limit = options or TritonOptions(), SHARED_LIMITS[target]
    function = getattr(load_source(source, kernel.name), kernel.name)
    gpu = GPUTarget("hip", target, 64) if target.startswith("gfx") else GPUTarget("cuda", int(target[3:]), 32)
    begin = time.perf_counter()
    compiled = triton.compile(
        ASTSource(fn=function, **_signature(kernel)),
        target=gpu,
        options={"num_warps": options.num_warps, "num_stages": options.num_stages},
    )
    seconds = time.perf_counter() - begin
    read = _amd_registers if gpu.backend == "hip" else _nvidia_registers
    registers, spilled = read(compiled.asm)
    text = str(compiled.asm["amdgcn" if gpu.backend == "hip" else "ptx"])
    found = re.findall(_PRODUCTS, text)
    return AotReport(
        kernel.name, target, registers, spilled, int(compiled.metadata.shared), limit,
        tuple((name, found.count(name)) for name in dict.fromkeys(found)), seconds,
    )  # fmt: skip


def _signature(kernel: Kernel) -> dict[str, Any]:
    """Types and facts that a launch of the kernel would hand to the compiler."""
    names = argument_names(kernel)
    types = dict.fromkeys(names, "i32")
    types |= {s.name: "fp32" for s in kernel.scalars if s.dtype is DType.FLOAT}
    constants: dict[tuple[int, ...], int] = {}
    facts: dict[tuple[int, ...], list[list[Any]]] = {}
    for p in kernel.params:
        types[p.name] = _POINTERS[p.storage]
        facts[(names.index(p.name),)] = _ALIGNED
        strides = [n for n in stride_names(p) if n in names]
        for name in strides[:-1]:
            if len(p.shape) == 4 or captured(p):
                facts[(names.index(name),)] = _ALIGNED
        if strides:
            types[strides[-1]] = "constexpr"
            constants[(names.index(strides[-1]),)] = 1
    return {"signature": {n: types[n] for n in names}, "constexprs": constants, "attrs": facts}


def _nvidia_registers(asm: Any) -> tuple[int, int]:
    """(registers, bytes spilled), read by the disassemblers that triton's wheel carries.

    A stack alone is no spill: newer targets reserve a few bytes that no instruction touches.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        usage = _nvidia_tool("cuobjdump", "-res-usage", file.name)
        found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
        assert found is not None, usage
        registers, stack = int(found[1]), int(found[2])
        touched = stack > 0 and re.search(r"\b(STL|LDL)\b", _nvidia_tool("nvdisasm", "-c", file.name))
    return registers, stack if touched else 0


def _nvidia_tool(name: str, *arguments: str) -> str:
    import triton

    tool = Path(str(triton.__file__)).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True).stdout


def _amd_registers(asm: Any) -> tuple[int, int]:
    """(vector registers, stack bytes), from the metadata at the end of the assembly."""
    text = str(asm["amdgcn"])

    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s*(\d+)", text)
        return int(found[1]) if found else 0

    return number("vgpr_count"), max(number("private_segment_fixed_size"), 4 * number("vgpr_spill_count"))

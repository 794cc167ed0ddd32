"""Compile generated Triton ahead of time, for GPUs that this machine does not have, and read what they will need."""

from __future__ import annotations

import re
import time
from typing import Any

from attn_engine.codegen.backends.triton import TritonOptions, argument_names
from attn_engine.codegen.backends.triton_address import captured, stride_names
from attn_engine.codegen.backends.triton_descriptors import tile_descriptors
from attn_engine.codegen.targets import target_named
from attn_engine.errors import BackendNotInstalled
from attn_engine.ir.ops import DType, Storage
from attn_engine.ir.tile import Kernel
from attn_engine.runtime.aot_report import SHARED_LIMITS, AotReport
from attn_engine.runtime.aot_report import TARGETS as TARGETS
from attn_engine.runtime.sass import registers_of
from attn_engine.runtime.source_module import load_source

POINTERS = {
    Storage.FLOAT64: "*fp64", Storage.FLOAT32: "*fp32", Storage.FLOAT16: "*fp16", Storage.BFLOAT16: "*bf16",
    Storage.INT64: "*i64", Storage.INT32: "*i32", Storage.INT16: "*i16", Storage.INT8: "*i8", Storage.UINT8: "*u8",
    Storage.BOOL: "*i1", Storage.FLOAT8: "*fp8e4nv",
}  # fmt: skip
PRODUCTS = r"wgmma\.mma_async|tcgen05\.mma|mma\.sync|v_mfma"
ALIGNED = [["tt.divisibility", 16]]


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
        ASTSource(fn=function, **_signature(kernel, options.descriptors, target_named(target).float8)),
        target=gpu,
        options={"num_warps": options.num_warps, "num_stages": options.num_stages},
    )
    seconds = time.perf_counter() - begin
    registers, spilled = registers_and_spills(compiled.asm, gpu.backend)
    text = str(compiled.asm["amdgcn" if gpu.backend == "hip" else "ptx"])
    found = re.findall(PRODUCTS, text)
    return AotReport(
        kernel.name, target, registers, spilled, int(compiled.metadata.shared), limit,
        tuple((name, found.count(name)) for name in dict.fromkeys(found)), seconds,
        bytes(compiled.asm.get("cubin", b"")),
    )  # fmt: skip


def _signature(kernel: Kernel, descriptors: bool, float8: bool) -> dict[str, Any]:
    """Types and facts that a launch of the kernel would hand to the compiler; float8: such tensors, not their bytes."""
    names = argument_names(kernel, descriptors)
    types = dict.fromkeys(names, "i32")
    types |= {s.name: "fp32" for s in kernel.scalars if s.dtype is DType.FLOAT}
    constants: dict[tuple[int, ...], int] = {}
    facts: dict[tuple[int, ...], list[list[Any]]] = {}
    described = tile_descriptors(kernel) if descriptors else ()
    for d in described:
        element = POINTERS[kernel.param(d.tensor).storage].removeprefix("*")
        types[d.name] = f"tensordesc<{element}{list(d.shape)}>"
    for p in kernel.params:
        if any(d.tensor == p.name for d in described):
            continue
        types[p.name] = POINTERS[p.storage if float8 or p.storage is not Storage.FLOAT8 else Storage.UINT8]
        facts[(names.index(p.name),)] = ALIGNED
        strides = [n for n in stride_names(p) if n in names]
        for name in strides[:-1]:
            if len(p.shape) >= 4 or captured(p):
                facts[(names.index(name),)] = ALIGNED
        if strides:
            types[strides[-1]] = "constexpr"
            constants[(names.index(strides[-1]),)] = 1
    return {"signature": {n: types[n] for n in names}, "constexprs": constants, "attrs": facts}


def registers_and_spills(asm: Any, backend: str) -> tuple[int, int]:
    """Registers of a thread and bytes that it spills, from what triton's "cuda" or "hip" backend made."""
    return _amd_registers(asm) if backend == "hip" else _nvidia_registers(asm)


def _nvidia_registers(asm: Any) -> tuple[int, int]:
    """(registers, bytes spilled), read by the disassemblers that triton's wheel carries."""
    return registers_of(bytes(asm["cubin"]))


def _amd_registers(asm: Any) -> tuple[int, int]:
    """(vector registers, stack bytes), from the metadata at the end of the assembly."""
    text = str(asm["amdgcn"])

    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s*(\d+)", text)
        return int(found[1]) if found else 0

    return number("vgpr_count"), max(number("private_segment_fixed_size"), 4 * number("vgpr_spill_count"))

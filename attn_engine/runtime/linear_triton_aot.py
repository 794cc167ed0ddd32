"""Compile generated chunk kernels ahead of time, for GPUs that this machine does not have."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from typing import Any

from attn_engine.codegen.backends.triton_chunk import PhaseRenderer, chunk_arguments
from attn_engine.codegen.backends.triton_chunk_params import ChunkOptions
from attn_engine.codegen.lower.chunk_phases import ChunkPhase
from attn_engine.errors import BackendNotInstalled
from attn_engine.ir.ops import DType
from attn_engine.runtime.aot_report import SHARED_LIMITS, AotReport
from attn_engine.runtime.source_module import load_source
from attn_engine.runtime.triton_aot import ALIGNED, POINTERS, PRODUCTS, registers_and_spills


def compile_phases_ahead(
    source: str, phases: Sequence[ChunkPhase], options: Sequence[ChunkOptions], target: str
) -> tuple[AotReport, ...]:
    """Compile the kernels of a file for "sm_80", "sm_90", "sm_100" or "gfx942". Needs no GPU.

    Assumes what a usual launch has: aligned tensors whose last dimension is contiguous. Raises BackendNotInstalled
    without triton, KeyError for another target, and triton's own errors for a kernel that does not compile.
    """
    try:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
    except ImportError as error:
        instead = "Install it: pip install 'triton>=3.6,<3.8'."
        raise BackendNotInstalled(backend="triton", needs="the package triton", instead=instead) from error
    limit, module = SHARED_LIMITS[target], load_source(source, "linear_attention")
    gpu = GPUTarget("hip", target, 64) if target.startswith("gfx") else GPUTarget("cuda", int(target[3:]), 32)
    found: list[AotReport] = []
    for phase, option in zip(phases, options, strict=True):
        begin = time.perf_counter()
        compiled = triton.compile(
            ASTSource(fn=getattr(module, phase.name), **_signature(phase, option)),
            target=gpu,
            options={"num_warps": option.num_warps, "num_stages": option.num_stages},
        )
        seconds = time.perf_counter() - begin
        registers, spilled = registers_and_spills(compiled.asm, gpu.backend)
        products = re.findall(PRODUCTS, str(compiled.asm["amdgcn" if gpu.backend == "hip" else "ptx"]))
        counts = tuple((name, products.count(name)) for name in dict.fromkeys(products))
        shared, cubin = int(compiled.metadata.shared), bytes(compiled.asm.get("cubin", b""))
        found.append(AotReport(phase.name, target, registers, spilled, shared, limit, counts, seconds, cubin))
    return tuple(found)


def _signature(phase: ChunkPhase, options: ChunkOptions) -> dict[str, Any]:
    """Types and facts that a launch of the kernel would hand to the compiler."""
    names = chunk_arguments(phase, options)
    renderer = PhaseRenderer(phase, options)
    types: dict[str, str] = dict.fromkeys(names, "i32")
    types |= {renderer.spelled[v.name]: "fp32" for v in phase.program.scalars if v.dtype is DType.FLOAT}
    constants: dict[tuple[int, ...], int] = {}
    facts: dict[tuple[int, ...], list[list[Any]]] = {}
    for _, t in renderer.spelled_tensors():
        if t.name in names:
            types[t.name] = POINTERS[t.storage]
            facts[(names.index(t.name),)] = ALIGNED
        strides = [s for s in t.strides if s in names]
        last = [s for s in strides if s == t.strides[-1] and (t.captured or t.dims[-1] == "column")]
        for name in strides:
            if name in last:
                types[name], constants[(names.index(name),)] = "constexpr", 1
            else:
                facts[(names.index(name),)] = ALIGNED
    for name in ("q_group", "k_group"):
        if name in names:
            types[name], constants[(names.index(name),)] = "constexpr", 1
    return {"signature": {n: types[n] for n in names}, "constexprs": constants, "attrs": facts}

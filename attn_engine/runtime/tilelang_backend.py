"""Generated TileLang: launched on a GPU, or compiled by way of C for the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from attn_engine.codegen.backends.tilelang import render_tilelang
from attn_engine.codegen.backends.tilelang_types import AMD_LINE, LINE, TileLangOptions
from attn_engine.codegen.gpu_schedule import tests_tiles
from attn_engine.codegen.lower.capture import CaptureGradient, runs_side_by_side
from attn_engine.codegen.pipeline import with_header
from attn_engine.codegen.schedule import Edges, Gradients, Schedule
from attn_engine.errors import GradientNotSupported, UnsupportedOnBackend
from attn_engine.ir.ops import Storage
from attn_engine.ir.program import Attention
from attn_engine.ir.tile import Kernel
from attn_engine.runtime.backend import Launchable
from attn_engine.runtime.gpu_target import current_target
from attn_engine.version import VERSION

SHOWN = "sm_90a"  # what `engine.source` shows
WARP_ROWS = 16  # of a product: each warp has rows of its own, which small blocks of lists leave fewer of
GROUP = 4  # warps that multiply together
_OWN_QUERIES = ("forward", "decode", "merge", "dq", "delta", "adjoints")


@dataclass(frozen=True)
class TileLangBackend:
    """`on_cpu`: the same text with TileLang's CPU target: for tests, in float32 and float64."""

    name: str
    on_cpu: bool

    def schedule(self, program: Attention) -> Schedule:
        return self.schedule_on(program, current_target().name)

    def schedule_on(self, program: Attention, target: str) -> Schedule:
        """The default on "sm_80", "gfx942", ..."""
        chosen = tilelang_schedule(max(program.dim_qk, program.dim_v), target)
        if tests_tiles(program):  # what a mask looks up takes registers
            chosen = replace(chosen, backward_q=min(chosen.backward_q, 32))
        return small_tiles(chosen) if self.on_cpu else chosen

    def refuse(self, program: Attention, captures: Sequence[CaptureGradient]) -> None:
        if program.cache is not None:
            instead = 'Use backend="triton" or "cpu", or keys and values of the type of q.'
            feature = "keys and values in float8 with scales"
            raise UnsupportedOnBackend(backend=self.name, feature=feature, instead=instead)
        wide = program.element in (Storage.FLOAT32, Storage.FLOAT64)
        if wide != self.on_cpu:
            instead = 'Use backend="triton", or bfloat16 or float16 tensors: TileLang would round products to 10 bits.'
            if self.on_cpu:
                instead = "Use float32 tensors: TileLang's CPU target has no arithmetic for this dtype."
            raise UnsupportedOnBackend(backend=self.name, feature=program.element.value, instead=instead)
        if (clash := runs_side_by_side(tuple(captures))) is not None:
            raise GradientNotSupported(
                backend=self.name,
                what=f"{clash.load.tensor!r}: several pairs of one tile read the same element of it, and the order of "
                "their sum would not be fixed",
                instead='Index it with q_idx and kv_idx themselves, detach it, or use backend="cpu".',
            )

    def options(self, kernel: Kernel, schedule: Schedule, arch: str) -> TileLangOptions:
        if self.on_cpu:
            return TileLangOptions(cpu=True)
        own = kernel.name in _OWN_QUERIES
        warps = schedule.num_warps if own else schedule.backward_warps
        stages = schedule.num_stages if own else schedule.backward_stages
        line = AMD_LINE if arch.startswith("gfx") else LINE
        warps = min(warps, max(1, kernel.block(kernel.order[0]) // WARP_ROWS))
        grouped = warps % GROUP == 0  # warps of their own that copy stand beside groups of warps
        stages = stages_for(arch, stages) if grouped else min(stages, 1)
        return TileLangOptions(32 * warps, stages, line=line, specialised=grouped and has_bulk_copies(arch))

    def source(self, kernel: Kernel, schedule: Schedule) -> str:
        return self.source_for(kernel, schedule, SHOWN)

    def source_for(self, kernel: Kernel, schedule: Schedule, arch: str) -> str:
        """The text for an architecture: they differ in how many copies run ahead."""
        return render_tilelang(with_header(kernel, self.name, VERSION), self.options(kernel, schedule, arch))

    def compile(self, kernel: Kernel, schedule: Schedule) -> Launchable:
        if self.on_cpu:
            from attn_engine.runtime.tilelang_cpu import compile_tilelang_cpu

            return compile_tilelang_cpu(kernel, self.source(kernel, schedule))
        from attn_engine.runtime.tilelang_launch import compile_tilelang

        return compile_tilelang(kernel, lambda arch: self.source_for(kernel, schedule, arch))


def tilelang_schedule(widest: int, target: str = "sm_90") -> Schedule:
    """Tiles for warp groups of 64 rows each: two of them where the accumulators fit into registers.

    Up to 128 dimensions no kernel of a soft-cap, ALiBi and a window spills on sm_90a. sm_80, whose products hold more
    registers, takes fewer queries in dK/dV; gfx942, with 64 KiB of shared memory, smaller tiles altogether.
    """
    edges, two = Edges.BRANCH, Gradients.TWO_KERNELS
    if widest <= 64 or (widest <= 128 and not target.startswith("gfx")):
        many = widest <= 64 and target != "sm_80"
        return Schedule(
            128, 64, 64 if many else 32, 128, edges, two, num_warps=8, backward_warps=8, backward_stages=2
        )
    if widest <= 128:
        return Schedule(64, 32, 32, 64, edges, two, num_warps=4, backward_warps=4)
    return Schedule(
        64, 64, 32, 64, edges, two, num_warps=4, num_stages=1, backward_warps=4, backward_stages=1
    )


def stages_for(arch: str, stages: int) -> int:
    """TileLang 0.1.15 lowers loops of run-time length with two stages only where copies are bulk copies."""
    return stages if has_bulk_copies(arch) else min(stages, 1)


def has_bulk_copies(arch: str) -> bool:
    """Whether the GPU copies tiles by descriptors: sm_90 and newer."""
    return arch.startswith(("sm_9", "sm_10", "sm_11", "sm_12"))


def small_tiles(schedule: Schedule) -> Schedule:
    """Tiles that small shapes in tests fill more than one of."""
    return replace(schedule, block_q=32, block_kv=32, backward_q=32, backward_kv=32)

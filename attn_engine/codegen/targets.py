"""What GPUs have: data from the vendors' public documents, by the names that their compilers use.

A `Target` is an instruction set with its limits: what decides whether a kernel launches. A `Device` is a product with
rates: what bounds how fast a kernel can be.
"""

from __future__ import annotations

from dataclasses import dataclass

from attn_engine.errors import UnknownTarget
from attn_engine.ir.ops import Storage

KIB = 1024


@dataclass(frozen=True, slots=True)
class Target:
    """Limits of one kind of GPU.

    shared_limit: bytes of shared memory (LDS) that one block may have; shared_total: bytes that the blocks of one
    multiprocessor (compute unit) share; shared_reserved: bytes of that which each block costs besides its own.
    registers: of 32 bits, per multiprocessor; most_registers: per thread; register_step: in which they are given out.
    most_warps, most_blocks: resident on one multiprocessor. warp: threads of a warp (wavefront).
    """

    name: str
    shared_limit: int
    shared_total: int
    shared_reserved: int = KIB
    registers: int = 65536
    most_registers: int = 255
    register_step: int = 8
    most_warps: int = 64
    most_blocks: int = 32
    warp: int = 32

    @property
    def amd(self) -> bool:
        return self.name.startswith("gfx")

    @property
    def matrix_groups(self) -> bool:
        """Whether four warps multiply together, reading both operands from shared memory (wgmma, tcgen05)."""
        return self.name in ("sm_90", "sm_100")

    @property
    def float8(self) -> bool:
        """Whether it has instructions that convert numbers in e4m3 as caches have them (e4m3fn)."""
        return self.name in ("sm_90", "sm_100")


TARGETS = {
    target.name: target
    for target in (
        Target("sm_80", 163 * KIB, 164 * KIB),
        Target("sm_90", 227 * KIB, 228 * KIB),
        Target("sm_100", 227 * KIB, 228 * KIB),
        # four SIMDs of 512 registers for 64 lanes; a wavefront has vector and accumulation registers, 512 of both
        Target("gfx942", 64 * KIB, 64 * KIB, 0, 4 * 512 * 64, 512, 8, 32, 32, 64),
    )
}
DEFAULT_TARGET = "sm_90"


def target_named(name: str) -> Target:
    """The target of that name; raises UnknownTarget."""
    if name not in TARGETS:
        raise UnknownTarget(target=name, known=", ".join(map(repr, TARGETS)))
    return TARGETS[name]


@dataclass(frozen=True, slots=True)
class Device:
    """A product. matmul_tflops: dense 16-bit products with sums in float32; float32_tflops: exact float32 products.

    gigabytes: bytes per nanosecond of device memory. From the vendors' data sheets, never from a measurement.
    """

    name: str
    target: str
    multiprocessors: int
    matmul_tflops: float
    float32_tflops: float
    gigabytes: float

    def tflops(self, element: Storage) -> float:
        """The peak rate of products of such elements."""
        return self.matmul_tflops if element in (Storage.BFLOAT16, Storage.FLOAT16) else self.float32_tflops


DEVICES = {
    device.name: device
    for device in (
        Device("A100", "sm_80", 108, 312.0, 19.5, 2039.0),  # SXM, 80 GB
        Device("H100", "sm_90", 132, 989.4, 67.0, 3350.0),  # SXM
        Device("H200", "sm_90", 132, 989.4, 67.0, 4800.0),  # SXM
        Device("B200", "sm_100", 148, 2250.0, 80.0, 8000.0),
        Device("MI300X", "gfx942", 304, 1307.4, 163.4, 5300.0),
    )
}


def devices_of(target: str) -> tuple[Device, ...]:
    """The known products of a target."""
    return tuple(d for d in DEVICES.values() if d.target == target)

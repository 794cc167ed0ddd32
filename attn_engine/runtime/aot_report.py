"""What a kernel that was compiled ahead of time asks of its target, whichever way it was compiled."""

from __future__ import annotations

from dataclasses import dataclass, field

from attn_engine.errors import UnsupportedOnBackend
from attn_engine.runtime.sass import MachineCode, read_cubin

KIB = 1024
# Shared memory (LDS) that one block may have, from the vendors' documents. Compilers do not check it, launches do.
SHARED_LIMITS = {"sm_80": 163 * KIB, "sm_90": 227 * KIB, "sm_100": 227 * KIB, "gfx942": 64 * KIB}
TARGETS = tuple(SHARED_LIMITS)


@dataclass(frozen=True, slots=True)
class AotReport:
    """What a compiled kernel asks of the target.

    registers: per thread (on AMD: vector and accumulation registers). spill_bytes: of stack per thread.
    shared_bytes of shared_limit: per block. products: instructions of the matrix unit by name. cubin: the machine code,
    empty on AMD.
    """

    kernel: str
    target: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    shared_limit: int
    products: tuple[tuple[str, int], ...]
    seconds: float
    cubin: bytes = field(default=b"", repr=False)

    @property
    def fits(self) -> bool:
        """Whether the kernel launches, and keeps its values in registers."""
        return self.shared_bytes <= self.shared_limit and self.spill_bytes == 0

    def machine_code(self) -> MachineCode:
        """Instructions of the kernel and of its innermost loops, disassembled at each call (half a second).

        Raises UnsupportedOnBackend for AMD targets.
        """
        if not self.cubin:
            raise UnsupportedOnBackend(
                backend=self.target, feature="disassembly", instead="Ask for it on an NVIDIA target."
            )
        return read_cubin(self.cubin)

    def __str__(self) -> str:
        products = ", ".join(f"{count} {name}" for name, count in self.products) or "no matrix instructions"
        return (
            f"{self.kernel} on {self.target}: {self.registers} registers, {self.spill_bytes} bytes spilled, "
            f"{self.shared_bytes} of {self.shared_limit} bytes shared, {products}, compiled in {self.seconds:.1f} s"
        )

"""The machine's peak, measured by a loop of multiply-adds in the same rounds as our kernels: the part share."""

from __future__ import annotations

import ctypes
import functools
import subprocess
import threading
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from attn_engine.runtime.cache import key_of, stored
from attn_engine.runtime.cpu_compile import find_compiler
from benchmarks.cases import Case
from benchmarks.contenders import call, ours, tensors
from benchmarks.measure import Contender
from benchmarks.patterns import pattern

SOURCE = Path(__file__).with_name("peak.cpp")
# Long enough that starting a thread does not count, short enough that the clock stays what our kernels see.
OPERATIONS = 20e9
SECONDS_TO_COMPILE = 60
MOST_LANES = 16


@dataclass(frozen=True, slots=True)
class Peak:
    """One of the two loops. library: its machine code; kind: float or bfloat16."""

    library: ctypes.CDLL
    kind: str

    @property
    def steps(self) -> int:
        return int(OPERATIONS / self._operations())

    def _operations(self) -> int:
        count = getattr(self.library, f"{self.kind}_operations")
        count.restype = ctypes.c_int64
        return count()

    def operations(self, threads: int) -> float:
        """What one `run` on so many threads computes."""
        return float(self.steps) * self._operations() * threads

    def run(self, threads: int) -> None:
        loop = getattr(self.library, f"{self.kind}_chains")
        loop.argtypes = [ctypes.c_int64, ctypes.c_float, ctypes.c_void_p]
        loop.restype = None

        def work() -> None:
            loop(self.steps, 0.5, (ctypes.c_float * MOST_LANES)())

        helpers = [threading.Thread(target=work) for _ in range(threads - 1)]
        for helper in helpers:
            helper.start()
        work()
        for helper in helpers:
            helper.join()


@cache
def library() -> ctypes.CDLL | None:
    """The loops, compiled as the engine compiles its kernels; None where there is no compiler."""
    compiler = find_compiler()
    if compiler is None:
        return None

    def build(path: Path) -> None:
        command = [*compiler.command, *compiler.flags, str(SOURCE), "-o", str(path)]
        subprocess.run(command, check=True, capture_output=True, timeout=SECONDS_TO_COMPILE)

    made_by = (*compiler.command, compiler.version, *compiler.flags, *compiler.features)
    return ctypes.CDLL(str(stored(f"peak_{key_of(SOURCE.read_text(), *made_by)}.so", build)))


def peak(dtype: str) -> Peak | None:
    """The loop that kernels of this dtype are compared with; None where the machine or the compiler has none."""
    kind = {"float32": "float", "bfloat16": "bfloat16"}[dtype]
    loaded = library()
    return Peak(loaded, kind) if loaded is not None and hasattr(loaded, f"{kind}_chains") else None


def against_peak(case: Case, most: int) -> dict[str, Contender]:
    """Ours and the loop; the loop's ratio is weighted so that it is our part of its operations per second."""
    threads = case.threads or most
    set_threads = functools.partial(torch.set_num_threads, threads)
    run = call(ours(case, pattern(case.pattern, case.keys)), case, tensors(case))
    contenders = {"ours": Contender(run, set_threads)}
    loop = peak(case.dtype)
    if loop is not None:
        weight = case.flops / loop.operations(threads)
        contenders["peak"] = Contender(functools.partial(loop.run, threads), set_threads, weight)
    return contenders

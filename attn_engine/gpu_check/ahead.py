"""The part that needs no GPU: showcase kernels compiled ahead of time, and what they ask of each target.

A kernel is at fault where it does not compile, needs more shared memory than a block may have, spills registers, or
makes no use of the matrix unit.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from attn_engine.codegen.gpu_schedule import default_schedule
from attn_engine.codegen.lower.capture import capture_gradients
from attn_engine.codegen.pipeline import lower
from attn_engine.codegen.schedule import Schedule, within_blocks
from attn_engine.codegen.targets import target_named
from attn_engine.gpu_check.cases import Case, Sizes
from attn_engine.gpu_check.checks import Failed
from attn_engine.gpu_check.jobs import timed
from attn_engine.gpu_check.outcome import Outcome
from attn_engine.gpu_check.programs import program_of
from attn_engine.ir.program import Attention
from attn_engine.ir.tile import Kernel
from attn_engine.runtime.aot_report import SHARED_LIMITS, TARGETS, AotReport
from attn_engine.runtime.backends import TritonBackend
from attn_engine.runtime.sass import PRODUCTS
from attn_engine.runtime.tilelang_aot import LoweredKernel, cubin_of, find_nvcc, lower_tilelang
from attn_engine.runtime.tilelang_backend import TileLangBackend
from attn_engine.runtime.triton_aot import compile_ahead

_SIZES = Sizes(1, 8, 8, 256, 256, 128, 128)
_NARROW, _GROUPED = replace(_SIZES, dim=64, dim_v=64), replace(_SIZES, kv_heads=2)
SHOWCASE = (
    Case(_SIZES, mask="causal"),
    Case(replace(_SIZES, dim=64, dim_v=64), score="soft-cap alibi", mask="window 1024"),
    Case(_SIZES, mask="causal documents"),
    Case(replace(_SIZES, dim=64, dim_v=64), normaliser="retention", mask="causal"),
    Case(replace(_GROUPED, batches=1), mask="causal", lengths=(100, 0, 156)),
    Case(_GROUPED, mask="causal", blocks="2D"),
    Case(_GROUPED, mask="causal", blocks="per token"),
    Case(_NARROW, mask="hash"),
    Case(_NARROW, mask="qk"),
    Case(_GROUPED, mask="local-stride"),
)
NOISE = 16  # bytes that ptxas keeps on the stack of some kernels, outside their loops
# Kernels that only add up rows, or look through them, have no use for the matrix unit.
_WITHOUT_PRODUCTS = ("delta", "adjoints", "merge", "settle")
_SHOWN = (*PRODUCTS, "UTMALDG", "LDGSTS", "MUFU.EX2")


class KernelsAhead:
    """A job that compiles kernels for a target. Its class says which, and has `name`, `backend` and `target`."""

    __slots__ = ()
    backend: str
    target: str

    def reports(self) -> Iterable[tuple[str, AotReport]]:
        """What the compiler says of each kernel, and the kernel's name."""
        raise NotImplementedError

    def run(self) -> Outcome:
        kernels: dict[str, Any] = {}
        outcome = timed(lambda: self._compile(kernels))
        return replace(outcome, numbers=outcome.numbers | {"kernels": kernels})

    def _compile(self, kernels: dict[str, Any]) -> str:
        faults: list[str] = []
        for name, report in self.reports():
            kernels[name] = facts = facts_of(report)
            faults += faults_of(report, facts)
        if faults:
            raise Failed("; ".join(faults))
        return f"{len(kernels)} kernels"


@dataclass(frozen=True, slots=True)
class AheadJob(KernelsAhead):
    """Every kernel of a case, compiled for a target."""

    case: Case
    backend: str
    target: str
    heavy: bool = False

    @property
    def name(self) -> str:
        sizes = self.case.sizes
        more = (f"blocks {self.case.blocks}" * bool(self.case.blocks), "packed" * bool(self.case.lengths))
        parts = (self.case.normaliser, self.case.score, self.case.mask, *more, f"D={sizes.dim}")
        return ", ".join(part for part in parts if part)

    def reports(self) -> Iterable[tuple[str, AotReport]]:
        for report in COMPILERS[self.backend](self.case, self.target):
            yield report.kernel, report


def jobs(backends: tuple[str, ...], targets: tuple[str, ...] = TARGETS) -> list[AheadJob]:
    return [AheadJob(case, b, t) for b in backends for case in SHOWCASE for t in targets]


def _with_triton(case: Case, target: str) -> list[AotReport]:
    program = program_of(case)
    TritonBackend("triton", interpret=False).refuse(program, capture_gradients(program, case.learned))
    schedule = within_blocks(default_schedule(program, target_named(target)), program.listed)
    return [compiled(k, schedule, target) for k in _kernels(case, program, schedule)]


def compiled(kernel: Kernel, schedule: Schedule, target: str) -> AotReport:
    """By Triton."""
    backend = TritonBackend("triton", interpret=False)
    return compile_ahead(kernel, backend.source(kernel, schedule), target, backend.options(kernel, schedule))


def _with_tilelang(case: Case, target: str) -> list[AotReport]:
    """Compiled by nvcc where there is one; else, and for AMD, only lowered: what can be read of the text."""
    backend = TileLangBackend("tilelang", on_cpu=False)
    program = program_of(case)
    backend.refuse(program, capture_gradients(program, case.learned))
    schedule = within_blocks(backend.schedule_on(program, target), program.listed)
    reports: list[AotReport] = []
    for kernel in _kernels(case, program, schedule):
        lowered = lower_tilelang(backend.source_for(kernel, schedule, target), kernel.name, target)
        compiles = target.startswith("sm_") and find_nvcc() is not None
        reports.append(cubin_of(lowered) if compiles else _of_the_text(lowered))
    return reports


def _of_the_text(lowered: LoweredKernel) -> AotReport:
    found = re.findall(r"wgmma|mma_sync|mfma|tcgen05", lowered.text)
    return AotReport(
        lowered.kernel, lowered.target, 0, 0, lowered.shared_bytes, SHARED_LIMITS[lowered.target],
        tuple((name, found.count(name)) for name in dict.fromkeys(found)), lowered.seconds,
    )  # fmt: skip


def _kernels(case: Case, program: Attention, schedule: Schedule) -> list[Kernel]:
    """Those of both directions."""
    return [k for d in ("forward", "backward") for k in lower(program, schedule, d, case.learned).kernels]


COMPILERS: dict[str, Callable[[Case, str], list[AotReport]]] = {
    "triton": _with_triton,
    "tilelang": _with_tilelang,
}


def facts_of(report: AotReport) -> dict[str, Any]:
    """What the report shows of a kernel, instructions of its main loop included."""
    facts: dict[str, Any] = {
        "registers": report.registers,
        "spill bytes": report.spill_bytes,
        "shared bytes": report.shared_bytes,
        "products": sum(count for _, count in report.products),
    }
    if report.cubin:
        code = report.machine_code()
        facts |= {name: count for name in _SHOWN if (count := code.count(name))}
        if (loop := code.main_loop) is not None:
            facts |= {"loop": loop.total, "trip": loop.trip.total}
    return facts


def faults_of(report: AotReport, facts: dict[str, Any]) -> list[str]:
    faults: list[str] = []
    where = f"{report.kernel} on {report.target}"
    if report.spill_bytes > NOISE:
        faults.append(f"{where}: {report.spill_bytes} bytes of registers spilled")
    if report.shared_bytes > report.shared_limit:
        faults.append(f"{where}: {report.shared_bytes} bytes shared, {report.shared_limit} are there")
    if not facts["products"] and not report.kernel.startswith(_WITHOUT_PRODUCTS):
        faults.append(f"{where}: no instruction of the matrix unit")
    return faults

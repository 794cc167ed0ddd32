"""What a full tile costs in machine code on sm_90, by kind of instruction: upper bounds just above what was reached.

A kernel that grows beyond them has lost something: a multiplication that was folded away, a load that no longer goes
through the tensor memory accelerator, registers that now spill. Measured with triton 3.7, causal
softmax, bfloat16, D = 128.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from attn_engine.codegen.pipeline import lower
from attn_engine.codegen.schedule import Edges, Gradients, Schedule
from attn_engine.ir.ops import Storage
from attn_engine.runtime.aot_report import AotReport
from attn_engine.runtime.backends import TritonBackend
from attn_engine.runtime.triton_aot import compile_ahead
from tests.ir.test_powers_of_two import GAINING
from tests.runtime.rules import program
from tests.runtime.test_triton_launch import CAUSAL

triton = pytest.importorskip("triton")
BACKEND = TritonBackend("triton", interpret=False)


@dataclass(frozen=True)
class Budget:
    """Of one kernel: rows and keys of a tile, registers, instructions of a trip, those that work on single scores.

    Per thread of 256: a tile of 128 x 128 has 64 scores for each.
    """

    rows: int
    keys: int
    registers: int
    instructions: int
    scores: int  # of a thread
    single: dict[str, float]  # how many of each kind a score may cost


# FMUL of the forward pass: the output of 128 columns is rescaled once a tile.
BUDGETS = {
    "forward": Budget(
        rows=128, keys=128, registers=232, instructions=510, scores=64,
        single={"FFMA": 1.1, "FMNMX": 1.1, "FADD": 1.1, "MUFU": 1.1, "FMUL": 1.1, "F2FP": 0.5},
    ),
    "dq": Budget(
        rows=128, keys=64, registers=200, instructions=300, scores=32,
        single={"FFMA": 1, "FADD": 1, "MUFU": 1, "FMUL": 1, "FMNMX": 0, "F2FP": 0.5},
    ),
    "dkdv": Budget(
        rows=64, keys=64, registers=208, instructions=350, scores=16,
        single={"FFMA": 1, "FADD": 1, "MUFU": 1, "FMUL": 1.5, "FMNMX": 0, "F2FP": 1, "LDG": 0},
    ),
}  # fmt: skip


def compiled(name: str, budget: Budget, *, plain: bool = False) -> AotReport:
    """plain: as it was without powers of two and descriptors."""
    q, kv = budget.rows, budget.keys
    new = not plain
    schedule = Schedule(
        q,
        kv,
        q,
        kv,
        Edges.BRANCH,
        Gradients.TWO_KERNELS,
        8,
        2,
        8,
        2,
        folded=new,
        descriptors=new,
        sections=new,
    )
    attention = program(None, CAUSAL, GAINING["softmax"](), Storage.BFLOAT16, 128, 128)
    kernel = lower(attention, schedule, "forward" if name == "forward" else "backward").kernel(name)
    return compile_ahead(kernel, BACKEND.source(kernel, schedule), "sm_90", BACKEND.options(kernel, schedule))


@pytest.mark.skipif(not triton.__version__.startswith("3.7."), reason="the bounds are of triton 3.7")
@pytest.mark.parametrize("name", BUDGETS)
def test_a_full_tile_stays_within_its_budget(name: str) -> None:
    budget = BUDGETS[name]
    report = compiled(name, budget)
    code = report.machine_code()
    loop = code.main_loop
    assert loop is not None
    trip = loop.trip
    assert code.spill_bytes == 0
    assert report.registers <= budget.registers
    assert trip.count("HGMMA") > 0
    assert trip.count("UTMALDG") == 2  # both tiles of the trip, 128 columns each
    assert trip.count("UTMALDG") + code.count("UTMALDG") > 2
    assert trip.total <= budget.instructions, trip.by_kind()
    assert trip.total < loop.total  # a full tile skips the mask
    for kind, most in budget.single.items():
        assert trip.count(kind) <= most * budget.scores, f"{kind}: {trip.by_kind()}"


@pytest.mark.slow
@pytest.mark.parametrize("name", BUDGETS)
def test_without_them_a_tile_costs_more(name: str) -> None:
    plain = compiled(name, BUDGETS[name], plain=True).machine_code().main_loop
    assert plain is not None
    assert plain.trip.total > BUDGETS[name].instructions
    assert plain.trip.count("UTMALDG") == 0

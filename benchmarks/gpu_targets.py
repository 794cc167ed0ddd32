"""The goals on an H200, all in one table; the report marks each as met or missed, and names the device it ran on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from benchmarks.gpu_cases import GpuCase


@dataclass(frozen=True, slots=True)
class Goal:
    """A bound from below: on TFLOP/s, or on a contender's time over ours."""

    of: Literal["TFLOP/s", "over flex"]
    bound: float

    def met(self, value: float) -> bool:
        return value >= self.bound

    def __str__(self) -> str:
        return f"≥ {self.bound:g}"


# In TFLOP/s at length 8192, 64:8 heads of 128, bfloat16.
RATES = {
    ("full", "forward"): 550, ("causal", "forward"): 520, ("full", "backward"): 430, ("causal", "backward"): 400,
    ("causal documents", "forward"): 400, ("causal documents", "backward"): 260,
}  # fmt: skip
NEVER_BELOW_FLEX = 1.0
WELL_ABOVE_FLEX = 1.4


def goals_of(case: GpuCase) -> tuple[Goal, ...]:
    """The goals of a case: every one is compared with flex_attention, and some with a rate."""
    well = case.pattern == "causal documents" or (case.pattern, case.direction) == ("causal", "backward")
    over_flex = Goal("over flex", WELL_ABOVE_FLEX if well else NEVER_BELOW_FLEX)
    rate = RATES.get((case.pattern, case.direction))
    if rate is None or (case.length, case.heads, case.kv_heads, case.dim) != (8192, 64, 8, 128):
        return (over_flex,)
    return Goal("TFLOP/s", rate), over_flex

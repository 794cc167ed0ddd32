"""The targets, all in one table; the report marks each as met or missed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.cases import DTYPES

Values = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Target:
    """A bound on a contender's ratio, for the cases whose fields have one of the values in `where`."""

    part: str
    contender: str
    bound: float
    at_most: bool = False
    where: Mapping[str, Values] = field(default_factory=dict)

    def fits(self, case: Mapping[str, Any], contender: str) -> bool:
        return (case["part"], contender) == (self.part, self.contender) and all(
            case[name] in values for name, values in self.where.items()
        )

    def met(self, ratio: float) -> bool:
        return ratio <= self.bound if self.at_most else ratio >= self.bound

    def __str__(self) -> str:
        return f"{'≤' if self.at_most else '≥'} {self.bound:g}"


# SDPA's time over ours: float32 forward and backward, bfloat16 forward and backward, and the lengths it holds for.
OVER_SDPA = {
    "full": (1.15, 1.15, 2.0, 1.6, (1024, 4096)),
    "causal": (1.3, 1.3, 2.3, 1.8, (1024, 4096)),
    "window 512": (8, 8, 13, 10, (4096,)),
    "documents": (8, 8, 13, 10, (4096,)),
    "causal documents": (8, 8, 13, 10, (4096,)),
}
OVER_FLEX = {"float32": 1.6, "bfloat16": 4.3}
OVER_EAGER = {"pattern": ("causal",), "queries": (4096,), "direction": ("forward+backward",)}
DECODE_OF_ONE_QUERY = {"float32": 1.8, "bfloat16": 8.0}
# Part of the peak of the same machine, with one thread and with all.
SHARE = (("float32", "forward", 0.8), ("float32", "backward", 0.8), ("bfloat16", "forward", 0.75))


def _over_sdpa() -> list[Target]:
    columns = [(dtype, direction) for dtype in DTYPES for direction in ("forward", "backward")]
    targets = []
    for name, (*bounds, lengths) in OVER_SDPA.items():
        for (dtype, direction), bound in zip(columns, bounds, strict=True):
            where = {"pattern": (name,), "dtype": (dtype,), "direction": (direction,), "queries": lengths}
            targets.append(Target("table", "sdpa", bound, where=where))
    return targets


# The first that fits counts.
TARGETS: tuple[Target, ...] = (
    *_over_sdpa(),
    *(Target("table", "flex", bound, where={"dtype": (dtype,)}) for dtype, bound in OVER_FLEX.items()),
    Target("table", "eager", 5.5, where=OVER_EAGER),
    *(Target("share", "peak", b, where={"dtype": (t,), "direction": (d,)}) for t, d, b in SHARE),
    *(
        Target("decode", "sdpa", bound, where={"dtype": (dtype,), "queries": (1,)})
        for dtype, bound in DECODE_OF_ONE_QUERY.items()
    ),
    Target("decode", "sdpa", 1.0),
    Target("mods", "ours", 1.25, at_most=True),
    Target("small", "sdpa", 0.8),
    Target("threads", "one thread", 1.8),
    Target("memory", "ours", 1.5, at_most=True),
)


def target_of(case: Mapping[str, Any], contender: str) -> Target | None:
    """The target of a contender's ratio in a case, given as a mapping of Case's fields; None where there is none."""
    return next((target for target in TARGETS if target.fits(case, contender)), None)

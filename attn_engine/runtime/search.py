"""The fastest of some candidates, by measurement within a time budget. Knows neither devices nor kernels.

Candidates are tried in order, the default first, as long as time is left for comparing them; then those still in the
race are measured in turn, so that a machine that slows down or speeds up does so for all of them. What is far from the
best drops out. The best median wins, and the default stays where nothing is clearly faster.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Generic, TypeVar

T = TypeVar("T")
Clock = Callable[[], float]

TRYING = 0.7  # share of the budget for trying candidates, the rest is for comparing those that stay
ROUNDS = 15  # measurements of a candidate at most
LEAST_ROUNDS = 3  # before one drops out
FAR = 1.15  # times the best median
CLEARLY = 0.98  # of the default's median, to take its place


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a search is. best, default: seconds, the smallest median so far and the default's."""

    tried: int
    candidates: int
    best: float
    default: float
    seconds_left: float


@dataclass(frozen=True, slots=True)
class Found(Generic[T]):
    """The winner. medians: of every candidate that ran, by its place; failed: the others that were tried, and why."""

    best: T
    place: int
    medians: dict[int, float]
    failed: dict[int, str]
    untried: int

    @property
    def seconds(self) -> float:
        return self.medians[self.place]

    @property
    def default_seconds(self) -> float:
        return self.medians[0]


def search(
    candidates: Sequence[T],
    measure: Callable[[T], float],
    seconds: float,
    *,
    clock: Clock = time.perf_counter,
    report: Callable[[Progress], None] = lambda progress: None,
) -> Found[T]:
    """The fastest candidate. The first is the default: it is always measured, and what it raises is raised.

    measure: seconds of one run, after whatever the first call of a candidate has to prepare; another candidate that
    raises is out of the race. seconds: the budget; a measurement that has begun is finished.
    """
    assert candidates, "there is nothing to choose from"
    end = clock() + seconds
    times: dict[int, list[float]] = {}
    failed: dict[int, str] = {}

    def progress() -> None:
        medians = [median(t) for t in times.values()]
        tried = len(times) + len(failed)
        report(Progress(tried, len(candidates), min(medians), median(times[0]), max(0.0, end - clock())))

    for place, candidate in enumerate(candidates):
        if place and clock() > end - (1 - TRYING) * seconds:
            break
        try:
            measure(candidate)  # compiles, and fills caches
            times[place] = [measure(candidate)]
        except Exception as error:
            if place == 0:
                raise
            failed[place] = f"{type(error).__name__}: {error}"
        progress()
    tried, racing = len(times) + len(failed), list(times)
    while clock() < end and len(times[racing[0]]) < ROUNDS and len(racing) > 1:
        for place in racing:
            times[place].append(measure(candidates[place]))
        racing = _still_racing(times, racing)
        progress()
    medians = {place: median(t) for place, t in times.items()}
    best = min(racing, key=lambda place: medians[place])
    if medians[best] > CLEARLY * medians[0]:
        best = 0
    return Found(candidates[best], best, medians, failed, len(candidates) - tried)


def _still_racing(times: dict[int, list[float]], racing: list[int]) -> list[int]:
    """Those near the best; the default stays to be compared with."""
    if len(times[racing[0]]) < LEAST_ROUNDS:
        return racing
    best = min(median(times[place]) for place in racing)
    return [place for place in racing if place == 0 or median(times[place]) <= FAR * best]

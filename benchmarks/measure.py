"""Measuring: contenders run in turns, round after round, and each round gives one ratio per contender."""

from __future__ import annotations

import gc
import math
import os
import resource
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

Run = Callable[[], object]
Clock = Callable[[], float]

SECONDS_AT_LEAST = 0.05
SECONDS_PER_CONTENDER = 2.0
FEWEST_ROUNDS = 3
SLOW_CALL = 0.5


@dataclass(frozen=True, slots=True)
class Contender:
    """run: one call. prepare: done before each stretch of calls, untimed. weight: a factor on the contender's ratio.
    most: rounds in which it takes part at most; None: as many as its time suggests."""

    run: Run
    prepare: Run | None = None
    weight: float = 1.0
    most: int | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """Quartiles of each contender's time over the base's, median seconds of a call, and what others used meanwhile.

    others: cores kept busy by other processes, on average; None where the system does not tell.
    """

    ratios: dict[str, list[float]]
    seconds: dict[str, float]
    others: float | None = None


def wall_clock() -> float:
    return time.perf_counter()


def stretch(contender: Contender, repeats: int, clock: Clock = wall_clock) -> float:
    """Seconds per call."""
    if contender.prepare is not None:
        contender.prepare()
        contender.run()
    start = clock()
    for _ in range(repeats):
        contender.run()
    return (clock() - start) / repeats


def warm_up(contender: Contender, clock: Clock = wall_clock) -> float:
    """Compile and warm up; how long a call takes, about."""
    first = stretch(contender, 1, clock)
    if first > SLOW_CALL:
        return stretch(contender, 1, clock)
    return min(stretch(contender, 1, clock) for _ in range(3))


def measure(
    contenders: Mapping[str, Contender],
    base: str = "ours",
    rounds: int = 7,
    clock: Clock = wall_clock,
) -> Outcome:
    """Ratios of each contender to `base`. Slow contenders sit out some rounds, but never all but FEWEST_ROUNDS.

    clock: `time.process_time` for one thread, which other processes disturb less.
    """
    about = {name: warm_up(c, clock) for name, c in contenders.items()}
    repeats = {name: max(1, math.ceil(SECONDS_AT_LEAST / t)) for name, t in about.items()}
    wanted = {
        name: max(FEWEST_ROUNDS, min(rounds, int(SECONDS_PER_CONTENDER / (t * repeats[name]))))
        for name, t in about.items()
    }
    wanted = {name: min(n, contenders[name].most or n) for name, n in wanted.items()}
    count = max(n for name, n in wanted.items() if name != base or len(wanted) == 1)
    times: dict[str, list[float]] = {name: [] for name in contenders}
    ratios: dict[str, list[float]] = {name: [] for name in contenders if name != base}
    gc.collect()
    gc.disable()
    others = OtherWork()
    try:
        for turn in range(count):
            taking_part = [n for n in contenders if n == base or sits_in(turn, wanted[n], count)]
            now = {name: stretch(contenders[name], repeats[name], clock) for name in taking_part}
            for name, t in now.items():
                times[name].append(t)
                if name != base:
                    ratios[name].append(contenders[name].weight * t / now[base])
    finally:
        gc.enable()
    return Outcome(
        {name: quartiles(values) for name, values in ratios.items()},
        {name: rounded(statistics.median(values)) for name, values in times.items()},
        others.cores(),
    )


def sits_in(turn: int, wanted: int, count: int) -> bool:
    """Whether a contender takes part in this round: `wanted` of `count`, spread evenly."""
    return (turn + 1) * wanted // count > turn * wanted // count


def quartiles(values: list[float]) -> list[float]:
    if len(values) == 1:
        return [rounded(values[0])] * 3
    return [rounded(x) for x in statistics.quantiles(values, n=4, method="inclusive")]


def rounded(value: float) -> float:
    """Four digits: more would be noise."""
    return float(f"{value:.4g}")


class OtherWork:
    """How many cores other processes keep busy from now on: what they do disturbs a measurement."""

    def __init__(self) -> None:
        self._start = self._now()

    @staticmethod
    def _now() -> tuple[float, float, float] | None:
        try:
            fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
        except OSError:
            return None
        user, nice, system, _idle, _wait, interrupt, soft, stolen = (int(x) for x in fields)
        busy = (user + nice + system + interrupt + soft + stolen) / os.sysconf("SC_CLK_TCK")
        own = sum(
            use.ru_utime + use.ru_stime
            for use in (
                resource.getrusage(resource.RUSAGE_SELF),
                resource.getrusage(resource.RUSAGE_CHILDREN),
            )
        )
        return time.perf_counter(), busy, own

    def cores(self) -> float | None:
        now = self._now()
        if self._start is None or now is None:
            return None
        wall, busy, own = (b - a for a, b in zip(self._start, now, strict=True))
        return round(max(0.0, (busy - own) / wall), 2) if wall > 0 else None

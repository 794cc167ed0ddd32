"""Timing on a GPU: every contender in turns, each call between two events, with the second-level cache emptied before.

On a CPU the same is timed by the clock: for trying the benchmark itself.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from benchmarks.gpu_cases import GpuCase, attention
from benchmarks.gpu_contenders import Cannot, Function, Maker, tensors
from benchmarks.measure import quartiles, rounded

Run = Callable[[], object]
BYTES_OF_CACHE = 2**28
SECONDS_PER_CASE = 0.6
FEWEST_ROUNDS, MOST_ROUNDS = 5, 30
# Two implementations in 16 bits differ by a few roundings; more than this is another function.
MOST_DIFFERENCE = 0.03
LONGEST_REASON = 200
MATMUL_SIZES = (4096, 8192)


@dataclass(frozen=True, slots=True)
class GpuOutcome:
    """Quartiles of the seconds of a call, and why others have none."""

    seconds: dict[str, list[float]] = field(default_factory=dict[str, list[float]])
    left_out: dict[str, str] = field(default_factory=dict[str, str])


@dataclass(slots=True)
class Timer:
    """Times calls on a device."""

    device: str
    _cache: Tensor | None = None

    def __call__(self, run: Run) -> float:
        """Seconds of one call that finds the cache empty."""
        if self.device == "cpu":
            begin = time.perf_counter()
            run()
            return time.perf_counter() - begin
        if self._cache is None:
            self._cache = torch.empty(BYTES_OF_CACHE, dtype=torch.uint8, device=self.device)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._cache.zero_()  # long enough that the call below is waiting when it ends
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000


def measure(case: GpuCase, makers: Mapping[str, Maker], functions: Functions, timer: Timer) -> GpuOutcome:
    """Every contender that computes the case, one after the other, round after round."""
    given = tensors(case, timer.device)
    runs: dict[str, Run] = {}
    left_out: dict[str, str] = {}
    wanted: Tensor | None = None
    for name in makers:
        try:
            function = functions.get(name, case)
            run = run_of(function, case, given)
            result = _result(run())
            run()
        except Exception as error:
            left_out[name] = reason(error)
            continue
        wanted = result if wanted is None else wanted
        if (off := difference(result, wanted)) > MOST_DIFFERENCE:
            left_out[name] = f"its result differs from that of {next(iter(runs))} by {off:.2f} of its size"
            continue
        runs[name] = run
    return GpuOutcome(in_turns(runs, timer), left_out)


def reason(error: Exception) -> str:
    kind = "" if isinstance(error, Cannot) else f"{type(error).__name__}: "
    return kind + " ".join(str(error).split())[:LONGEST_REASON]


def run_of(function: Function, case: GpuCase, given: list[Tensor]) -> Run:
    """One call in the case's direction; backward is the gradient alone, on a graph that is kept."""
    q, k, v, d_out = given
    if case.direction == "forward":

        def forward() -> object:
            with torch.no_grad():
                return function(q, k, v)

        return forward
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = function(*leaves)
    return lambda: torch.autograd.grad(out, leaves, d_out, retain_graph=True)


def _result(found: object) -> Tensor:
    """What is compared: the output, or the gradient of q."""
    first = found[0] if isinstance(found, tuple) else found
    assert isinstance(first, Tensor)
    return first.detach().clone()


def difference(x: Tensor, wanted: Tensor) -> float:
    """The size of the difference over that of what is wanted; NaN counts as all."""
    off, size = (y.float().square().sum().sqrt() for y in (x - wanted, wanted))
    found = float(off / size)
    return found if found == found else float("inf")


def in_turns(runs: Mapping[str, Run], timer: Timer) -> dict[str, list[float]]:
    about = {name: min(timer(run) for _ in range(2)) for name, run in runs.items()}
    rounds = int(SECONDS_PER_CASE / max(1e-9, sum(about.values())))
    times: dict[str, list[float]] = {name: [] for name in runs}
    gc.collect()
    gc.disable()
    try:
        for _ in range(max(FEWEST_ROUNDS, min(MOST_ROUNDS, rounds))):
            for name, run in runs.items():
                times[name].append(timer(run))
    finally:
        gc.enable()
    return {name: quartiles(values) for name, values in times.items()}


class Functions:
    """The contenders of a shape, made once for both of its directions."""

    def __init__(self, makers: Mapping[str, Maker], device: str) -> None:
        self._makers, self._device = makers, device
        self._shape: GpuCase | None = None
        self._made: dict[str, Function] = {}

    def get(self, name: str, case: GpuCase) -> Function:
        """Raises Cannot, or what making the contender raises."""
        shape = replace(case, direction="")
        if shape != self._shape:
            self._made.clear()
            torch.compiler.reset()
            self._shape, self._attention = shape, attention(case, self._device)
        if name not in self._made:
            self._made[name] = self._makers[name](case, self._attention, self._device)
        return self._made[name]


def matmul_rate(timer: Timer, sizes: tuple[int, ...] = MATMUL_SIZES) -> float:
    """Operations per second of torch.matmul in bfloat16: the best of some sizes, each the median of several calls."""
    best = 0.0
    for n in sizes:
        a, b = (torch.randn(n, n, device=timer.device).to(torch.bfloat16) for _ in range(2))
        for _ in range(3):
            timer(lambda a=a, b=b: a @ b)
        seconds = statistics.median(timer(lambda a=a, b=b: a @ b) for _ in range(10))
        best = max(best, 2 * n**3 / seconds)
    return rounded(best)

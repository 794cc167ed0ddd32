"""Schedules by measurement: candidates of one direction run on the tensors of a call, the best one is stored."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TextIO

import torch
from torch import Tensor

from attn_engine.codegen.schedule import Schedule
from attn_engine.ir.ops import Number
from attn_engine.ir.program import Attention
from attn_engine.runtime.backend import Backend
from attn_engine.runtime.compiled import CompiledAttention
from attn_engine.runtime.schedule_store import Stored, fields_of
from attn_engine.runtime.search import Progress, search

PROGRESS = "ATTN_ENGINE_PROGRESS"
LEAST_SECONDS = 2e-3  # of one measurement: shorter runs are repeated within it
MOST_REPEATS = 100

Measure = Callable[[Schedule], float]


@dataclass(frozen=True, slots=True)
class Sample:
    """The tensors of a call in logical order, detached: what candidates are measured on."""

    q: Tensor
    k: Tensor
    v: Tensor
    captured: Mapping[str, Tensor]
    numbers: Mapping[str, Number]
    learned: tuple[str, ...] = ()

    def __str__(self) -> str:
        return ", ".join(f"{n} {tuple(x.shape)}" for n, x in (("q", self.q), ("k", self.k), ("v", self.v)))

    @property
    def device(self) -> str:
        if self.q.device.type == "cuda":
            return torch.cuda.get_device_name(self.q.device)
        return f"{self.q.device.type} with {torch.get_num_threads()} threads"


class Stopwatch:
    """Seconds that a schedule takes for one direction of a sample. Kernels are kept for the next measurement."""

    def __init__(self, program: Attention, backend: Backend, part: str, sample: Sample) -> None:
        self._program, self._backend, self._part, self._sample = program, backend, part, sample
        self._runs: dict[Schedule, Callable[[], Any]] = {}

    def __call__(self, schedule: Schedule) -> float:
        """The first time it also compiles, and returns a time that means nothing."""
        run = self._runs.get(schedule)
        if run is None:
            run = self._runs[schedule] = self._prepared(schedule)
            return self._timed(run, 1)
        once = self._timed(run, 1)
        repeats = min(MOST_REPEATS, int(LEAST_SECONDS / max(once, 1e-9)))
        return once if repeats < 2 else self._timed(run, repeats)

    def _timed(self, run: Callable[[], Any], repeats: int) -> float:
        self._wait()
        begin = time.perf_counter()
        for _ in range(repeats):
            run()
        self._wait()
        return (time.perf_counter() - begin) / repeats

    def _wait(self) -> None:
        if self._sample.q.device.type == "cuda":
            torch.cuda.synchronize(self._sample.q.device)

    def _prepared(self, schedule: Schedule) -> Callable[[], Any]:
        s, compiled = self._sample, CompiledAttention(self._program, self._backend, schedule)
        out = s.q.new_empty((*s.q.shape[:3], s.v.shape[3]))

        def forward() -> list[Tensor]:
            return compiled.forward(s.q, s.k, s.v, s.captured, s.numbers, out)

        if self._part == "forward":
            return forward
        saved, d_out = forward(), torch.randn_like(out)
        gradients = (torch.empty_like(s.q), torch.empty_like(s.k), torch.empty_like(s.v))
        inputs = (s.q, s.k, s.v)
        return lambda: compiled.backward(
            d_out, inputs, out, saved, s.captured, s.numbers, gradients, s.learned
        )


def tune(
    part: str,
    candidates: Sequence[Schedule],
    measure: Measure,
    seconds: float,
    sample: Sample,
    stream: TextIO | None = None,
) -> Stored:
    """The best of `candidates`, the default first, for one direction.

    seconds: the budget, compiling included. stream: where progress is shown; None: nowhere.
    """
    line = ProgressLine(part, stream)
    try:
        with torch.no_grad():
            found = search(candidates, measure, seconds, report=line.show)
    finally:
        line.close()
    fields = fields_of(found.best, part)
    return Stored(part, fields, found.seconds, found.default_seconds, str(sample), sample.device)


def of_part(default: Schedule, candidates: Sequence[Schedule], part: str) -> list[Schedule]:
    """The default and then the candidates that differ from it in this direction, each once and in nothing else."""
    made = (replace(default, **fields_of(c, part)) for c in candidates)
    return list(dict.fromkeys((default, *made)))


class ProgressLine:
    """One line that is written over and over, and wiped at the end."""

    def __init__(self, part: str, stream: TextIO | None) -> None:
        self._part, self._stream, self._length = part, stream, 0

    def show(self, p: Progress) -> None:
        if self._stream is None:
            return
        text = (
            f"tuning {self._part}: {p.tried} of {p.candidates} schedules, best {p.best * 1e3:.3g} ms, "
            f"default {p.default * 1e3:.3g} ms, {p.seconds_left:.0f} s left"
        )
        self._stream.write("\r" + text.ljust(self._length))
        self._stream.flush()
        self._length = len(text)

    def close(self) -> None:
        if self._stream is not None and self._length:
            self._stream.write("\r" + " " * self._length + "\r")
            self._stream.flush()


def progress_stream() -> TextIO | None:
    """stderr where a person looks at it, or where $ATTN_ENGINE_PROGRESS is 1; nowhere where that is 0."""
    wanted = os.environ.get(PROGRESS, "").strip()
    shown = wanted == "1" or (wanted != "0" and sys.stderr.isatty())
    return sys.stderr if shown else None

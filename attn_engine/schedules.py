"""The schedules of one engine: given by the user, else tuned here or earlier, else the backend's default."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attn_engine.codegen.schedule import Schedule
from attn_engine.codegen.targets import target_named
from attn_engine.errors import CacheNotWritten, NothingToTune, StoreIgnored, WrongArgument
from attn_engine.ir.ops import Number
from attn_engine.ir.program import Attention
from attn_engine.runtime.backend import Backend
from attn_engine.runtime.backends import backend_for, backend_named, schedule_for
from attn_engine.runtime.gpu_target import current_target
from attn_engine.runtime.schedule_choice import GPUS, candidates, check_schedule, place_of, schedule_on
from attn_engine.runtime.schedule_store import PARTS, Place, Stored, load, path_of, save
from attn_engine.runtime.tune import Sample, Stopwatch, of_part, progress_stream, tune

if TYPE_CHECKING:
    from attn_engine.engine import AttentionEngine
    from attn_engine.traced_program import TracedProgram

TUNE_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Chosen:
    """A schedule, and where it comes from, for a person to read."""

    schedule: Schedule
    origin: str


class Schedules:
    """What an engine was told about schedules, and what it measured. Threads may tune at once; the last one counts."""

    def __init__(self, given: object, tune: object, seconds: object, backend: str) -> None:
        """Raises WrongArgument, and NothingToTune where the backend is known and has nothing to measure."""
        if not isinstance(tune, bool):
            raise WrongArgument(argument="tune", got=tune, expected="True or False", instead="Leave it out.")
        if (
            isinstance(seconds, bool)
            or not isinstance(seconds, int | float)
            or not 0 < seconds < float("inf")
        ):
            instead = (
                f"It is the time that tuning may take for a direction; leave it out for {TUNE_SECONDS:.0f}."
            )
            raise WrongArgument(
                argument="tune_seconds", got=seconds, expected="a positive number of seconds", instead=instead
            )
        if tune and given is not None:
            instead = "Leave one of them out: a given schedule is taken as it is."
            raise WrongArgument(
                argument="schedule", got=given, expected="None with tune=True", instead=instead
            )
        self.given, self.tuning, self.seconds = given, tune, float(seconds)
        self._tuned: dict[tuple[Attention, str, str], Stored] = {}
        if tune and backend != "auto":
            place_of(backend_named(backend))

    def choose(self, program: Attention, backend: Backend, target: str | None = None) -> Chosen:
        """For a program on a backend; raises the errors of `check_schedule` for a given one that cannot run.

        target: of a GPU; None: the one at hand. A schedule for another one is the default.
        """
        if self.given is not None:
            wanted = current_target() if target is None else target_named(target)
            schedule = check_schedule(program, backend, self.given, wanted)
            return Chosen(schedule_for(program, backend, schedule), "given by the caller")
        if target is not None:
            schedule = schedule_on(program, backend, target_named(target))
            return Chosen(schedule, f"the default for {target}" if backend.name in GPUS else "the default")
        schedule, origins = schedule_for(program, backend), list[str]()
        for part in PARTS:
            stored, where = self._stored(program, backend, part)
            if stored is not None:
                schedule = stored.applied(schedule)
                origins.append(f"{stored}{where}")
        return Chosen(schedule_for(program, backend, schedule), "\n".join(origins) or "the default")

    def _stored(self, program: Attention, backend: Backend, part: str) -> tuple[Stored | None, str]:
        """What was tuned by this engine, or by an earlier one and kept on disk; and where it is kept."""
        try:
            place = place_of(backend)
        except NothingToTune:
            return None, ""
        own = self._tuned.get((program, backend.name, part))
        stored = own or load(program, place, part)
        path = path_of(program, place, part)
        return stored, f"\n  kept in {path}" if stored and path.exists() else ""

    def tune(self, program: Attention, backend: Backend, sample: Sample, parts: Iterable[str]) -> bool:
        """Search for the directions that have no stored schedule yet; whether there is a new one."""
        place, found = place_of(backend), False
        for part in parts:
            if (program, backend.name, part) in self._tuned:
                continue
            stored = load(program, place, part)
            if stored is None:
                default = self.choose(program, backend).schedule
                tried = of_part(default, candidates(program, backend, default, part), part)
                measure = Stopwatch(program, backend, part, sample)
                stored = tune(part, tried, measure, self.seconds, sample, progress_stream())
                found = True
                _keep(program, place, stored)
            self._tuned[program, backend.name, part] = stored
        return found


def _keep(program: Attention, place: Place, stored: Stored) -> None:
    """On disk where that is possible; this engine has it in any case."""
    try:
        save(program, place, stored)
    except CacheNotWritten as problem:
        warnings.warn(f"A tuned schedule is not kept: {problem.message}", StoreIgnored, stacklevel=2)


def tune_for_call(
    engine: AttentionEngine,
    traced: TracedProgram,
    inputs: tuple[Tensor, Tensor, Tensor],
    captured: Mapping[str, Tensor],
    numbers: Mapping[str, Number],
) -> None:
    """Tune what the tensors of a call need, once, and let the engine take the result."""
    backend = backend_named(backend_for(engine.backend, inputs[0].device.type))
    learned = tuple(c.name for c in traced.program.differentiable_captures if captured[c.name].requires_grad)
    q, k, v = (engine._logical(x.detach()) for x in inputs)
    sample = Sample(q, k, v, {n: x.detach() for n, x in captured.items()}, numbers, learned)
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in (*inputs, *captured.values()))
    if engine._schedules.tune(traced.program, backend, sample, PARTS if learns else PARTS[:1]):
        engine._forget_calls(traced, backend.name)

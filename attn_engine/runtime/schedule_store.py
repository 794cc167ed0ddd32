"""Tuned schedules on disk: one small JSON file per program, target, toolchain and direction, beside the kernel cache.

A file is data, never code: what it says is checked field by field, and a file that makes no sense is moved aside with a
warning and not used. Writing is atomic, and the last of two processes that tune the same at once wins.
"""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

from attn_engine.codegen.schedule import BACKWARD_FIELDS, FORWARD_FIELDS, Launch, Schedule
from attn_engine.errors import CacheNotWritten, StoreIgnored
from attn_engine.ir.printer import format_program
from attn_engine.ir.program import Attention
from attn_engine.runtime.cache import cache_folder, key_of, why_unsafe

FORMAT = 1
FIELDS = {"forward": FORWARD_FIELDS, "backward": BACKWARD_FIELDS}
PARTS = tuple(FIELDS)


@dataclass(frozen=True, slots=True)
class Place:
    """What a tuned schedule is for: the backend with its target, and the versions that its kernels are made by."""

    backend: str
    target: str
    toolchain: str


@dataclass(frozen=True, slots=True)
class Stored:
    """The fields of a schedule that won, and the evidence: median seconds of it and of the default, and of what."""

    part: str
    fields: Mapping[str, Any]
    seconds: float
    default_seconds: float
    shapes: str
    device: str

    def applied(self, schedule: Schedule) -> Schedule:
        return replace(schedule, **self.fields)

    def __str__(self) -> str:
        times = f"{self.seconds * 1e3:.3g} ms, the default {self.default_seconds * 1e3:.3g} ms"
        return f"{self.part} tuned on {self.device} for {self.shapes}: {times}"


def fields_of(schedule: Schedule, part: str) -> dict[str, Any]:
    """Those fields of a schedule that decide about one direction."""
    return {name: getattr(schedule, name) for name in FIELDS[part]}


def path_of(program: Attention, place: Place, part: str) -> Path:
    """Where the schedule of one direction is kept, whether or not there is one."""
    text = (format_program(program), place.backend, place.target, place.toolchain, part)
    return cache_folder() / f"schedule_{key_of(f'schedule {FORMAT}', *text)}.json"


def load(program: Attention, place: Place, part: str) -> Stored | None:
    """What was stored; None where nothing was, or where the file makes no sense: then it is moved aside."""
    path = path_of(program, place, part)
    try:
        if (reason := why_unsafe(path)) is not None:
            raise ValueError(reason)
        return _read(json.loads(path.read_text()), part)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
        _put_aside(path, problem)
        return None


def save(program: Attention, place: Place, stored: Stored) -> Path:
    """Write it at once, so that nobody reads half of it. Raises CacheNotWritten."""
    path = path_of(program, place, stored.part)
    about = {"format": FORMAT, "program": program.name, **asdict(place)}
    text = json.dumps({**about, **asdict(stored)}, indent=1) + "\n"
    try:
        handle, scratch = tempfile.mkstemp(dir=path.parent, prefix="schedule_", suffix=".new")
        with os.fdopen(handle, "w") as file:
            file.write(text)
        Path(scratch).replace(path)
    except OSError as problem:
        raise CacheNotWritten(path=path, reason=problem.strerror or str(problem)) from problem
    return path


def _read(data: Any, part: str) -> Stored:
    """The entry that a file describes; raises ValueError, KeyError or TypeError for anything else."""
    if data["format"] != FORMAT or data["part"] != part or data["fields"].keys() != set(FIELDS[part]):
        raise ValueError("it is of another format")
    fields = {name: _field(name, value) for name, value in data["fields"].items()}
    seconds = (float(data["seconds"]), float(data["default_seconds"]))
    return Stored(part, fields, *seconds, str(data["shapes"]), str(data["device"]))


def _field(name: str, value: Any) -> int | Launch | None:
    if name == "d_query":
        known = cast("dict[str, Any] | None", value)
        return None if known is None else Launch(**{key: _count(key, n) for key, n in known.items()})
    return _count(name, value)


def _count(name: str, value: Any) -> int:
    if type(value) is not int or not 0 <= value <= 4096:
        raise ValueError(f"{name} is {value!r}")
    return value


def _put_aside(path: Path, problem: Exception) -> None:
    """Keep a file that makes no sense under another name, so that a person can look at it."""
    aside = path.with_suffix(f".{os.getpid()}.broken")
    try:
        path.replace(aside)
        where = f"it is kept as {aside}"
    except OSError as failed:
        where = f"it could not be moved aside ({failed.strerror})"
    reason = f"{type(problem).__name__}: {problem}"
    warnings.warn(
        f"The stored schedule {path} is not used ({reason}); {where}. The default schedule is taken.",
        StoreIgnored,
        stacklevel=2,
    )

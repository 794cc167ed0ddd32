"""What came of a check, and the jobs that worker processes carry out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

Verdict = Literal["passed", "failed", "not run"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """numbers: what was read or measured, for the JSON file."""

    verdict: Verdict
    detail: str
    seconds: float = 0.0
    numbers: dict[str, Any] = field(default_factory=dict[str, Any])


class Job(Protocol):
    """Something that another process can carry out: plain data with a `run`."""

    @property
    def name(self) -> str: ...

    @property
    def heavy(self) -> bool: ...

    def run(self) -> Outcome: ...


@dataclass(frozen=True, slots=True)
class Done:
    """A job and its outcome. place: the backend, or the target that was compiled for."""

    section: Literal["checks", "ahead"]
    name: str
    place: str
    outcome: Outcome

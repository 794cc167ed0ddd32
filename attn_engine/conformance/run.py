"""The table carried out for a subject, and what came out."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from attn_engine.conformance import block_masks as _block_masks  # noqa: F401  declare into PROPERTIES
from attn_engine.conformance import compiler as _compiler  # noqa: F401
from attn_engine.conformance.biases import BIASES
from attn_engine.conformance.check import check
from attn_engine.conformance.entries import Entry, NotApplicable, Property
from attn_engine.conformance.masks import MASKS
from attn_engine.conformance.properties import PROPERTIES
from attn_engine.conformance.scores import SCORES
from attn_engine.conformance.shapes import SHAPES
from attn_engine.conformance.subjects import Subject

ENTRIES: tuple[Entry, ...] = tuple(e for t in (SCORES, MASKS, SHAPES, BIASES) for e in t.entries)
PASS, NOTHING, NOT_ASKED = "pass", "", "not applicable"


@dataclass(frozen=True, slots=True)
class Outcome:
    """forward, backward: PASS, NOTHING where there is no such check, NOT_ASKED, or what went wrong in one line."""

    name: str
    section: str
    forward: str
    backward: str


def everything() -> list[Entry | Property]:
    """The rows of the table, by section."""
    rows: list[Entry | Property] = [*ENTRIES, *PROPERTIES]
    return sorted(rows, key=lambda row: row.section)


def outcome(subject: Subject, row: Entry | Property) -> Outcome:
    """One row carried out."""
    if isinstance(row, Property):
        found = _tried(lambda: row.run(subject))
        pair = (NOTHING, found) if row.backward else (found, NOTHING)
        return Outcome(row.name, row.section, *pair)
    backward = _tried(lambda: check(subject, row))
    forward = backward if backward == PASS else _tried(lambda: check(subject, row, backward=False))
    return Outcome(row.name, row.section, forward, backward)


def _tried(run: Callable[[], None]) -> str:
    try:
        run()
    except NotApplicable:
        return NOT_ASKED
    except Exception as error:  # whatever a subject raises is its answer
        return _answer(error)
    return PASS


def _answer(error: Exception) -> str:
    """One line of an error: of the one inside, where a compiler reports what the function that it compiled raised."""
    inside = re.search(r"raised exception (\w+)\(['\"]?(.*?)['\"]?\)\s*$", str(error), re.MULTILINE)
    if inside is not None:
        return f"{inside[1]}: {inside[2][:200]}"
    message = getattr(error, "message", str(error))
    text = next((line.strip() for line in message.splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text[:200]}"


def run(
    subject: Subject,
    rows: Iterable[Entry | Property],
    kept: Path | None = None,
    seconds: float | None = None,
    tell: Callable[[Outcome, float], None] | None = None,
) -> list[Outcome]:
    """The outcomes of rows. kept: a JSON file of earlier ones, which are taken from it, and new ones added.

    seconds: no row is begun after so long; `run` can be called again with the same file.
    """
    known = read(kept).get(subject.name, {})
    end = None if seconds is None else time.monotonic() + seconds
    found: list[Outcome] = []
    for row in rows:
        key = f"{row.section}: {row.name}"
        if key not in known:
            if end is not None and time.monotonic() > end:
                continue
            start = time.monotonic()
            known[key] = outcome(subject, row)
            if tell is not None:
                tell(known[key], time.monotonic() - start)
            if kept is not None:
                write(kept, subject.name, known)
        found.append(known[key])
    return found


def read(path: Path | None) -> dict[str, dict[str, Outcome]]:
    """Outcomes by subject and row."""
    if path is None or not path.exists():
        return {}
    text = json.loads(path.read_text())
    return {s: {key: Outcome(**o) for key, o in rows.items()} for s, rows in text.items()}


def write(path: Path, subject: str, outcomes: dict[str, Outcome]) -> None:
    text = {s: {key: asdict(o) for key, o in rows.items()} for s, rows in read(path).items()}
    text[subject] = {key: asdict(o) for key, o in outcomes.items()}
    path.write_text(json.dumps(text, indent=1))


def counted(outcomes: Iterable[Outcome]) -> tuple[tuple[int, int], tuple[int, int]]:
    """(passed, asked) of the forward checks and of the backward checks."""
    given = list(outcomes)

    def of(answers: list[str]) -> tuple[int, int]:
        asked = [a for a in answers if a not in (NOTHING, NOT_ASKED)]
        return asked.count(PASS), len(asked)

    return of([o.forward for o in given]), of([o.backward for o in given])

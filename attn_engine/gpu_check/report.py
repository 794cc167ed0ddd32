"""What a run leaves: a JSON file, written after every check, and a page in Markdown."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from attn_engine.gpu_check.outcome import Done

FORMAT = 1
MARKS = {"passed": "passed", "failed": "**FAILED**", "not run": "not run"}


@dataclass(slots=True)
class Report:
    """Everything that a run found. notes: what could not be tried, and why. benchmark: the page of the benchmark."""

    machine: dict[str, Any]
    command: str
    done: list[Done] = field(default_factory=list[Done])
    notes: list[str] = field(default_factory=list[str])
    benchmark: str = ""
    seconds: float = 0.0

    @property
    def failures(self) -> list[Done]:
        return [d for d in self.done if d.outcome.verdict == "failed"]

    def counts(self) -> str:
        counts = Counter(d.outcome.verdict for d in self.done)
        return ", ".join(f"{counts[verdict]} {verdict}" for verdict in MARKS)

    def save(self, path: Path) -> None:
        """path: of the JSON file; the page lies beside it. Each is written whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {"format": FORMAT, **asdict(self)}
        _write(path, json.dumps(content, indent=1, ensure_ascii=False, default=str) + "\n")
        _write(path.with_suffix(".md"), self.markdown())

    def markdown(self) -> str:
        parts = [
            f"# GPU check, {self.machine['date']:.10}\n\n{self.counts()}, in {self.seconds:.0f} seconds.\n",
            table(["machine", ""], [[key, str(value)] for key, value in self.machine.items()]),
            f"Command: `{self.command}`\n",
        ]
        if self.notes:
            parts.append("\n".join(f"- {note}" for note in self.notes) + "\n")
        if self.failures:
            lines = [f"- {d.name} ({d.place}): {_one_line(d.outcome.detail)}" for d in self.failures]
            parts.append("## Failed\n\n" + "\n".join(lines) + "\n")
        if checks := [d for d in self.done if d.section == "checks"]:
            parts.append("## Checks\n\n" + _by_place("check", checks))
        if ahead := [d for d in self.done if d.section == "ahead"]:
            parts.append("## Compiled ahead of time\n\n" + _kernels(ahead))
        if self.benchmark:
            parts.append(self.benchmark)
        return "\n".join(parts)


def _write(path: Path, text: str) -> None:
    fresh = path.with_suffix(path.suffix + ".part")
    fresh.write_text(text, encoding="utf-8")
    fresh.replace(path)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _one_line(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _by_place(title: str, done: Sequence[Done]) -> str:
    """A line per check, a column per backend, and what the first backend that has numbers says."""
    places = list(dict.fromkeys(d.place for d in done))
    by_name: dict[str, dict[str, Done]] = {}
    for d in done:
        by_name.setdefault(d.name, {})[d.place] = d
    rows: list[list[str]] = []
    for name, at in by_name.items():
        cells = [_cell(at[place]) if place in at else "-" for place in places]
        rows.append([_one_line(name), *cells])
    return table([title, *places], rows)


def _cell(d: Done) -> str:
    outcome = d.outcome
    detail = outcome.detail if outcome.verdict != "failed" else "see above"
    return f"{MARKS[outcome.verdict]} ({_one_line(detail)}; {outcome.seconds:.1f} s)"


def _kernels(done: Sequence[Done]) -> str:
    """A line per kernel with what it asks for; where nothing was compiled, why."""
    rows: list[list[str]] = []
    for d in done:
        kernels: dict[str, dict[str, Any]] = d.outcome.numbers.get("kernels", {})
        for kernel, facts in kernels.items():
            said = ", ".join(f"{name} {value}" for name, value in facts.items())
            rows.append([d.place, d.name, kernel, MARKS[d.outcome.verdict], said])
        if not kernels:
            rows.append([d.place, d.name, "-", MARKS[d.outcome.verdict], _one_line(d.outcome.detail)])
    return table(["for", "case", "kernel", "", "asks for"], rows)

"""What a run leaves: a JSON file with the machine and, after each case, what was measured. A run can go on from it."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import subprocess
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from attn_engine.runtime.cpu_compile import find_compiler

FORMAT = 2
FOLDER = Path(__file__).parent / "results"
# A run goes on only where these are as they were: ratios of two machines do not belong in one table.
SAME = ("processor", "cores", "threads", "python", "torch", "compiler")


class ResultNotUsable(Exception):
    """A result file that this program cannot read or go on with; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Results:
    """A result file's content. entries: {"case": fields of a case, and those of its outcome}; both are dataclasses."""

    machine: dict[str, Any]
    commands: list[str] = field(default_factory=list)
    entries: list[dict[str, Any]] = field(default_factory=list)

    def has(self, case: Any) -> bool:
        fields = asdict(case)
        return any(entry["case"] == fields for entry in self.entries)

    def add(self, case: Any, outcome: Any) -> None:
        """Replaces what is there of the same case."""
        fields = asdict(case)
        self.entries[:] = [entry for entry in self.entries if entry["case"] != fields]
        self.entries.append({"case": fields, **asdict(outcome)})

    def of_part(self, part: str) -> list[dict[str, Any]]:
        return [entry for entry in self.entries if entry["case"]["part"] == part]

    def save(self, path: Path) -> None:
        """Whole or not at all: a run may be cut off here too."""
        text = json.dumps({"format": FORMAT, **asdict(self)}, ensure_ascii=False)
        # One line per entry: a reader can search it, and a comparison of two files shows cases.
        text = re.sub(r'(, |\[)(?=\{"case")', lambda found: found[1].rstrip() + "\n", text)
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(".part")
        fresh.write_text(text + "\n")
        fresh.replace(path)


def load(path: Path) -> Results:
    """Raises ResultNotUsable where the file is missing or of another format."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as problem:
        raise ResultNotUsable(f"{path} cannot be read: {problem}") from problem
    if content.pop("format", None) != FORMAT:
        raise ResultNotUsable(
            f"{path} is not of format {FORMAT}; name another file with --output, or measure again"
        )
    return Results(**content)


def go_on(path: Path, here: dict[str, Any], same: tuple[str, ...] = SAME) -> Results:
    """The results so far, to be continued on this machine; raises ResultNotUsable where they are from another.

    same: what must be equal of the machine then and now.
    """
    before = load(path)
    differing = [key for key in same if before.machine.get(key) != here.get(key)]
    if differing:
        described = ", ".join(
            f"{key}: {before.machine.get(key)} then, {here.get(key)} now" for key in differing
        )
        raise ResultNotUsable(f"{path} was measured elsewhere ({described}); name another file with --output")
    return before


def commit() -> str:
    """The commit of this tree, with a + where files were changed since."""
    command = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=FOLDER.parent, check=False)
    return done.stdout.strip() or "unknown"


def machine() -> dict[str, Any]:
    """What ratios depend on, and when it was."""
    information = Path("/proc/cpuinfo")
    text = information.read_text() if information.exists() else ""
    models = re.findall(r"model name\s*: (.*)", text)
    family = re.findall(r"cpu family\s*: (.*)", text)
    compiler = find_compiler()
    return {
        "processor": (models[0] if models else platform.processor())
        + (f", family {family[0]}" if family else ""),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "bfloat16 dot products": compiler is not None and "__AVX512BF16__" in compiler.features,
        "load before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "compiler": compiler.version.splitlines()[0] if compiler else "none",
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }

"""The page of a GPU benchmark: rates on visible pairs, ratios to the best peer, goals met or missed.

python -m benchmarks.gpu_report FILE.json     writes it again from a result file, without measuring
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from benchmarks.gpu_cases import DIRECTIONS, GpuCase
from benchmarks.gpu_contenders import FLEX, OURS
from benchmarks.gpu_targets import Goal, goals_of
from benchmarks.report import table
from benchmarks.results import ResultNotUsable, Results, load

Entry = dict[str, Any]
READING = """\
Rates in TFLOP/s count the pairs that the mask lets through, the backward pass as two and a half times the forward
pass. Times are medians of single calls between two CUDA events, taken in turns with all others, the second-level cache
emptied before each. `backward` is the gradient call alone on a graph that is kept. A ratio is another's time over ours:
above 1 attn_engine is faster. ✓ goal met, ✗ goal missed (with the goal). Goals are stated for an H200.
"""


def of(entry: Entry) -> GpuCase:
    return GpuCase(**entry["case"])


def median(entry: Entry, name: str) -> float | None:
    quartiles = entry["seconds"].get(name)
    return None if quartiles is None else quartiles[1]


def fastest(entry: Entry, names: tuple[str, ...] | None = None) -> tuple[str, float] | None:
    """Name and median seconds of the fastest among `names`; None: among all that are not ours."""
    found = {
        name: quartiles[1]
        for name, quartiles in entry["seconds"].items()
        if (name in names if names is not None else name not in OURS)
    }
    return min(found.items(), key=lambda item: item[1]) if found else None


def rate(case: GpuCase, seconds: float) -> float:
    return case.flops / seconds / 1e12


def value_of(goal: Goal, entry: Entry) -> float | None:
    """What a goal is about; None where it was not measured."""
    own = fastest(entry, tuple(OURS))
    if own is None:
        return None
    if goal.of == "TFLOP/s":
        return rate(of(entry), own[1])
    flex = fastest(entry, FLEX)
    return None if flex is None else flex[1] / own[1]


def marked(entry: Entry, kind: str, text: str) -> str:
    """A number as text, with whether it meets the goal of its kind."""
    for goal in goals_of(of(entry)):
        value = value_of(goal, entry)
        if goal.of == kind and value is not None:
            return f"{text} ✓" if goal.met(value) else f"{text} ✗ {goal}"
    return text


def row(entry: Entry, matmul: float) -> list[str]:
    case = of(entry)
    own, peer, flex = fastest(entry, tuple(OURS)), fastest(entry), fastest(entry, FLEX)
    sizes = f"{case.pattern} | {case.length} | {case.dim} | {case.heads}:{case.kv_heads} | {case.batches}"
    cells = [sizes]
    if own is None:
        cells += ["-"] * 3
    else:
        achieved = rate(case, own[1])
        share = f"{achieved * 1e12 / matmul:.2f}" if matmul else "-"
        cells += [marked(entry, "TFLOP/s", f"{achieved:.0f}"), own[0].removeprefix("ours, "), share]
    for other, kind in ((peer, ""), (flex, "over flex")):
        if other is None:
            cells += ["-", "-"]
            continue
        ratio = "-" if own is None else marked(entry, kind, f"{other[1] / own[1]:.2f}")
        cells += [f"{rate(case, other[1]):.0f} ({other[0]})", ratio]
    return cells


def judged(results: Results) -> list[tuple[Entry, Goal, float]]:
    """Every goal that was measured."""
    return [
        (entry, goal, value)
        for entry in results.entries
        for goal in goals_of(of(entry))
        if (value := value_of(goal, entry)) is not None
    ]


def summary(results: Results) -> str:
    verdicts = judged(results)
    rows = [
        [kind, str(sum(g.met(v) for g, v in some)), str(len(some))]
        for kind in ("TFLOP/s", "over flex")
        if (some := [(g, v) for _, g, v in verdicts if g.of == kind])
    ]
    return "## Goals\n\n" + (table(["goal", "met", "measured"], rows) if rows else "None was measured.\n")


def left_out(results: Results) -> str:
    """Who has no number, and why, with the number of cases that it is so."""
    counts: dict[tuple[str, str], int] = {}
    for entry in results.entries:
        for name, why in entry["left_out"].items():
            counts[name, why] = counts.get((name, why), 0) + 1
    rows = [[name, why.replace("|", "\\|"), str(n)] for (name, why), n in sorted(counts.items())]
    return "## Not measured\n\n" + table(["contender", "why", "cases"], rows) if rows else ""


def all_rates(results: Results) -> str:
    """Every contender's rate in every case, with the quartiles of its time in milliseconds."""
    rows: list[list[str]] = []
    for entry in results.entries:
        for name, quartiles in entry["seconds"].items():
            low, middle, high = (f"{1000 * x:.3f}" for x in quartiles)
            shown = f"{rate(of(entry), quartiles[1]):.0f}"
            rows.append([str(of(entry)), name, shown, f"{middle} ({low}-{high})"])
    return "## Every time\n\n" + table(["case", "contender", "TFLOP/s", "ms"], rows)


def markdown(results: Results) -> str:
    machine = table(["machine", ""], [[key, str(value)] for key, value in results.machine.items()])
    commands = "\n".join(f"    {command}" for command in results.commands)
    matmul = float(results.machine.get("matmul rate") or 0.0)
    parts = [
        f"# Speed on a GPU, {results.machine['date']:.10}\n",
        READING,
        machine,
        f"torch.matmul in bfloat16, the measure of the share: {matmul / 1e12:.0f} TFLOP/s.\n",
        f"Commands:\n\n{commands}\n",
        summary(results),
    ]
    header = [
        "pattern | S | D | heads | B", "TFLOP/s", "by", "share of matmul", "best peer", "over it", "flex", "over flex",
    ]  # fmt: skip
    for direction in DIRECTIONS:
        rows = [row(entry, matmul) for entry in results.entries if of(entry).direction == direction]
        if rows:
            lines = table(" | ".join(header).split(" | "), rows)
            parts.append(f"## {direction.capitalize()}\n\n{lines}")
    return "\n".join([*parts, left_out(results), all_rates(results)])


def write(path: Path) -> Path:
    """The page of a result file, beside it; returns its path."""
    page = path.with_suffix(".md")
    page.write_text(markdown(load(path)), encoding="utf-8")
    return page


def main(arguments: list[str]) -> int:
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print(__doc__)
        return 0 if arguments == ["--help"] else 2
    try:
        print(f"written: {write(Path(arguments[0]))}")
    except ResultNotUsable as problem:
        print(problem)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

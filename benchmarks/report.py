"""The report: tables in Markdown, each target marked met or missed, and the figures.

python -m benchmarks.report FILE.json     draws both again from a result file, without measuring
"""

from __future__ import annotations

import sys
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks import plots
from benchmarks.cases import DTYPES, Case
from benchmarks.patterns import NAMES
from benchmarks.results import ResultNotUsable, Results, load
from benchmarks.targets import target_of
from benchmarks.variants import MORE_WORK

Entry = dict[str, Any]
BUSY = 0.3
COLUMNS = (
    ("forward", "sdpa"), ("forward", "flex"), ("forward", "eager"),
    ("backward", "sdpa"), ("backward", "eager"),
    ("forward+backward", "sdpa"), ("forward+backward", "eager"),
)  # fmt: skip
# Part of the cases' names -> its heading, and what its numbers are.
SECTIONS = {
    "share": (
        "Share of the peak",
        "Our operations per second over those of a loop of multiply-adds (`peak.cpp`).",
    ),
    "decode": ("Decode", "SDPA's time over ours: few queries, many keys, H = query heads / key heads."),
    "mods": (
        "Normalisers, score functions, learned biases",
        "Our time over our own softmax's; lower is better.",
    ),
    "small": ("Small work", "SDPA's time over ours at length 64."),
    "threads": ("Threads", "One thread's time over that of all."),
    "memory": (
        "Memory",
        "Inputs plus what the process grew by in a training step, over q, k, v, o and their gradients.",
    ),
}
READING = """\
Each number is a median over interleaved rounds, with its quartiles in brackets. Unless a section says otherwise it is
another implementation's time over ours: above 1 attn_engine is faster. ✓ target met, ✗ target missed (with the target),
no mark: no target. `backward` is the gradient call alone on a graph that is kept. ~ marks cases during which other
processes kept more than 0.3 of a core busy.
"""


def table_row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [table_row(header), "|" + "---|" * len(header), *(table_row(row) for row in rows)]
    return "\n".join(lines) + "\n"


def marked(entry: Entry, contender: str) -> str:
    """A ratio with its quartiles and whether it meets its target; a dash where it was not measured."""
    if contender not in entry["ratios"]:
        return "-"
    low, median, high = entry["ratios"][contender]
    target = target_of(entry["case"], contender)
    spread = f" ({low:.2f}-{high:.2f})" if low != high else ""
    disturbed = "~" if (entry["others"] or 0) > BUSY else ""
    if target is None:
        return f"{median:.2f}{spread}{disturbed}"
    mark = "✓" if target.met(median) else f"✗ {target}"
    return f"{median:.2f}{spread}{disturbed} {mark}"


def main_table(results: Results) -> str:
    """Per type, a line per pattern, length and dimension, a column per direction and contender."""
    entries = {tuple(e["case"][k] for k in KEYS): e for e in results.of_part("table")}
    text = "## Against SDPA, flex_attention and eager PyTorch\n\n1 batch, 8 heads.\n"
    header = ["pattern", "S", "D", *(f"{direction}: {contender}" for direction, contender in COLUMNS)]
    for dtype in DTYPES:
        rows: list[list[str]] = []
        for name, length, dim in product(NAMES, (1024, 4096), (64, 128)):
            cells: list[str] = []
            for direction, contender in COLUMNS:
                entry = entries.get((name, dtype, direction, length, dim))
                cells.append("-" if entry is None else marked(entry, contender))
            if set(cells) != {"-"}:
                rows.append([name, str(length), str(dim), *cells])
        if rows:
            text += f"\n### {dtype}\n\n{table(header, rows)}"
    return text


KEYS = ("pattern", "dtype", "direction", "queries", "dim")


def section(part: str, entries: list[Entry]) -> str:
    """One line per case of a part, one column per contender."""
    title, about = SECTIONS[part]
    contenders = list(dict.fromkeys(name for entry in entries for name in entry["ratios"]))
    header = ["case", *contenders]
    header += {"share": ["ours, GF/s"], "mods": ["more work per pair"]}.get(part, [])
    rows: list[list[str]] = []
    for entry in entries:
        case = Case(**entry["case"])
        row = [str(case), *(marked(entry, name) for name in contenders)]
        if part == "share":
            row.append(f"{case.flops / entry['seconds']['ours'] / 1e9:.0f}")
        if part == "mods":
            row.append(MORE_WORK[case.pattern])
        rows.append(row)
    if part == "share" and "peak" not in contenders:
        about += " There is no such loop here: no compiler, or no dot products of bfloat16."
    return f"## {title}\n\n{about}\n\n{table(header, rows)}"


def judged(entries: list[Entry]) -> list[bool]:
    """Met or missed, for each ratio that has a target."""
    return [
        target.met(ratio[1])
        for entry in entries
        for name, ratio in entry["ratios"].items()
        if (target := target_of(entry["case"], name)) is not None
    ]


def summary(results: Results) -> str:
    rows: list[list[str]] = []
    for part in dict.fromkeys(entry["case"]["part"] for entry in results.entries):
        verdicts = judged(results.of_part(part))
        count = f"{sum(verdicts)} of {len(verdicts)}" if verdicts else "no targets"
        rows.append([part, str(len(results.of_part(part))), count])
    return "## Targets\n\n" + table(["part", "cases", "targets met"], rows)


def markdown(results: Results, figures: list[Path]) -> str:
    """The whole report."""
    machine = table(["machine", ""], [[key, str(value)] for key, value in results.machine.items()])
    commands = "\n".join(f"    {command}" for command in results.commands)
    parts = [
        f"# Speed on a CPU, {results.machine['date']:.10}",
        READING,
        machine,
        f"Commands, each with its date and the commit that it measured:\n\n{commands}\n",
        summary(results),
    ]
    if results.of_part("table"):
        parts.append(main_table(results))
    for part in SECTIONS:
        if entries := results.of_part(part):
            parts.append(section(part, entries))
    if figures:
        shown = "\n\n".join(f"![{figure.stem}]({figure.parent.name}/{figure.name})" for figure in figures)
        parts.append(f"## Figures\n\n{shown}\n")
    return "\n".join(parts)


def write(path: Path) -> Path:
    """The report and the figures of a result file, beside it; returns the report's path."""
    results = load(path)
    figures: list[Path] = []
    try:
        figures = plots.draw(results, path.with_suffix(""))
    except plots.NoMatplotlib as missing:
        print(missing)
    report = path.with_suffix(".md")
    report.write_text(markdown(results, figures), encoding="utf-8")
    print(*(f"written: {file}" for file in (report, *figures)), sep="\n")
    return report


def main(arguments: list[str]) -> int:
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print(__doc__)
        return 0 if arguments == ["--help"] else 2
    try:
        write(Path(arguments[0]))
    except ResultNotUsable as problem:
        print(problem)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

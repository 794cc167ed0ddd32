"""What the benchmark of sparse attention found: tables with their targets, and figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.plots import COLOURS, LABELS, MARKERS, SHADES, TARGET, NoMatplotlib, pyplot, title
from benchmarks.report import BUSY, table
from benchmarks.results import Results

Entry = dict[str, Any]
# Share of the bound (dense time over ours, times density) at length 8192, forward and backward.
TARGETS: dict[tuple[str, str], tuple[float, float | None]] = {
    **{("qk", dropped): (0.60, 0.60) for dropped in ("50", "60", "70", "80")},
    ("hash", "16"): (0.55, 0.55),
    ("hash", "64"): (0.25, 0.25),
    ("local-stride", "1"): (0.95, 0.95),
    ("local-stride", "4"): (0.85, 0.75),
    ("local-stride", "16"): (0.85, 0.75),
    ("seer 2d", "10"): (0.80, 0.65),
    ("seer 1d", "1"): (0.35, None),
    ("seer 1d", "16"): (0.70, None),
}
LENGTH = 8192
MEANING = {
    "qk": "% of queries and keys dropped",
    "hash": "buckets",
    "local-stride": "every n-th block, beside 8 last ones",
    "random blocks": "% of blocks seen",
    "seer 2d": "% of blocks seen",
    "seer 1d": "queries in a row that see the same 10 % of blocks, one kv head",
}
HEADS_FIRST = "dense, heads first"
CONTENDERS = ("dense", HEADS_FIRST, "sdpa", "flex")
NAMES = {
    **LABELS, "dense": "our own dense causal", HEADS_FIRST: "the same, heads first", "sdpa": "SDPA with a mask",
}  # fmt: skip
LIKE = {"dense": "ours", HEADS_FIRST: "eager"}  # whose colour and marker
READING = """\
1 batch, 8 heads of 64, float32. Times of others over ours, medians over interleaved rounds with quartiles in brackets
(three equal numbers: one round): above 1 ours is faster; processor time where one thread ran. "dense" is our own causal
attention without sparsity on the same tensors: (batch, length, heads, dim) for qk, hash and seer as in the papers'
code, heads first for the others; "heads first" is the same where they lie so, which is faster. "sdpa" is torch's with a
mask tensor of all heads, "flex" compiled flex_attention with a block mask (forward alone). Visible: pairs over those of
a causal mask; 1/visible is the bound of the speed-up over dense. The share of it that is reached has the targets (✓
met, ✗ missed), against dense and against dense with heads first. Sorting, gathering, putting back and the making of
lists are in the times. ~ marks cases during which other processes kept more than 0.3 of a core busy.
"""


def share(entry: Entry, dense: str = "dense") -> float:
    """The reached part of the speed-up over dense that the visible pairs allow."""
    return entry["ratios"][dense][1] * entry["density"]


def target_of(entry: Entry) -> float | None:
    case = entry["case"]
    both = TARGETS.get((case["part"], case["kind"])) if case["length"] == LENGTH else None
    return None if both is None else both[case["direction"] == "backward"]


def name(case: dict[str, Any]) -> str:
    return f"{case['part']} {case['kind']}, {case['length']}, {case['direction']}"


def line(entry: Entry) -> str:
    """One case, for a terminal."""
    ratios = "  ".join(f"{n} {x[1]:.2f}" for n, x in entry["ratios"].items())
    busy = f"  (others: {entry['others']})" if (entry["others"] or 0) > BUSY else ""
    milliseconds = 1e3 * entry["seconds"]["ours"]
    reached = f"{judged(entry)}, {judged(entry, HEADS_FIRST)} of {1 / entry['density']:.1f}x"
    return f"{name(entry['case']):40} {milliseconds:8.2f} ms  {reached}  {ratios}{busy}"


def judged(entry: Entry, dense: str = "dense") -> str:
    if dense not in entry["ratios"]:
        return "="
    target, reached = target_of(entry), share(entry, dense)
    percent = f"{100 * reached:.0f} %"
    if target is None:
        return percent
    return f"{percent} " + ("✓" if reached >= target else f"✗ {100 * target:.0f} %")


def cell(entry: Entry, contender: str) -> str:
    if contender not in entry["ratios"]:
        return "-"
    low, median, high = entry["ratios"][contender]
    return f"{median:.2f} ({low:.2f}-{high:.2f})" + ("~" if (entry["others"] or 0) > BUSY else "")


def section(results: Results, part: str) -> str:
    rows = [
        [
            entry["case"]["kind"], str(entry["case"]["length"]), entry["case"]["direction"],
            f"{1e3 * entry['seconds']['ours']:.2f}", f"{100 * entry['density']:.3g} %",
            judged(entry), judged(entry, HEADS_FIRST),
            *(cell(entry, who) for who in CONTENDERS),
        ]
        for entry in in_order(results.of_part(part))
    ]  # fmt: skip
    header = [MEANING.get(part, part), "length", "direction", "ours, ms", "visible"]
    header += ["share of the bound", "heads first", *CONTENDERS]
    return f"## {part}\n\n{table(header, rows)}"


def in_order(entries: list[Entry]) -> list[Entry]:
    def place(entry: Entry) -> tuple[Any, ...]:
        case = entry["case"]
        return float(case["kind"]), case["length"], case["direction"] == "backward"

    return sorted(entries, key=place)


def parts(results: Results) -> list[str]:
    return list(dict.fromkeys(entry["case"]["part"] for entry in results.entries))


def markdown(results: Results, figures: list[Path]) -> str:
    machine = table(["machine", ""], [[key, str(value)] for key, value in results.machine.items()])
    commands = "\n".join(f"    {command}" for command in results.commands)
    text = ["# Sparse attention on a CPU\n", READING, machine, f"Commands and commits:\n\n{commands}\n"]
    text += [section(results, part) for part in parts(results)]
    text += [f"![{figure.stem}]({figure.parent.name}/{figure.name})\n" for figure in figures]
    return "\n".join(text)


def write(results: Results, path: Path) -> list[Path]:
    """The page, and figures where matplotlib is installed, beside the result file; returns their paths."""
    figures: list[Path] = []
    try:
        figures = draw(results, path.with_suffix(""))
    except NoMatplotlib as missing:
        print(missing)
    page = path.with_suffix(".md")
    page.write_text(markdown(results, figures), encoding="utf-8")
    return [page, *figures]


def draw(results: Results, folder: Path) -> list[Path]:
    plt = pyplot()
    drawn = {"share-of-the-bound": bound(plt, results), "over-others": over(plt, results)}
    folder.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    for stem, figure in drawn.items():
        paths.append(folder / f"{stem}.png")
        figure.savefig(paths[-1], dpi=110)
        plt.close(figure)
    return paths


def bound(plt: Any, results: Results) -> Any:
    """Bars of the share of the bound, a panel per length, a bar per direction, targets as lines."""
    lengths = sorted({e["case"]["length"] for e in results.entries})
    kinds = list(dict.fromkeys((e["case"]["part"], e["case"]["kind"]) for e in results.entries))
    figure, grid = plt.subplots(len(lengths), 1, figsize=(10, 3.2 * len(lengths) + 0.8), squeeze=False,
                                sharex=True, layout="constrained")  # fmt: skip
    for axes, length in zip(grid[:, 0], lengths, strict=True):
        for entry in (e for e in results.entries if e["case"]["length"] == length):
            case = entry["case"]
            back = case["direction"] == "backward"
            place = kinds.index((case["part"], case["kind"])) + (0.2 if back else -0.2)
            axes.bar(place, 100 * share(entry), width=0.36, color=SHADES[2 if back else 1], zorder=2)
            if (target := target_of(entry)) is not None:
                axes.hlines(100 * target, place - 0.2, place + 0.2, color=TARGET, linewidth=2.5, zorder=3)
        axes.axhline(100, color="#333333", linewidth=1)
        axes.set_title(f"length {length}", fontsize=11)
        axes.set_ylabel("% of 1/visible")
        axes.grid(visible=False, axis="x")
    labels = [f"{part}\n{kind}" for part, kind in kinds]
    grid[-1, 0].set_xticks(range(len(kinds)), labels, fontsize=9)
    title(
        figure, results, "Speed-up over our own dense attention, as a share of what the visible pairs allow"
    )
    handles = [plt.Rectangle((0, 0), 1, 1, color=SHADES[i]) for i in (1, 2)]
    handles.append(plt.Line2D([], [], color=TARGET, linewidth=2.5))
    figure.legend(handles, ["forward", "backward", "target"], loc="outside lower center", ncols=3)
    return figure


def over(plt: Any, results: Results) -> Any:
    """Times of others over ours against the share of visible pairs, a panel per length and direction."""
    lengths = sorted({e["case"]["length"] for e in results.entries})
    figure, grid = plt.subplots(len(lengths), 2, figsize=(10, 3.6 * len(lengths) + 0.8), squeeze=False,
                                sharex=True, layout="constrained")  # fmt: skip
    for row, length in zip(grid, lengths, strict=True):
        for axes, direction in zip(row, ("forward", "backward"), strict=True):
            cases = {"length": length, "direction": direction}
            mine = [e for e in results.entries if cases.items() <= e["case"].items()]
            for who in CONTENDERS:
                points = [(100 * e["density"], e["ratios"][who][1]) for e in mine if who in e["ratios"]]
                style = {"marker": MARKERS[LIKE.get(who, who)], "color": COLOURS[LIKE.get(who, who)]}
                axes.scatter(*zip(*points, strict=True) if points else ((), ()), zorder=3, **style)
            ends = [min(100 * e["density"] for e in mine), 100.0] if mine else [1.0, 100.0]
            axes.plot(ends, [100 / x for x in ends], color="#333333", linewidth=1)
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.set_title(f"length {length}, {direction}", fontsize=11)
        row[0].set_ylabel("time over ours")
    for axes in grid[-1]:
        axes.set_xlabel("% of causal pairs visible")
    title(figure, results, "Sparse attention against dense ones; the line is 1/visible")
    handles = [
        plt.Line2D([], [], color=COLOURS[LIKE.get(c, c)], marker=MARKERS[LIKE.get(c, c)], linewidth=0)
        for c in CONTENDERS
    ]
    figure.legend(handles, [NAMES[c] for c in CONTENDERS], loc="outside lower center", ncols=4)
    return figure

"""The figures: speed against length, ratios with their targets, share of the peak, decode."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.cases import DIRECTIONS, DTYPES, Case
from benchmarks.patterns import NAMES
from benchmarks.results import Results
from benchmarks.targets import target_of

Entry = dict[str, Any]
# Okabe and Ito's palette: told apart with any colour vision. Markers say the same again.
COLOURS = {"ours": "#0072B2", "sdpa": "#E69F00", "flex": "#009E73", "eager": "#CC79A7"}
MARKERS = {"ours": "o", "sdpa": "s", "flex": "^", "eager": "D"}
LABELS = {
    "ours": "attn_engine", "sdpa": "PyTorch SDPA", "flex": "compiled flex_attention", "eager": "eager PyTorch",
}  # fmt: skip
SHADES = ("#9ecae1", "#4292c6", "#08519c", "#041f45")
TARGET = "#D55E00"
SIZES = tuple(product((1024, 4096), (64, 128)))
DOTS_PER_INCH = 130


class NoMatplotlib(Exception):
    """matplotlib is not installed: there are tables, but no figures."""


def pyplot() -> Any:
    """matplotlib, drawing into files. Raises NoMatplotlib, which says how to install it."""
    try:
        import matplotlib
    except ImportError as problem:
        raise NoMatplotlib("No figures: matplotlib is missing (pip install -e '.[benchmarks]').") from problem
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update(
        {
            "font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
            "axes.grid": True, "grid.color": "#dddddd", "legend.frameon": False, "figure.dpi": DOTS_PER_INCH,
        }
    )  # fmt: skip
    return plt


def draw(results: Results, folder: Path) -> list[Path]:
    """Every figure that there are results for, as PNG files in `folder`; returns their paths."""
    plt = pyplot()
    figures: dict[str, Any] = {}
    for dtype, direction in product(DTYPES, DIRECTIONS[:2]):
        figures[f"speed-{dtype}-{direction}"] = speed(plt, results, dtype, direction)
    for contender in ("sdpa", "flex", "eager"):
        figures[f"over-{contender}"] = over(plt, results, contender)
    figures["share-of-peak"] = share(plt, results)
    figures["decode"] = decode(plt, results)
    paths: list[Path] = []
    for name, figure in figures.items():
        if figure is not None:
            folder.mkdir(parents=True, exist_ok=True)
            paths.append(folder / f"{name}.png")
            figure.savefig(paths[-1], bbox_inches="tight", dpi=DOTS_PER_INCH)
            plt.close(figure)
    return paths


def title(figure: Any, results: Results, text: str) -> None:
    machine = results.machine
    where = f"{machine['processor']}, {machine['threads']} threads, torch {machine['torch']}"
    figure.suptitle(f"{text}\n{where}", fontsize=12)


def label(grid: Any, below: str, left: str) -> None:
    """Labels on the outer panels: a label of the whole figure would lie over its legend."""
    for axes in grid[-1]:
        axes.set_xlabel(below)
    for row in grid:
        row[0].set_ylabel(left)


def speed(plt: Any, results: Results, dtype: str, direction: str) -> Any:
    """Operations per second of the visible pairs against length, a panel per mask."""
    entries = [
        e
        for e in results.of_part("sweep")
        if (e["case"]["dtype"], e["case"]["direction"]) == (dtype, direction)
    ]
    names = [name for name in NAMES if any(e["case"]["pattern"] == name for e in entries)]
    if not names:
        return None
    figure, grid = plt.subplots(2, 3, figsize=(11, 6.6), sharex=True, sharey=True, layout="constrained")
    for axes, name in zip(grid.flat, names, strict=False):
        mine = [e for e in entries if e["case"]["pattern"] == name]
        for contender in COLOURS:
            points = sorted(
                (e["case"]["keys"], gigaflops(e, contender)) for e in mine if contender in e["seconds"]
            )
            axes.plot(
                *zip(*points, strict=True) if points else ((), ()),
                color=COLOURS[contender], marker=MARKERS[contender], label=LABELS[contender], markersize=5,
                linewidth=2.2 if contender == "ours" else 1.4, zorder=3 if contender == "ours" else 2,
            )  # fmt: skip
        axes.set_title(name, fontsize=11)
        axes.set_xscale("log", base=2)
    fastest = max(gigaflops(e, contender) for e in entries for contender in e["seconds"])
    grid.flat[0].set_ylim(0, 1.06 * fastest)
    lengths = sorted({e["case"]["keys"] for e in entries})
    grid.flat[0].set_xticks(lengths, [str(n) for n in lengths], rotation=45)
    for axes in grid.flat[len(names) :]:
        axes.set_visible(False)
    label(grid, "length of the sequence", "GF/s of the visible pairs")
    title(figure, results, f"Speed, {direction}, {dtype}, 8 heads of 64")
    handles, labels = grid.flat[0].get_legend_handles_labels()
    shown = [i for i, c in enumerate(COLOURS) if any(c in e["seconds"] for e in entries)]
    figure.legend(
        [handles[i] for i in shown], [labels[i] for i in shown], loc="outside lower center", ncols=4
    )
    return figure


def gigaflops(entry: Entry, contender: str) -> float:
    return Case(**entry["case"]).flops / entry["seconds"][contender] / 1e9


def over(plt: Any, results: Results, contender: str) -> Any:
    """Bars of the contender's time over ours, per pattern and size, a panel per direction and type."""
    entries = [e for e in results.of_part("table") if contender in e["ratios"]]
    directions = [d for d in DIRECTIONS if any(e["case"]["direction"] == d for e in entries)]
    if not entries:
        return None
    names = [name for name in NAMES if any(e["case"]["pattern"] == name for e in entries)]
    rows, columns = (2, len(directions)) if len(directions) > 1 else (1, 2)
    figure, grid = plt.subplots(
        rows,
        columns,
        figsize=(4.2 * columns + 1.2, (0.62 * len(names) + 0.6) * rows + 1.2),
        sharex="row" if rows > 1 else False,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axes, (dtype, direction) in zip(grid.flat, product(DTYPES, directions), strict=True):
        chosen = [e for e in entries if (e["case"]["dtype"], e["case"]["direction"]) == (dtype, direction)]
        ratio_bars(axes, chosen, names, contender)
        axes.set_title(f"{dtype}, {direction}", fontsize=11)
    label(grid, f"time of {LABELS[contender]} over ours", "")
    title(figure, results, f"attn_engine against {LABELS[contender]}: right of 1 attn_engine is faster")
    handles = [plt.Rectangle((0, 0), 1, 1, color=shade) for shade in SHADES]
    labels = [f"S={s}, D={d}" for s, d in SIZES]
    handles.append(plt.Line2D([], [], color=TARGET, linewidth=2.5))
    figure.legend(handles, [*labels, "target"], loc="outside lower center", ncols=5)
    return figure


def ratio_bars(axes: Any, entries: list[Entry], names: list[str], contender: str) -> None:
    height = 0.19
    for entry in entries:
        case = entry["case"]
        turn = SIZES.index((case["queries"], case["dim"]))
        middle = names.index(case["pattern"]) + (turn - 1.5) * height
        median = entry["ratios"][contender][1]
        axes.barh(middle, median - 1, left=1, height=height * 0.9, color=SHADES[turn], zorder=2)
        if (target := target_of(case, contender)) is not None:
            ends = (middle - height / 2, middle + height / 2)
            axes.plot([target.bound] * 2, ends, color=TARGET, linewidth=2.5, zorder=3, solid_capstyle="butt")
    ratios = [entry["ratios"][contender][1] for entry in entries]
    axes.set_xscale("log", base=2)
    axes.set_xlim(min([0.9, *(0.9 * r for r in ratios)]), max([*axes.get_xlim(), *(1.1 * r for r in ratios)]))
    axes.axvline(1, color="#333333", linewidth=1)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.grid(visible=False, axis="y")


def share(plt: Any, results: Results) -> Any:
    """Bars of the share of the peak, a panel per type and direction."""
    entries = [e for e in results.of_part("share") if "peak" in e["ratios"]]
    if not entries:
        return None
    figure, grid = plt.subplots(1, 4, figsize=(12, 4.2), sharey=True, layout="constrained")
    sizes = [f"S={s}\nD={d}" for s, d in SIZES]
    for axes, (dtype, direction) in zip(grid, product(DTYPES, DIRECTIONS[:2]), strict=True):
        for entry in entries:
            case = entry["case"]
            if (case["dtype"], case["direction"]) != (dtype, direction):
                continue
            one = case["threads"] == 1
            place = SIZES.index((case["queries"], case["dim"])) + (-0.2 if one else 0.2)
            percent = 100 * entry["ratios"]["peak"][1]
            axes.bar(place, percent, width=0.38, color=SHADES[0] if one else SHADES[2], zorder=2)
            # At the foot of its bar, where no target line can cross it.
            axes.text(place, 2, f"{percent:.0f}", ha="center", fontsize=8, color="black" if one else "white")
            if (target := target_of(case, "peak")) is not None:
                axes.axhline(100 * target.bound, color=TARGET, linewidth=2, zorder=3)
        axes.set_title(f"{dtype}, {direction}", fontsize=11)
        axes.set_xticks(range(len(sizes)), sizes)
        axes.set_xlim(-0.6, len(sizes) - 0.4)
        axes.set_ylim(0, 105)
        axes.grid(visible=False, axis="x")
    grid[0].set_ylabel("% of the peak")
    title(figure, results, "Share of the machine's peak, no mask")
    handles = [plt.Rectangle((0, 0), 1, 1, color=SHADES[i]) for i in (0, 2)]
    handles.append(plt.Line2D([], [], color=TARGET, linewidth=2))
    figure.legend(handles, ["1 thread", "all threads", "target"], loc="outside lower center", ncols=3)
    return figure


def decode(plt: Any, results: Results) -> Any:
    """SDPA's time over ours against the number of keys: a row of panels per type, a panel per number of queries."""
    entries = results.of_part("decode")
    if not entries:
        return None
    counts = sorted({e["case"]["queries"] for e in entries})
    figure, grid = plt.subplots(
        2, len(counts), figsize=(3.9 * len(counts) + 0.6, 7), sharex=True, sharey="row", squeeze=False,
        layout="constrained",
    )  # fmt: skip
    lines = list(product(((8, 8), (32, 8), (32, 4)), (64, 128, 256)))
    for (row, dtype), (column, count) in product(enumerate(DTYPES), enumerate(counts)):
        axes = grid[row][column]
        for heads, dim in lines:
            chosen = [e["case"] | {"ratio": e["ratios"]["sdpa"][1]} for e in entries]
            points = sorted(
                (c["keys"], c["ratio"])
                for c in chosen
                if (c["dtype"], c["queries"], c["heads"], c["kv_heads"], c["dim"])
                == (dtype, count, *heads, dim)
            )
            style = {64: ":", 128: "--", 256: "-"}[dim]
            colour = {(8, 8): COLOURS["ours"], (32, 8): COLOURS["sdpa"], (32, 4): COLOURS["flex"]}[heads]
            x, y = zip(*points, strict=True) if points else ((), ())
            axes.plot(x, y, style, color=colour, marker="o", markersize=3.5, linewidth=1.5)
        bounds = [t.bound for e in entries if e["case"]["dtype"] == dtype and e["case"]["queries"] == count
                  if (t := target_of(e["case"], "sdpa"))]  # fmt: skip
        if bounds:
            axes.axhline(bounds[0], color=TARGET, linewidth=2)
        axes.set_title(f"{dtype}, {count} quer{'y' if count == 1 else 'ies'}", fontsize=11)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    keys = sorted({e["case"]["keys"] for e in entries})
    grid[0][0].set_xticks(keys, [str(n) for n in keys])
    label(grid, "number of keys", "time of SDPA over ours")
    title(figure, results, "Decoding: few queries, many keys")
    line = plt.Line2D
    handles = [line([], [], color=COLOURS[c], linewidth=2) for c in ("ours", "sdpa", "flex")]
    handles += [line([], [], color="#333333", linestyle=s) for s in (":", "--", "-")]
    handles.append(line([], [], color=TARGET, linewidth=2))
    labels = ["8 heads", "32 heads, 8 of keys", "32 heads, 4 of keys", "D=64", "D=128", "D=256", "target"]
    figure.legend(handles, labels, loc="outside lower center", ncols=7, columnspacing=1.2, handlelength=1.8)
    return figure

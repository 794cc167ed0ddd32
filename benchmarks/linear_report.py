"""What the benchmark of linear attentions found, as a table with its targets and as a figure."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

from benchmarks.plots import COLOURS, TARGET, NoMatplotlib, pyplot
from benchmarks.report import table

Found = dict[str, float]
DIRECTIONS = ("forward", "forward and backward")
TARGETS = {"forward": 15.0, "forward and backward": 10.0, "share": 0.6, "step": 30.0}
CONTENDERS = {"plain": "plain torch", "fla": "fla naive_chunk", "hf": "transformers"}
READING = """\
One core, B = 1, H = 8, T = 4096: milliseconds of processor time of ours, and how many times that the chunked torch code
of others takes on the same core, forward and with autograd through it. ✓ target met, ✗ target missed, with the bound:
the ratio if all multiplications of ours ran as fast as the micro-kernel alone and nothing else took time. The share of
the peak counts the multiplications that a forward call cannot do without, all the rest of its time included.
"""


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def judged(value: float, target: float, *, at_most: bool = False) -> str:
    return "✓" if (value <= target if at_most else value >= target) else f"✗ {target:g}"


def cells(name: str, found: Found) -> list[str]:
    row = [name]
    for direction in DIRECTIONS:
        row.append(f"{found[f'{direction}: ours ms']:.3g}")
        for contender in CONTENDERS:
            ratio = found.get(f"{direction}: {contender} ratio")
            row.append("" if ratio is None else f"{ratio:.1f} x {judged(ratio, TARGETS[direction])}")
            bound = found.get(f"{direction}: {contender} bound")
            if ratio is not None and bound is not None and ratio < TARGETS[direction]:
                row[-1] += f", bound {bound:.0f}"
    share = found.get("share of peak")
    row.append("" if share is None else f"{share:.0%}")
    return row


def markdown(results: dict[str, Any]) -> str:
    """The results as a page."""
    cases: dict[str, Found] = results["cases"]
    machine = table(["machine", ""], [[key, str(value)] for key, value in results["machine"].items()])
    header = ["variant"]
    for direction in DIRECTIONS:
        header += [f"{direction}, ms", *CONTENDERS.values()]
    compared = [cells(n, f) for n, f in cases.items() if "forward: ours ms" in f]
    parts = ["# Linear attention on a CPU\n", READING, machine, table([*header, "share of peak"], compared)]
    shares = [_share(n.removeprefix("share: "), f) for n, f in cases.items() if n.startswith("share")]
    if shares:
        head = ["variant", "micro-kernel, GFLOP/s", "forward", "backward"]
        parts += ["## The matrix parts' share of the micro-kernel's rate\n", table(head, shares)]
    for name, found in cases.items():
        if name.startswith("long"):
            rows = [
                [
                    key.rsplit(" ", 1)[1],
                    f"{x:.3g}",
                    f"{found[key.replace('ns for a token', 'MB beside o')]:.2f}",
                ]
                for key, x in found.items()
                if key.startswith("ns")
            ]
            parts += [f"## {name}\n", table(["tokens", "ns for a token and head", "MB beside o"], rows)]
    steps = [[n.removeprefix("step: "), _step(f)] for n, f in cases.items() if "microseconds" in f]
    if steps:
        parts += ["## One token, H = 8, 64 x 64\n", table(["variant", "microseconds of a step"], steps)]
    return "\n".join(parts)


def _share(name: str, found: Found) -> list[str]:
    shares = [found[f"{d}: share"] for d in ("forward", "backward")]
    return [name, f"{found['micro-kernel']:.0f}", *(f"{s:.0%} {judged(s, TARGETS['share'])}" for s in shares)]


def _step(found: Found) -> str:
    time = found["microseconds"]
    return f"{time:.3g} {judged(time, TARGETS['step'], at_most=True)}"


def write(results: dict[str, Any], stem: Path) -> list[Path]:
    """The page, and the figure where matplotlib is installed; returns their paths."""
    page, figure = stem.with_suffix(".md"), stem.with_suffix(".png")
    text, written = markdown(results), [page]
    try:
        drawn = draw(results)
    except NoMatplotlib as missing:
        print(missing)
    else:
        drawn.savefig(figure, dpi=110)
        text += f"\n![times over ours]({figure.name})\n"
        written.append(figure)
    page.write_text(text, encoding="utf-8")
    return written


def draw(results: dict[str, Any]) -> Any:
    """Bars of the ratios, a panel for each direction."""
    plt = pyplot()
    cases = {n: f for n, f in results["cases"].items() if "forward: ours ms" in f}
    figure, grid = plt.subplots(1, 2, figsize=(13, 5), sharey=True, layout="constrained")
    colours = {"plain": COLOURS["eager"], "fla": COLOURS["sdpa"], "hf": COLOURS["flex"]}
    for axes, direction in zip(grid, DIRECTIONS, strict=True):
        for i, (who, colour) in enumerate(colours.items()):
            found = [(y, f.get(f"{direction}: {who} ratio")) for y, f in enumerate(cases.values())]
            bars = [(y + 0.27 * (i - 1), x) for y, x in found if x is not None]
            axes.barh([y for y, _ in bars], [x for _, x in bars], height=0.25, color=colour, zorder=2)
        axes.axvline(TARGETS[direction], color=TARGET, linewidth=2, zorder=3)
        axes.set_yticks(range(len(cases)), cases, fontsize=9)
        axes.set_xlabel("times ours")
        axes.set_title(direction, fontsize=11)
        axes.grid(visible=False, axis="y")
    grid[0].invert_yaxis()
    handles = [plt.Rectangle((0, 0), 1, 1, color=c) for c in colours.values()]
    handles.append(plt.Line2D([], [], color=TARGET, linewidth=2))
    figure.legend(handles, [*CONTENDERS.values(), "target"], loc="outside lower center", ncols=4)
    figure.suptitle(f"Linear attention, one core of {results['machine'].get('processor', '?')}", fontsize=12)
    return figure

"""What the benchmark of block masks found, as a table with its targets and as a figure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.plots import COLOURS, TARGET, NoMatplotlib, pyplot
from benchmarks.report import table

Found = dict[str, float]
TARGETS = {"eager": 100, "compiled": 20, "milliseconds": 50, "megabytes": 20}
STEP = ("ms on one core", "new function ms on one core", "again ms on one core")
HEADER = ["mask", "length", "heads", "ours, ms", "new function, ms", "again, ms", "growth, MB"]
HEADER += ["torch eager", "torch compiled"]
READING = """\
Planning a mask and making the exact lists of both sides, blocks of 128 x 128, on one core: milliseconds and growth of
memory of ours. "new function": the mask_mod was made for this call and is traced, too. "again": a further step of one
mask whose tensors have changed in place (next to nothing where it reads none); nothing is traced or compiled. The last
columns are torch's processor time over ours, its compile time left out; 32 heads have a mask each. ✓ target met,
✗ target missed; no mark: no target.
"""


def judged(value: float, target: float, *, at_most: bool = False) -> str:
    return "✓" if (value <= target if at_most else value >= target) else f"✗ {target}"


def cells(name: str, found: Found) -> list[str]:
    """A case's row; its name is "mask, length, heads"."""
    mask, length, heads = name.rsplit(", ", 2)
    alone = "eager ratio" not in found and heads == "1 head"  # these have the targets in ms and MB
    row = [mask, length, heads.split()[0]]
    row += [
        f"{found[k]:.3g}" + (f" {judged(found[k], TARGETS['milliseconds'], at_most=True)}" if alone else "")
        for k in STEP
    ]
    row.append(
        f"{found['MB']:.3g}"
        + (f" {judged(found['MB'], TARGETS['megabytes'], at_most=True)}" if alone else "")
    )
    for which in ("eager", "compiled"):
        ratio = found.get(f"{which} ratio")
        row.append("" if ratio is None else f"{ratio:.0f} x {judged(ratio, TARGETS[which])}")
    return row


def markdown(results: dict[str, Any]) -> str:
    """The results as a page."""
    machine = table(["machine", ""], [[key, str(value)] for key, value in results["machine"].items()])
    rows = table(HEADER, [cells(name, found) for name, found in results["cases"].items()])
    return "\n".join(["# Block masks against torch's create_block_mask\n", READING, machine, rows])


def write(results: dict[str, Any], stem: Path) -> list[Path]:
    """The page, and the figure where matplotlib is installed; returns their paths."""
    page, figure = stem.with_suffix(".md"), stem.with_suffix(".png")
    text = markdown(results)
    written = [page]
    try:
        drawn = draw(results)
    except NoMatplotlib as missing:
        print(missing)
    else:
        drawn.savefig(figure, dpi=110)
        text += f"\n![milliseconds per mask]({figure.name})\n"
        written.append(figure)
    page.write_text(text, encoding="utf-8")
    return written


def draw(results: dict[str, Any]) -> Any:
    """Bars of milliseconds per mask where torch was measured, on a logarithmic scale; a panel per number of heads."""
    plt = pyplot()
    cases = results["cases"].items()
    compared = {tuple(name.rsplit(", ", 2)): found for name, found in cases if "eager ratio" in found}
    groups = list(dict.fromkeys(name[1:] for name in compared))
    figure, grid = plt.subplots(1, max(1, len(groups)), figsize=(10, 4), sharey=True, squeeze=False,
                                layout="constrained")  # fmt: skip
    contenders = {"ours": "ours", "compiled": "flex", "eager": "eager"}
    for axes, group in zip(grid[0], groups, strict=False):
        masks = {name[0]: found for name, found in compared.items() if name[1:] == group}
        for i, (who, colour) in enumerate(contenders.items()):
            heights = [found[f"{who} ms"] for found in masks.values()]
            places = [x + 0.27 * (i - 1) for x in range(len(masks))]
            axes.bar(places, heights, width=0.25, color=COLOURS[colour], zorder=2)
        limits = [found["compiled ms"] / TARGETS["compiled"] for found in masks.values()]
        axes.hlines(limits, [x - 0.4 for x in range(len(masks))], [x - 0.14 for x in range(len(masks))],
                    color=TARGET, linewidth=2, zorder=3)  # fmt: skip
        axes.set_xticks(range(len(masks)), masks, rotation=20, fontsize=9)
        axes.set_yscale("log")
        axes.set_title(f"length {group[0]}, {group[1]}", fontsize=11)
        axes.grid(visible=False, axis="x")
    grid[0][0].set_ylabel("milliseconds of processor time")
    figure.suptitle(f"Making a block mask on one core of {results['machine']['processor']}", fontsize=12)
    handles = [plt.Rectangle((0, 0), 1, 1, color=COLOURS[c]) for c in contenders.values()]
    handles.append(plt.Line2D([], [], color=TARGET, linewidth=2))
    labels = ["attn_engine", "torch, compiled", "torch, eager", f"1/{TARGETS['compiled']} of compiled"]
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    return figure

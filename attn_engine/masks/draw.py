"""Masks as pictures: text, SVG, HTML and PNG."""

from __future__ import annotations

import io
from html import escape
from itertools import groupby
from typing import TYPE_CHECKING, Any

from attn_engine.masks.mistakes import CannotDraw, WrongBlockMask
from attn_engine.masks.picture import EMPTY, FULL, PARTIAL, Picture, picture
from attn_engine.masks.text import text

if TYPE_CHECKING:
    from attn_engine.masks.block_mask import BlockMask

COLOURS = {EMPTY: "#f1f1ee", PARTIAL: "#e8a33d", FULL: "#2f6f9f"}
NAMES = {EMPTY: "empty", PARTIAL: "partial", FULL: "full"}
INK = "#333333"
CELLS = {"text": 32, "svg": 96, "html": 96, "png": 256}
SIDE = 384  # of the picture, in pixels
BAR = 72  # of a row's work


def draw(mask: BlockMask, kind: str, batch: int, head: int, cells: int | None = None) -> str | bytes:
    """See BlockMask.draw."""
    if kind not in CELLS:
        known = " or ".join(map(repr, CELLS))
        raise WrongBlockMask(argument="kind", got=kind, expected=known, instead='For example draw("svg").')
    most = CELLS[kind] if cells is None else max(1, cells)
    shown = picture(mask, batch, head, (most, most))
    kinds: dict[str, Any] = {"text": text, "svg": svg, "html": html, "png": png}
    return kinds[kind](shown)


def svg(shown: Picture) -> str:
    """The cells as rectangles, equal neighbours as one; a bar of work per row; a legend and the counts."""
    rows, columns = len(shown.cells), len(shown.cells[0])
    width, height = SIDE / columns, SIDE / rows
    parts = [_rectangle(0, 24, SIDE, SIDE, COLOURS[EMPTY])]
    for i, row in enumerate(shown.cells):
        j = 0
        for kind, run in groupby(row):
            n = len(list(run))
            if kind != EMPTY:
                parts.append(_rectangle(j * width, 24 + i * height, n * width, height, COLOURS[kind]))
            j += n
        bar = shown.work[i] * BAR
        parts.append(_rectangle(SIDE + 12, 24 + i * height, bar, height, "#9aa5ab"))
    parts += [_text(0, 14, shown.title), _text(SIDE + 12, 14, "work per row")]
    for i, kind in enumerate(COLOURS):
        parts += [
            _rectangle(i * 80, SIDE + 32, 12, 12, COLOURS[kind]),
            _text(i * 80 + 17, SIDE + 42, NAMES[kind]),
        ]
    parts.append(_text(0, SIDE + 62, shown.caption))
    size = f'viewBox="0 0 {SIDE + 12 + BAR} {SIDE + 70}" width="{SIDE + 12 + BAR}" height="{SIDE + 70}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} shape-rendering="crispEdges" role="img">'
    return "\n".join([head, f"<title>{escape(shown.title)}</title>", *parts, "</svg>"])


def _rectangle(x: float, y: float, width: float, height: float, colour: str) -> str:
    return f'<rect x="{x:.2f}" y="{y:.2f}" width="{width:.2f}" height="{height:.2f}" fill="{colour}"/>'


def _text(x: float, y: float, words: str) -> str:
    return f'<text x="{x:.2f}" y="{y:.2f}" font-family="sans-serif" font-size="11" fill="{INK}">{escape(words)}</text>'


def html(shown: Picture) -> str:
    """The SVG with its counts as a table beside it."""
    q, kv = shown.blocks
    facts = {
        "blocks": f"{q} x {kv}",
        "full": str(shown.full),
        "partial": str(shown.partial),
        "empty": str(q * kv - shown.full - shown.partial),
        "skipped": f"{shown.skipped:.1%}",
        "work per row": f"{min(shown.work):.0%} to {max(shown.work):.0%}",
    }
    cells = "".join(f"<tr><th>{escape(k)}</th><td>{escape(v)}</td></tr>" for k, v in facts.items())
    style = "display:flex;gap:16px;align-items:flex-start;background:#fff;padding:8px"
    return f'<div style="{style}">{svg(shown)}<table style="color:{INK}">{cells}</table></div>'


def png(shown: Picture) -> bytes:
    """The same picture by matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.colors import ListedColormap
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError:
        instead = 'Install it: pip install matplotlib; draw("svg") and draw("text") need nothing.'
        raise CannotDraw(kind="png", needs="matplotlib", instead=instead) from None
    figure = Figure(figsize=(6, 5.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    grid, bars = figure.subplots(1, 2, sharey=True, width_ratios=(5, 1))
    colours = [COLOURS[kind] for kind in (EMPTY, PARTIAL, FULL)]
    q, kv = shown.blocks
    corners = (0, kv, q, 0)
    grid.imshow(
        shown.cells,
        cmap=ListedColormap(colours),
        vmin=0,
        vmax=2,
        aspect="auto",
        interpolation="nearest",
        extent=corners,
    )
    grid.set(xlabel="block of keys", ylabel="block of queries")
    grid.set_title(shown.title, fontsize=9)
    rows = len(shown.work)
    bars.barh([(i + 0.5) * q / rows for i in range(rows)], shown.work, height=q / rows, color="#9aa5ab")
    bars.set(xlim=(0, 1), xlabel="work per row")
    bars.set_xticks((0, 0.5, 1), ("0", "50%", "100%"), fontsize=8)
    for axes in (grid, bars):
        axes.spines[:].set_visible(False)
    patches = [Patch(facecolor=COLOURS[kind], edgecolor=INK, lw=0.4, label=NAMES[kind]) for kind in COLOURS]
    legend = figure.legend(handles=patches, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    legend.set_title(shown.caption)
    legend.get_title().set_fontsize(9)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()

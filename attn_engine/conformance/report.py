"""Outcomes as text for a terminal and as a page."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence

import torch

from attn_engine.conformance.run import NOT_ASKED, NOTHING, PASS, Outcome, counted
from attn_engine.version import VERSION

Columns = Mapping[str, Sequence[Outcome]]

_HEAD = """# Conformance

What PyTorch tests about FlexAttention, written anew from the description of its tests: score functions, masks, shapes
and strides, row values, compilation, block masks, learned biases, and a few things that it does not claim (section
"extra"). Every result is compared with a dense definition in float64. A row passes where output (and gradients) are no
further from it than 10 times the error of the same definition in float32, torch's own allowance for its kernels.

The table runs against any implementation with FlexAttention's interface; this page is what

    python -m attn_engine conformance --torch compiled --markdown docs/conformance.md

writes (`--kept FILE --seconds 120` goes on from call to call; a row that it has not reached is "not run" and not
counted). *Forward* is the output or, for rows about something else, that thing; *backward* is all gradients. Gradients
of learned tensors are asked for in float32, as in PyTorch's tests; a backward check includes the output. torch's
flex_attention runs compiled by inductor, which has no backward on the CPU.
"""


def summary(name: str, outcomes: Sequence[Outcome]) -> str:
    """ "attn_engine, cpu: forward 150 of 150, backward 120 of 120" """
    forward, backward = counted(outcomes)
    return f"{name}: forward {forward[0]} of {forward[1]}, backward {backward[0]} of {backward[1]}"


def markdown(columns: Columns) -> str:
    """The page: counts, the table, and what each failure said."""
    versions = f"attn_engine {VERSION}, torch {torch.__version__}, {platform.machine()}, no GPU"
    lines = [
        _HEAD,
        f"Run with {versions}.",
        "",
        *_counts(columns),
        "",
        *_table(columns),
        "",
        *_failures(columns),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _counts(columns: Columns) -> list[str]:
    lines = ["| | forward | backward |", "| --- | --- | --- |"]
    for name, outcomes in columns.items():
        forward, backward = counted(outcomes)
        lines.append(f"| {name} | {forward[0]} of {forward[1]} | {backward[0]} of {backward[1]} |")
    return lines


def _table(columns: Columns) -> list[str]:
    names = list(columns)
    head = [f"{name}: {way}" for name in names for way in ("forward", "backward")]
    lines = [f"| | {' | '.join(head)} |", f"| --- |{' --- |' * len(head)}"]
    by_row = [{(o.section, o.name): o for o in outcomes} for outcomes in columns.values()]
    section = ""
    for key in dict.fromkeys(k for rows in by_row for k in rows):
        if key[0] != section:
            section = key[0]
            lines.append(f"| **{section}** |{' |' * len(head)}")
        cells = [_cell(rows.get(key), way) for rows in by_row for way in ("forward", "backward")]
        lines.append(f"| {_escaped(key[1])} | {' | '.join(cells)} |")
    return lines


def _cell(outcome: Outcome | None, way: str) -> str:
    if outcome is None:
        return "not run"
    answer = getattr(outcome, way)
    return answer if answer in (PASS, NOTHING) else "n/a" if answer == NOT_ASKED else "**fail**"


def _failures(columns: Columns) -> list[str]:
    lines: list[str] = []
    for name, outcomes in columns.items():
        said: dict[str, list[str]] = {}
        for o in outcomes:
            for way, answer in (("forward", o.forward), ("backward", o.backward)):
                if answer not in (PASS, NOTHING, NOT_ASKED):
                    said.setdefault(answer, []).append(f"{o.name} ({way})")
        if said:
            lines += [f"## What failed: {name}", ""]
            for answer, rows in said.items():
                shown = "; ".join(rows[:6]) + (f"; and {len(rows) - 6} more" if len(rows) > 6 else "")
                lines.append(f"- `{answer.replace('`', chr(39))}`: {_escaped(shown)}")
            lines.append("")
    return lines


def _escaped(text: str) -> str:
    """As it is in a table of Markdown, where brackets after each other would be a link."""
    return text.replace("|", "\\|").replace("][", "]\\[")

"""Random row functions, as text: reductions of simple functions of the score and of earlier reductions, a weight.

Only functions that are smooth where rounding decides: |s - max| has a kink at the largest key of every row.
"""

from __future__ import annotations

import linecache
from typing import Any

import torch
from hypothesis import strategies as st

from attn_engine import online
from attn_engine.frontend import RowFunction

_SIMPLE = ("s", "s * s", "torch.relu(s)", "s.abs()", "torch.sigmoid(s)", "torch.tanh(s)", "0.5 * s + 0.3")
_OF_ROW = (
    "torch.sigmoid(s - {r})",
    "torch.tanh(s) * {r}",
    "s / (1 + {r} * {r})",
    "torch.exp(-(s - {r}) * (s - {r}))",
    "(s * s) / (1 + {r}.abs())",
    "torch.exp(torch.tanh(s * {r}))",
)
_WEIGHTS = ("({a}) * ({b})", "({a}) / (1 + ({b}) * ({b}))", "({a}) + ({b})")


@st.composite
def row_functions(draw: st.DrawFn) -> str:
    """The text of a row function `drawn(s)` with one to three reductions, and up to two row outputs."""
    lines = ["def drawn(s):"]
    names: list[str] = []
    exponential = draw(st.booleans())
    if exponential:
        lines += ["    m = s.max()", "    p = torch.exp(s - m)"]
    for i in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from(("max", "min", "sum", "mean", "sum")))
        inner = draw(_terms(names, exponential) if kind in ("sum", "mean") else st.sampled_from(_SIMPLE))
        names.append(f"r{i}")
        lines.append(f"    r{i} = ({inner}).{kind}()")
    first, second = draw(_terms(names, exponential)), draw(_terms(names, exponential))
    weight = draw(st.sampled_from(_WEIGHTS)).format(a=first, b=second)
    if draw(st.booleans()):
        weight = f"({weight}) / (1 + {names[-1]}.abs())"
    outputs = draw(st.lists(st.sampled_from(names), max_size=2, unique=True))
    rows = ", ".join(f'"{name}": {name} * 2 + 1' for name in outputs)
    return "\n".join([*lines, f"    return {weight}, {{{rows}}}", ""])


def _terms(names: list[str], exponential: bool) -> st.SearchStrategy[str]:
    of_row = [t.format(r=r) for t in _OF_ROW for r in names]
    return st.sampled_from([*_SIMPLE, *of_row, *(["p", "p * s"] if exponential else [])])


def made(text: str) -> RowFunction:
    """The row function of a text; its lines can be quoted."""
    name = f"<drawn {hash(text):x}>"
    linecache.cache[name] = (len(text), None, text.splitlines(True), name)
    found: dict[str, Any] = {"torch": torch}
    exec(compile(text, name, "exec"), found)
    return online(found["drawn"])

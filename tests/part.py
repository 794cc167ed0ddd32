"""Parametrised sets of which the fast suite runs a part, chosen so that every path stays on it; the rest is slow."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import pytest


def part_of(fast: Callable[..., bool], *sets: Iterable[Any]) -> list[Any]:
    """Every combination of these sets, as `parametrize` wants them: slow where `fast` says no to its values."""
    combinations = []
    for chosen in itertools.product(*sets):
        cases = [c if hasattr(c, "marks") else pytest.param(c) for c in chosen]
        values = [value for case in cases for value in case.values]
        marks = [mark for case in cases for mark in case.marks]
        slow = [] if fast(*values) else [pytest.mark.slow]
        combinations.append(pytest.param(*values, marks=[*marks, *slow]))
    return combinations

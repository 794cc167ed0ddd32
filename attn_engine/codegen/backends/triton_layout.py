"""Breaks long lines of generated Python the way `ruff format` does."""

from __future__ import annotations

import re

WIDTH = 100
INDENT = "    "
# Binary operators from loosest to tightest; `not`, `and`, `or` do not occur in kernels.
_COMPARISONS = (" == ", " != ", " <= ", " < ", " >= ", " > ")
_LEVELS = (_COMPARISONS, (" | ",), (" & ",), (" + ", " - "), (" * ", " / ", " // ", " % "))
_OPENING, _CLOSING = "([{", ")]}"


def wrapped(line: str, depth: int = 0) -> list[str]:
    """The lines of one statement that will stand `depth` levels deep. Comments are cut, never wrapped."""
    room = WIDTH - len(INDENT) * depth
    if len(line) <= room:
        return [line]
    if line.startswith("#"):
        return [line[: room - 4] + " ..."]
    head, value, tail = _parts(line)
    return _broken(head, value, tail, room)


def _parts(line: str) -> tuple[str, str, str]:
    """(text before the expression, the expression, text after it)."""
    if found := re.match(r"(if |for \w+ in )(.*)(:)$", line):
        return found[1], found[2], found[3]
    if found := re.match(r"(\w+ = )(tl\.load\(.*\))(\.to\([\w.]+\))$", line):
        return found[1], found[2], found[3]
    if found := re.match(r"(\w+(?:\[[\w, ]+\])? = )(.*)$", line):
        return found[1], found[2], ""
    return "", line, ""


def _broken(head: str, value: str, tail: str, room: int) -> list[str]:
    operands = _split_loosest(value)
    last = operands[-1]
    opening = _call_start(last)
    if len(operands) <= 2 and opening:
        before = value[: len(value) - len(last) + opening]
        if len(f"{head}{before}(") <= room:
            return [f"{head}{before}{last[opening]}", *_inside(last, opening, room), f"{last[-1]}{tail}"]
    if (closing := _leading_group(value)) and not set(_OPENING) & set(value[closing:]):
        inside = [INDENT + x for x in _operand(value[1:closing], room - len(INDENT))]
        return [f"{head}(", *inside, f"{value[closing:]}{tail}"]
    if len(value) <= room - len(INDENT):
        return [f"{head}(", INDENT + value, f"){tail}"]
    lines = [INDENT + line for operand in operands for line in _operand(operand, room - len(INDENT))]
    return [f"{head}(", *lines, f"){tail}"]


def _operand(operand: str, room: int) -> list[str]:
    if len(operand) <= room:
        return [operand]
    parts = _split_loosest(operand)
    if len(parts) > 1:
        return [line for part in parts for line in _operand(part, room)]
    opening = _call_start(operand)
    if not opening:
        return [operand]
    return [operand[: opening + 1], *_inside(operand, opening, room), operand[-1]]


def _inside(operand: str, opening: int, room: int) -> list[str]:
    """The lines between its brackets: arguments of a call, or of a group, where a comma would make a tuple."""
    inside = operand[opening + 1 : -1]
    if _is_call(operand, opening):
        return _arguments(inside, room)
    return [INDENT + x for x in _operand(inside, room - len(INDENT))]


def _arguments(inside: str, room: int) -> list[str]:
    """Arguments on one indented line where they fit, else one to a line."""
    if len(inside) <= room - len(INDENT):
        return [INDENT + inside]
    lines: list[str] = []
    for argument in _split(inside, (", ",), keep=False):
        pieces = _operand(argument, room - len(INDENT) - 1)
        lines += [INDENT + piece for piece in pieces[:-1]] + [f"{INDENT}{pieces[-1]},"]
    return lines


def _split_loosest(text: str) -> list[str]:
    """The operands of the loosest operator outside brackets, each after the first led by its operator."""
    for symbols in _LEVELS:
        parts = _split(text, symbols, keep=True)
        if len(parts) > 1:
            return parts
    return [text]


def _split(text: str, symbols: tuple[str, ...], *, keep: bool) -> list[str]:
    parts: list[str] = []
    level = start = position = 0
    while position < len(text):
        level += (text[position] in _OPENING) - (text[position] in _CLOSING)
        symbol = next((s for s in symbols if level == 0 and text.startswith(s, position)), None)
        if symbol is None:
            position += 1
            continue
        parts.append(text[start:position])
        start = position + (1 if keep else len(symbol))
        position += len(symbol)
    return [*parts, text[start:]]


def _is_call(text: str, opening: int) -> bool:
    """Whether the bracket at `opening` belongs to a call or a subscript, and is no group."""
    return opening > 0 and re.search(r"[\w\]]$", text[:opening]) is not None


def _leading_group(text: str) -> int:
    """Where the bracket closes that opens at the start of `text`; 0 where text starts otherwise."""
    level = 0
    for position, letter in enumerate(text if text.startswith("(") else ""):
        level += (letter in _OPENING) - (letter in _CLOSING)
        if level == 0:
            return position
    return 0


def _call_start(text: str) -> int:
    """Where the bracket opens that closes at the end of `text`; 0 where text is no call or subscript."""
    if text[-1] not in _CLOSING:
        return 0
    level = 0
    for position in range(len(text) - 1, -1, -1):
        level += (text[position] in _CLOSING) - (text[position] in _OPENING)
        if level == 0:
            return position
    return 0

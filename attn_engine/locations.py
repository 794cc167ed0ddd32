"""Where in the user's source something happens. Standard library only."""

from __future__ import annotations

import linecache
import sys
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

_PACKAGE = str(Path(__file__).parent) + "/"
_LIBRARY = _PACKAGE + "library/"


@dataclass(frozen=True, slots=True)
class Location:
    """A place in the user's source; `columns` is the part to underline, counted from 0.

    known_text: the line itself, where the file may not be found again.
    """

    path: str
    line: int
    function: str
    columns: tuple[int, int] | None = None
    known_text: str = ""

    @property
    def text(self) -> str:
        return (self.known_text or linecache.getline(self.path, self.line)).rstrip()

    @property
    def short_path(self) -> str:
        """The path from the current directory where it lies below it, else the file's name."""
        path = Path(self.path)
        return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else path.name

    def __str__(self) -> str:
        where = f"{self.short_path}:{self.line} in {self.function}"
        if not self.text:
            return where
        body = self.text.strip()
        indent = len(self.text) - len(body)
        first, last = self.columns or (indent, len(self.text))
        marks = " " * max(first - indent, 0) + "^" * max(min(last, len(self.text)) - max(first, indent), 1)
        return f"{where}\n  {self.line:>4} |     {body}\n       |     {marks}"


def location_of(frame: FrameType, whole_line: bool = False) -> Location:
    """Where `frame` is now."""
    code = frame.f_code
    columns = None
    if not whole_line:
        line, end_line, first, last = _positions(code)[frame.f_lasti // 2]
        if line == end_line == frame.f_lineno and first is not None and last is not None and first < last:
            columns = (first, last)
    return Location(code.co_filename, frame.f_lineno, code.co_name, columns)


def _positions(code: CodeType) -> Any:
    """(line, end line, column, end column) per instruction; Python 3.10 knows no columns."""
    if sys.version_info >= (3, 11):
        return list(code.co_positions())
    return [(None, None, None, None)] * len(code.co_code)


def definition_of(code: CodeType) -> Location:
    """Where a function is defined."""
    return Location(code.co_filename, code.co_firstlineno, code.co_name)


def user_location() -> Location | None:
    """The innermost line of the running thread that belongs to neither this package nor torch."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not is_user_code(frame.f_code):
        frame = frame.f_back
    return location_of(frame) if frame is not None else None


def is_user_code(code: CodeType) -> bool:
    path = code.co_filename
    if path.startswith(_PACKAGE) and not path.startswith(_LIBRARY):
        return False
    if path.startswith(("<frozen", "<eval_with_key>")):  # Python itself, a graph of torch.fx
        return False
    return not any(part in path for part in ("/torch/", "/torchinductor_")) and not path.endswith(
        "/functools.py"
    )

"""A user's functions by what they are made of, so that one made anew at each call is known again.

A lambda that is evaluated at every call is a new object each time, with new cells, around the same code. `Composition`
walks through code, cells, defaults and `functools.partial` and splits them in two: a key, which says what would be
traced (code, the kinds of what is captured, which cells are shared), and the captured values themselves. `StandIns`
are copies of the same make whose cells belong to us: an engine is built on them once, and a later call with
an equal key only puts its captured values into their cells.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from types import CellType, FunctionType
from typing import Any, cast

import torch

# What a function may capture that is part of what it means, not a value of the call.
_CONSTANTS = (bool, str, bytes, type(None), torch.dtype, torch.device, enum.Enum)
_MISSING = object()  # the content of a cell that nothing has been assigned to yet


@dataclass(slots=True)
class Composition:
    """What functions are made of.

    key: equal for functions that differ in captured values only. It holds ids of code and objects: whoever keeps a key
    keeps `alive` as long. values: the captured values, in the order in which `StandIns` takes them.
    """

    key: tuple[Hashable, ...] = ()
    values: list[Any] = field(default_factory=list[Any])
    alive: list[object] = field(default_factory=list[object])
    _seen: dict[int, int] = field(default_factory=dict[int, int])

    @classmethod
    def of(cls, functions: Sequence[Callable[..., Any] | None]) -> Composition:
        made = cls()
        made.key = tuple(None if f is None else made._part(f) for f in functions)
        return made

    def _part(self, value: Any) -> Hashable:
        """The key of a function, or of a value that one captures; values of the call are noted."""
        if type(value) is FunctionType:
            return self._function(value)
        if isinstance(value, torch.Tensor):
            self.values.append(value)
            return value.dtype, value.ndim
        if isinstance(value, _CONSTANTS):
            self.values.append(value)
            return value
        if type(value) is functools.partial:
            return self._partial(cast("functools.partial[Any]", value))
        self.values.append(value)
        if isinstance(value, type) or callable(value):
            self.alive.append(value)
            return id(value)
        return type(value)

    def _first_time(self, thing: object) -> bool:
        if id(thing) in self._seen:
            return False
        self._seen[id(thing)] = len(self._seen)
        return True

    def _function(self, fn: FunctionType) -> Hashable:
        if not self._first_time(fn):
            return "again", self._seen[id(fn)]
        code, scope = fn.__code__, fn.__globals__
        self.alive += (code, scope)
        parts: list[Hashable] = [id(code), id(scope)]
        for cell in fn.__closure__ or ():
            if self._first_time(cell):
                parts.append(self._part(_content(cell)))
            else:
                parts.append(("again", self._seen[id(cell)]))
        if fn.__defaults__ or fn.__kwdefaults__:
            parts.append(self._constants(fn.__defaults__ or (), fn.__kwdefaults__ or {}))
        return tuple(parts)

    def _partial(self, bound: functools.partial[Any]) -> Hashable:
        if not self._first_time(bound):
            return "again", self._seen[id(bound)]
        return "partial", self._part(bound.func), self._constants(bound.args, bound.keywords)

    def _constants(self, positional: tuple[Any, ...], named: dict[str, Any]) -> Hashable:
        """Default or bound arguments: one value of the call each time, whatever is in them."""
        self.values.append((positional, named))
        return tuple(map(self._kind, positional)), tuple((n, self._kind(x)) for n, x in named.items())

    def _kind(self, value: Any) -> Hashable:
        if isinstance(value, torch.Tensor):
            return value.dtype, value.ndim
        if isinstance(value, _CONSTANTS):
            return value
        if callable(value):
            self.alive.append(value)
            return id(value)
        return type(value)


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return _MISSING


class StandIns:
    """Copies of functions whose captured values can be exchanged."""

    def __init__(self, functions: Sequence[Callable[..., Any] | None]) -> None:
        self._setters: list[Callable[[Any], None]] = []
        self._copies: dict[int, Any] = {}
        self._cells: dict[int, CellType] = {}
        self._filled: set[int] = set()
        self.functions = tuple(None if f is None else self._part(f, _ignore) for f in functions)

    def put(self, values: Sequence[Any]) -> None:
        """Make the functions capture these values: those of a `Composition` with the same key."""
        for setter, value in zip(self._setters, values, strict=True):
            setter(value)

    def forget(self) -> None:
        """Let go of the captured tensors of a call."""
        for setter in self._setters:
            setter(_FORGOTTEN)

    def _part(self, value: Any, setter: Callable[[Any], None]) -> Any:
        """The copy of a function; anything else as it is, to be exchanged by `setter`."""
        if type(value) is FunctionType:
            return self._function(value)
        if type(value) is functools.partial:
            return self._partial(cast("functools.partial[Any]", value))
        self._setters.append(setter)
        return value

    def _function(self, fn: FunctionType) -> FunctionType:
        if id(fn) in self._copies:
            return self._copies[id(fn)]
        old = fn.__closure__ or ()
        cells = tuple(self._cells.setdefault(id(cell), CellType()) for cell in old)
        copy = FunctionType(fn.__code__, fn.__globals__, fn.__name__, fn.__defaults__, cells)
        copy.__kwdefaults__ = fn.__kwdefaults__
        copy.__module__ = fn.__module__
        copy.__dict__.update(fn.__dict__)
        self._copies[id(fn)] = copy
        for cell, new in zip(old, cells, strict=True):
            if id(cell) not in self._filled:
                self._filled.add(id(cell))
                setter = functools.partial(_set_cell, new)
                setter(self._part(_content(cell), setter))
        if fn.__defaults__ or fn.__kwdefaults__:
            self._setters.append(functools.partial(_set_defaults, copy))
        return copy

    def _partial(self, bound: functools.partial[Any]) -> functools.partial[Any]:
        if id(bound) in self._copies:
            return self._copies[id(bound)]
        copy = functools.partial(bound.func)
        self._copies[id(bound)] = copy
        inner = self._part(bound.func, _ignore)
        setter = functools.partial(_set_arguments, copy, inner)
        setter((bound.args, bound.keywords))
        self._setters.append(setter)
        return copy


class _Forgotten:
    """What stands in a cell between calls."""


_FORGOTTEN = _Forgotten()


def _ignore(_: Any) -> None:
    """The functions themselves are part of the key."""


def _set_cell(cell: CellType, value: Any) -> None:
    if value is _MISSING:
        if _content(cell) is not _MISSING:
            del cell.cell_contents
        return
    cell.cell_contents = value


def _set_defaults(fn: FunctionType, value: Any) -> None:
    positional, named = ((), {}) if value is _FORGOTTEN else value
    fn.__defaults__, fn.__kwdefaults__ = positional or None, named or None


def _set_arguments(copy: functools.partial[Any], inner: Any, value: Any) -> None:
    args, keywords = ((), {}) if value is _FORGOTTEN else value
    state: Any = copy
    state.__setstate__((inner, args, dict(keywords), None))

"""A copy of the user's function in which what it captures is replaced: numbers by runtime numbers, tensors by views.

Closure cells, globals, default arguments, functools.partial arguments and, through them, other plain functions are
followed, and each captured thing keeps a way to be read again at every call. What cannot be followed (attributes of
objects, elements of lists) is used as it is and makes the trace opaque: the engine then traces again at each call.
Where numbers may not differ from call to call, in an OnlineFunc, nothing is replaced and everything is guarded.
"""

from __future__ import annotations

import dis
import enum
import functools
import math
import numbers
import sys
from collections.abc import Callable, Hashable, Iterator
from itertools import zip_longest
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any, cast

import torch

from attn_engine.errors import is_user_code
from attn_engine.frontend.constants import Constant
from attn_engine.frontend.session import CapturedTensor, Session, number_kind, plain_number
from attn_engine.frontend.traced import Symbolic, Traced
from attn_engine.frontend.views import TensorView

Read = Callable[[], Any]
_PLAIN = (bool, str, bytes, type(None), type(Ellipsis), torch.dtype, torch.device, enum.Enum)


class Rebuilder:
    """Makes the copies of one trace.

    replaced: fixed replacements by identity (the engine's CustomIO). constants: captured numbers and tensors stay what
    they are; a number is guarded.
    """

    def __init__(self, session: Session, replaced: dict[int, Any], constants: bool = False) -> None:
        self._session = session
        self._replaced = replaced
        self._constants = constants
        self._copies: dict[int, FunctionType] = {}

    def callable(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """The copy of whatever the user gave as a function."""
        return self._called(fn, lambda: fn, ("function", id(fn)), fn)

    def watch(self, value: Any, read: Read, label: str) -> None:
        """Guard a value that the user's functions reach by themselves, where `read()` gives it."""
        self._substitute(value, read, ("watched", label), label, None)

    def _called(self, value: Any, read: Read, key: Hashable, owner: object) -> Any:
        """The copy of what will be called: of an object, its method. Objects that are only read stay themselves."""
        method = _call_method(value)
        if method is None or id(value) in self._replaced:
            return self._substitute(value, read, key, "function", owner)
        self._note_methods(value)
        return MethodType(self._function(method), value)

    def _substitute(self, value: Any, read: Read, key: Hashable, label: str, owner: object) -> Any:
        """What the copy sees instead of `value`, which `read()` gives again at a call."""
        if id(value) in self._replaced:
            return self._replaced[id(value)]
        if isinstance(value, Symbolic | type(math) | BuiltinFunctionType):
            self._note_module(value)
            return value
        if isinstance(value, _PLAIN):
            self._session.guard(label, read, value)
            return value
        if isinstance(value, numbers.Real):
            return self._number(value, read, key, label, owner)
        if isinstance(value, torch.Tensor):
            return self._tensor(value, read, key, label, owner)
        return self._structure(value, read, key, label)

    def _note_module(self, value: Any) -> None:
        root = getattr(value, "__name__", "").partition(".")[0]
        if (
            isinstance(value, ModuleType)
            and root not in sys.stdlib_module_names
            and root not in ("torch", "numpy")
        ):
            self._session.opaque = True  # its attributes may be anything, at any time

    def _number(self, value: Any, read: Read, key: Hashable, label: str, owner: object) -> Any:
        plain = plain_number(value)
        if number_kind(plain) is None or isinstance(value, Constant):
            self._session.guard(label, read, value)
            return plain
        if self._constants:
            self._session.guard(label, read, value)
            return value
        var = self._session.runtime_number(key, label, lambda: plain_number(read()), owner)
        return Traced(var, self._session)

    def _tensor(self, value: torch.Tensor, read: Read, key: Hashable, label: str, owner: object) -> Any:
        if self._constants:
            self._session.opaque = True  # nothing tells when the values in memory change
            return value
        storage = self._session.storage_of(value, label)
        tensor = CapturedTensor(key, label, storage, tuple(value.shape), read, owner=owner)
        if value.ndim:
            return TensorView(self._session, tensor)
        return Traced(self._session.load(tensor, ()), self._session)

    def _structure(self, value: Any, read: Read, key: Hashable, label: str) -> Any:
        """Functions, tuples and objects."""
        if isinstance(value, FunctionType):
            if _needs_copy(value):
                self._session.guard(label, read, value)
                return self._function(value)
            return value
        if isinstance(value, functools.partial):
            bound = cast(functools.partial[Any], value)
            self._session.guard(label, read, bound)
            return self._partial(bound)
        if type(value) is tuple:
            return self._tuple(cast(tuple[Any, ...], value), read, label)
        if isinstance(value, type) and _is_library(value.__module__):
            return value
        if isinstance(value, MethodType):
            self._note_methods(value.__self__)
            return (
                MethodType(self._function(value.__func__), value.__self__)
                if _is_plain(value.__func__)
                else value
            )
        self._note_methods(value)
        return value

    def _note_methods(self, value: object) -> None:
        """Whatever is read from an object may be another at the next call; lines of its methods are the user's."""
        self._session.opaque = True
        for function in functions_of(value if isinstance(value, type) else type(value)).values():
            self._session.codes.update(codes_of(function.__code__))

    def _tuple(self, items: tuple[Any, ...], read: Read, label: str) -> tuple[Any, ...]:
        self._session.guard(label, read, items)
        return tuple(
            self._substitute(item, lambda i=i: items[i], ("item", id(items), i), f"{label}_{i}", items)
            for i, item in enumerate(items)
        )

    def _partial(self, bound: functools.partial[Any]) -> functools.partial[Any]:
        names = _parameter_names(bound.func)
        args = [
            self._substitute(a, lambda i=i: bound.args[i], ("partial", id(bound), i), name, bound)
            for i, (name, a) in enumerate(
                zip_longest(names[: len(bound.args)], bound.args, fillvalue="argument")
            )
        ]
        keywords = {
            name: self._substitute(
                a, lambda n=name: bound.keywords[n], ("partial", id(bound), name), name, bound
            )
            for name, a in bound.keywords.items()
        }
        inner = self._called(bound.func, lambda: bound.func, ("partial", id(bound)), bound)
        return functools.partial(inner, *args, **keywords)

    def _function(self, fn: FunctionType) -> FunctionType:
        if id(fn) in self._copies:
            return self._copies[id(fn)]
        cells = tuple(CellType() for _ in fn.__closure__ or ())
        scope = dict(fn.__globals__)
        copy = FunctionType(fn.__code__, scope, fn.__name__, fn.__defaults__, cells)
        copy.__kwdefaults__ = fn.__kwdefaults__
        copy.__dict__.update(fn.__dict__)
        self._copies[id(fn)] = copy
        if is_user_code(fn.__code__):
            self._session.codes.update(codes_of(fn.__code__))
        self._fill_cells(fn, cells)
        if not _is_library(fn.__module__):
            self._fill_globals(fn, scope)
        self._fill_defaults(fn, copy)
        return copy

    def _fill_cells(self, fn: FunctionType, cells: tuple[CellType, ...]) -> None:
        for name, old, new in zip(fn.__code__.co_freevars, fn.__closure__ or (), cells, strict=True):
            try:
                value = old.cell_contents
            except ValueError:
                continue  # not assigned yet: reading it raises what Python raises
            new.cell_contents = self._substitute(
                value, lambda c=old: c.cell_contents, ("cell", id(old)), name, old
            )

    def _fill_globals(self, fn: FunctionType, scope: dict[str, Any]) -> None:
        original = fn.__globals__
        for name in _global_names(fn.__code__):
            if name in original:
                key = ("global", id(original), name)
                scope[name] = self._substitute(
                    original[name], lambda n=name: original[n], key, name, original
                )

    def _fill_defaults(self, fn: FunctionType, copy: FunctionType) -> None:
        defaults = fn.__defaults__ or ()
        names = fn.__code__.co_varnames[: fn.__code__.co_argcount][-len(defaults) :] if defaults else ()
        if defaults:
            copy.__defaults__ = tuple(
                self._substitute(d, lambda i=i: (fn.__defaults__ or ())[i], ("default", id(fn), i), name, fn)
                for i, (name, d) in enumerate(zip(names, defaults, strict=True))
            )
        if fn.__kwdefaults__:
            copy.__kwdefaults__ = {
                name: self._substitute(
                    d, lambda n=name: (fn.__kwdefaults__ or {})[n], ("default", id(fn), name), name, fn
                )
                for name, d in fn.__kwdefaults__.items()
            }


def codes_of(code: CodeType) -> Iterator[CodeType]:
    """A function's code and that of the functions inside it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from codes_of(constant)


def functions_of(cls: type) -> dict[str, FunctionType]:
    """The Python functions behind the methods and properties that the user's classes among cls's bases define."""
    found: dict[str, FunctionType] = {}
    for base in cls.__mro__:
        if _is_library(base.__module__):
            continue
        for name, value in vars(base).items():
            function = getattr(value, "__func__", getattr(value, "fget", value))
            if isinstance(function, FunctionType) and is_user_code(function.__code__):
                found.setdefault(name, function)
    return found


def _global_names(code: CodeType) -> list[str]:
    found = {
        str(i.argval): None
        for c in codes_of(code)
        for i in dis.get_instructions(c)
        if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")
    }
    return list(found)


def _is_library(module: str | None) -> bool:
    """Code that is not the user's: it does not change, and handles traced values or leaves them alone."""
    root = (module or "").partition(".")[0]
    if root == "attn_engine":
        return not (module or "").startswith("attn_engine.library")
    return root in ("torch", "numpy", "builtins") or (root in sys.stdlib_module_names and root != "__main__")


def _needs_copy(fn: FunctionType) -> bool:
    return bool(fn.__closure__) or not _is_library(fn.__module__)


def _is_plain(fn: object) -> bool:
    return isinstance(fn, FunctionType) and _needs_copy(fn)


def _call_method(value: Any) -> FunctionType | None:
    """The Python function behind calling an object; torch modules are called at their forward."""
    method = getattr(value.__class__, "forward" if isinstance(value, torch.nn.Module) else "__call__", None)
    return method if isinstance(method, FunctionType) and not isinstance(value, type) else None


def _parameter_names(fn: Any) -> tuple[str, ...]:
    while isinstance(fn, functools.partial):
        fn = fn.func
    code = getattr(fn, "__code__", None)
    return code.co_varnames[: code.co_argcount] if isinstance(code, CodeType) else ()

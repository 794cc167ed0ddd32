"""What an OnlineFunc's methods read besides their arguments: each number becomes a guard of the traced rule."""

from __future__ import annotations

from collections.abc import Mapping
from types import CodeType
from typing import Any

from attn_engine.frontend.capture import Rebuilder, functions_of
from attn_engine.frontend.session import Session
from attn_engine.frontend.symbols import SymbolScalar, Var

_DESCRIPTION = ("online_rowscales", "final_rowscales", "external_fwd_tensors", "methods")


def watch_captures(func: object, session: Session) -> None:
    """Guard the globals, closure cells and defaults of all methods, the attributes they name, and the row values.

    What cannot be guarded (a tensor, a list, another object) makes the session opaque.
    """
    itself = {id(x): x for x in (func, *type(func).__mro__)}  # their attributes are watched one by one
    rebuilder = Rebuilder(session, itself, constants=True)
    methods = {**functions_of(type(func)), **_functions_in(func)}
    for name, function in methods.items():
        if not _is_special(name):
            rebuilder.callable(function)
    for name in _attributes_read(session.codes) & _attributes_of(func):
        if name in methods:
            continue
        value = getattr(func, name)
        rebuilder.watch(value, lambda n=name: getattr(func, n), name)
    for name in methods:
        if not _is_special(name) and not isinstance(getattr(type(func), name, None), property):
            session.guard(name, lambda n=name: getattr(func, n), getattr(func, name))
    session.guard("row values", lambda: _row_values(func), _row_values(func))


def initial_number(value: Any) -> float:
    """The number that a row value starts from."""
    if isinstance(value, SymbolScalar):
        return value.initial
    return value.value if isinstance(value, Var) else float(value)


def _row_values(func: Any) -> tuple[object, ...]:
    first: Mapping[str, Any] = func.online_rowscales
    return (*((name, initial_number(value)) for name, value in first.items()), *func.final_rowscales)


def _functions_in(func: object) -> dict[str, Any]:
    """Methods put into the object itself, as in `rule.forward = my_forward`."""
    return {n: v for n, v in getattr(func, "__dict__", {}).items() if hasattr(v, "__code__")}


def _attributes_of(func: object) -> set[str]:
    names = {n for cls in type(func).__mro__[:-1] for n in vars(cls)} | set(getattr(func, "__dict__", {}))
    return {n for n in names if not _is_special(n) and n not in _DESCRIPTION and hasattr(func, n)}


def _attributes_read(codes: set[CodeType]) -> set[str]:
    """Names that the functions use, and strings in them: getattr(self, "temperature")."""
    strings = {c for code in codes for c in code.co_consts if isinstance(c, str)}
    return strings.union(*(code.co_names for code in codes))


def _is_special(name: str) -> bool:
    return name.startswith("__") and name.endswith("__")

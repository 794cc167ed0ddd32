"""The symbol classes that descriptions of online functions name: a row value with a name and an initial number."""

from __future__ import annotations

from typing import Any

from attn_engine.frontend.session import Session
from attn_engine.frontend.traced import Traced
from attn_engine.ir.expr import Const


class Var:
    """The initial value of a symbol: a number, or its text as in Var("-inf")."""

    def __init__(self, name: str | float) -> None:
        self.name = str(name)
        self.value = float(name)

    def __repr__(self) -> str:
        return f"Var({self.name!r})"


class SymbolScalar(Traced):
    """A named row value. Used in an expression it is its initial value: SymbolScalar("o_scale", Var("1")) is 1."""

    __slots__ = ("initial", "varname")

    def __init__(self, varname: str, value: Any = 0.0, *_: Any, **__: Any) -> None:
        self.varname = varname
        self.initial = value.value if isinstance(value, Var) else float(value)
        super().__init__(Const(self.initial), Session())


class SymbolicArray(SymbolScalar):
    """A row of scores, by its other name."""


class SymbolicTensor(SymbolScalar):
    """A custom input, by its other name."""


class SymbolicColReduceArray(SymbolScalar):
    """The partial row values of a split, by their other name."""


class SymbolicConst(SymbolScalar):
    """A plain number."""

    def __init__(self, value: float) -> None:
        super().__init__("const", value)

"""Python's operators on symbols, under torch's names."""

from __future__ import annotations

from typing import Any

import torch

from attn_engine.frontend.session import Session
from attn_engine.ir.expr import Expr


class Symbolic:
    """Python's operators, each handed to `_operate` with torch's name for it."""

    __slots__ = ()

    session: Session

    def _operate(self, name: str, *args: Any) -> Any:
        raise NotImplementedError

    def element(self) -> Expr:
        """The expression that the symbol stands for beside a traced value."""
        raise NotImplementedError

    @property
    def dtype(self) -> torch.dtype:
        raise NotImplementedError

    def __add__(self, other: Any) -> Any:
        return self._operate("add", self, other)

    def __radd__(self, other: Any) -> Any:
        return self._operate("add", other, self)

    def __sub__(self, other: Any) -> Any:
        return self._operate("sub", self, other)

    def __rsub__(self, other: Any) -> Any:
        return self._operate("sub", other, self)

    def __mul__(self, other: Any) -> Any:
        return self._operate("mul", self, other)

    def __rmul__(self, other: Any) -> Any:
        return self._operate("mul", other, self)

    def __truediv__(self, other: Any) -> Any:
        return self._operate("true_divide", self, other)

    def __rtruediv__(self, other: Any) -> Any:
        return self._operate("true_divide", other, self)

    def __floordiv__(self, other: Any) -> Any:
        return self._operate("floor_divide", self, other)

    def __rfloordiv__(self, other: Any) -> Any:
        return self._operate("floor_divide", other, self)

    def __mod__(self, other: Any) -> Any:
        return self._operate("remainder", self, other)

    def __rmod__(self, other: Any) -> Any:
        return self._operate("remainder", other, self)

    def __pow__(self, other: Any) -> Any:
        return self._operate("pow", self, other)

    def __rpow__(self, other: Any) -> Any:
        return self._operate("pow", other, self)

    def __neg__(self) -> Any:
        return self._operate("neg", self)

    def __pos__(self) -> Any:
        return self._operate("positive", self)

    def __abs__(self) -> Any:
        return self._operate("abs", self)

    def __le__(self, other: Any) -> Any:
        return self._operate("le", self, other)

    def __lt__(self, other: Any) -> Any:
        return self._operate("lt", self, other)

    def __ge__(self, other: Any) -> Any:
        return self._operate("ge", self, other)

    def __gt__(self, other: Any) -> Any:
        return self._operate("gt", self, other)

    def __eq__(self, other: object) -> Any:
        return False if other is None else self._operate("eq", self, other)

    def __ne__(self, other: object) -> Any:
        return True if other is None else self._operate("ne", self, other)

    def __and__(self, other: Any) -> Any:
        return self._operate("bitwise_and", self, other)

    def __rand__(self, other: Any) -> Any:
        return self._operate("bitwise_and", other, self)

    def __or__(self, other: Any) -> Any:
        return self._operate("bitwise_or", self, other)

    def __ror__(self, other: Any) -> Any:
        return self._operate("bitwise_or", other, self)

    def __xor__(self, other: Any) -> Any:
        return self._operate("bitwise_xor", self, other)

    def __rxor__(self, other: Any) -> Any:
        return self._operate("bitwise_xor", other, self)

    def __lshift__(self, other: Any) -> Any:
        return self._operate("bitwise_left_shift", self, other)

    def __rlshift__(self, other: Any) -> Any:
        return self._operate("bitwise_left_shift", other, self)

    def __rshift__(self, other: Any) -> Any:
        return self._operate("bitwise_right_shift", self, other)

    def __rrshift__(self, other: Any) -> Any:
        return self._operate("bitwise_right_shift", other, self)

    def __invert__(self) -> Any:
        return self._operate("bitwise_not", self)

    def __hash__(self) -> int:
        return id(self)

"""Short vectors inside a traced function: one row of a captured tensor, `points[q_idx]`, as its traced numbers.

(points[q_idx] - points[kv_idx]).square().sum(-1) becomes a sum of so many terms: nothing is looped over in a kernel, so
a vector may not be long.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch

from attn_engine.errors import UnknownOperation, VectorTooLong, WrongOperands
from attn_engine.frontend.functions import FUNCTIONS
from attn_engine.frontend.session import Session
from attn_engine.frontend.symbolic import Symbolic
from attn_engine.ir.expr import Expr

LONGEST = 64
_DOTS = ("matmul", "dot", "inner", "vecdot")
_FOLDS = {"sum": "add", "prod": "mul", "amax": "maximum", "amin": "minimum"}
Build = Callable[[Session, str, Sequence[Any], dict[str, Any]], Any]


class Vector(Symbolic):
    """Traced numbers side by side: operators and torch functions act on each, reductions give one traced number."""

    __slots__ = ("build", "numbers", "origin", "session")

    def __init__(self, session: Session, numbers: Sequence[Any], build: Build, origin: Symbolic) -> None:
        """origin: the row of a tensor that the vector comes from; errors name it."""
        self.session, self.numbers, self.build, self.origin = session, tuple(numbers), build, origin

    def __repr__(self) -> str:
        return f"<vector of {len(self.numbers)} traced numbers>"

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Any:
        return iter(self.numbers)

    def __getitem__(self, index: int) -> Any:
        return self.numbers[index]

    @property
    def ndim(self) -> int:
        return 1

    def dim(self) -> int:
        return 1

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self.numbers),))

    @property
    def dtype(self) -> torch.dtype:
        return self.numbers[0].dtype

    def element(self) -> Expr:
        """Raises WrongIndexCount: one more index makes a number of it."""
        return self.origin.element()

    def _operate(self, name: str, *args: Any) -> Any:
        return of_vectors(self.session, name, args, {}, self.build)

    def __matmul__(self, other: Any) -> Any:
        return self._operate("dot", self, other)

    def __rmatmul__(self, other: Any) -> Any:
        return self._operate("dot", other, self)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        from attn_engine.frontend.traced import dispatch

        return dispatch(func, args, kwargs or {})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def method(*args: Any, **kwargs: Any) -> Any:
            return of_vectors(self.session, name, (self, *args), kwargs, self.build)

        return method


def check_length(length: int, tensor: str, session: Session) -> None:
    """Raise VectorTooLong for a vector that is not written out."""
    if length > LONGEST:
        raise VectorTooLong(tensor=tensor, got=length, most=LONGEST, location=session.location())


def of_vectors(session: Session, name: str, args: Sequence[Any], kwargs: dict[str, Any], build: Build) -> Any:
    """The result of torch's function `name` where an operand is a vector. Raises WrongOperands."""
    if name in _DOTS:
        return _reduced(session, "sum", of_vectors(session, "mul", args, {}, build), (), {})
    first = args[0] if args else None
    if (name in _FOLDS or name == "mean") and isinstance(first, Vector):
        return _reduced(session, name, first, args[1:], kwargs)
    if name not in FUNCTIONS:
        known = (
            f"Of a vector: sum, mean, prod, amax, amin, dot; of its numbers: {', '.join(sorted(FUNCTIONS))}."
        )
        raise UnknownOperation(operation=f"{name} of a vector", instead=known, location=session.location())
    vector = next(a for a in (*args, *kwargs.values()) if isinstance(a, Vector))
    columns = [_spread(session, a, len(vector)) for a in args]
    made = [build(session, name, each, kwargs) for each in zip(*columns, strict=True)]
    return Vector(session, made, build, vector.origin)


def _spread(session: Session, value: Any, length: int) -> Sequence[Any]:
    """An operand once per number of a vector."""
    if getattr(value, "ndim", 0) == 0:
        return [value] * length
    if len(value) != length:
        raise WrongOperands(
            operation="An operation on vectors",
            expected=f"vectors of {length} numbers",
            got=f"one of {len(value)}",
            instead="They must be of one length.",
            location=session.location(),
        )
    return [value[i] for i in range(length)]


def _reduced(session: Session, name: str, x: Vector, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """One number of a vector; its only dimension may be named as 0 or -1."""
    dims = [*args, *(kwargs[k] for k in ("dim", "axis") if k in kwargs)]
    flat = [
        d for dim in dims for d in (cast("tuple[Any, ...]", dim) if isinstance(dim, tuple | list) else (dim,))
    ]
    if any(d not in (0, -1, None) for d in flat) or kwargs.get("keepdim"):
        raise WrongOperands(
            operation=name,
            expected="a reduction of the vector's only dimension, -1",
            got=f"{[*args]} {kwargs or ''}".strip(),
            instead=f"Call x.{name}(-1).",
            location=session.location(),
        )
    fold = _FOLDS["sum" if name == "mean" else name]
    total = functools.reduce(lambda a, b: x.build(session, fold, (a, b), {}), x.numbers)
    return x.build(session, "true_divide", (total, len(x)), {}) if name == "mean" else total

"""What one trace collects while the user's function runs: captures, runtime numbers, guards, names and source lines."""

from __future__ import annotations

import linecache
import math
import numbers
import sys
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from types import CodeType, FrameType

import torch

from attn_engine.errors import Location, UnknownOperation, UnsupportedDtype, location_of
from attn_engine.frontend.names import KernelNames
from attn_engine.frontend.operations import INT_LIMIT
from attn_engine.ir.evaluate import evaluate
from attn_engine.ir.expr import Const, Expr, Load, Var, postorder
from attn_engine.ir.ops import DType, Number, Storage

# What reading a captured thing again raises when it is gone or is something else now.
READ_FAILURES = (AttributeError, IndexError, KeyError, NameError, TypeError, ValueError)
STORAGES = {getattr(torch, s.value): s for s in Storage if s is not Storage.FLOAT8}


def plain_number(value: object) -> int | float:
    """A captured number as Python's own int or float. Raises TypeError for anything else, bools included."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{value!r} is not a number")
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def number_kind(value: Number) -> DType | None:
    """The kind of runtime number that can carry `value`; None where only a constant can."""
    if isinstance(value, int):
        return DType.INT if -INT_LIMIT <= value < INT_LIMIT else None
    return DType.FLOAT if math.isfinite(value) else None


@dataclass(frozen=True, slots=True)
class BoundTensor:
    """A captured tensor of the kernel, and where to find it at a call (a closure cell, a global, ... read anew)."""

    name: str
    storage: Storage
    rank: int
    accessor: Callable[[], torch.Tensor]


@dataclass(frozen=True, slots=True)
class BoundScalar:
    """A runtime number of the kernel, and where to find its value at a call."""

    var: Var
    accessor: Callable[[], Number]


@dataclass(frozen=True, slots=True)
class Guard:
    """Something the trace has taken for granted: it must be traced again once `read()` is not `expected`."""

    what: str
    read: Callable[[], object]
    expected: object


def guards_hold(guards: Iterable[Guard]) -> bool:
    """Whether all that a trace has taken for granted is still so."""
    try:
        for guard in guards:
            now, expected = guard.read(), guard.expected
            if now is not expected and (type(now) is not type(expected) or not bool(now == expected)):
                return False
    except READ_FAILURES:
        return False  # a captured thing is gone or is something else now
    return True


@dataclass(frozen=True, slots=True)
class CapturedTensor:
    """A tensor that a traced function can reach, before anything has been read from it."""

    key: Hashable
    label: str
    storage: Storage
    sizes: tuple[str | int, ...]
    read: Callable[[], torch.Tensor] | None
    custom_input: str | None = None
    element: tuple[Expr, ...] | None = None  # the indices meant when it is used without any
    owner: object = None

    @property
    def rank(self) -> int:
        return len(self.sizes)


@dataclass(slots=True)
class Session:
    """One run of one user function on symbols. rows: it is a row function, whose scores can be reduced."""

    names: KernelNames = field(default_factory=KernelNames)
    tensors_allowed: bool = True
    rows: bool = False
    tensors: dict[str, CapturedTensor] = field(default_factory=dict[str, CapturedTensor])
    scalars: dict[Var, BoundScalar] = field(default_factory=dict[Var, BoundScalar])
    guards: list[Guard] = field(default_factory=list[Guard])
    opaque: bool = False
    codes: set[CodeType] = field(default_factory=set[CodeType])
    lines: dict[Expr, tuple[str, int]] = field(default_factory=dict[Expr, tuple[str, int]])
    locals: dict[Expr, tuple[str, CodeType]] = field(default_factory=dict[Expr, tuple[str, CodeType]])
    returned_at: Location | None = None

    def user_frame(self) -> FrameType | None:
        frame: FrameType | None = sys._getframe(1)  # pyright: ignore[reportPrivateUsage]
        while frame is not None and frame.f_code not in self.codes:
            frame = frame.f_back
        return frame

    def location(self) -> Location | None:
        """The line of the user's function that is running."""
        frame = self.user_frame()
        return location_of(frame) if frame is not None else None

    def remember(self, expr: Expr) -> None:
        """Note the user's line that first built `expr`."""
        if expr not in self.lines and not isinstance(expr, Var | Const):
            frame = self.user_frame()
            if frame is not None:
                self.lines[expr] = (frame.f_code.co_filename, frame.f_lineno)

    def guard(self, what: str, read: Callable[[], object], expected: object) -> None:
        self.guards.append(Guard(what, read, expected))

    def runtime_number(self, key: Hashable, label: str, read: Callable[[], Number], owner: object) -> Var:
        """A variable for a captured number, passed at run time."""
        name = self.names.assign(key, label, owner)
        var = Var(name, number_kind(read()) or DType.FLOAT)
        self.scalars.setdefault(var, BoundScalar(var, read))
        return var

    def load(self, tensor: CapturedTensor, indices: tuple[Expr, ...]) -> Load:
        """The element of a captured tensor; from here on it is an argument of the kernel."""
        if not self.tensors_allowed:
            raise UnknownOperation(
                operation="Reading a tensor in an OnlineFunc",
                instead="Read it in score_mod, which runs before.",
                location=self.location(),
            )
        name = self.names.assign(tensor.key, tensor.label, tensor.owner)
        self.tensors.setdefault(name, tensor)
        return Load(name, tensor.storage.dtype, indices)

    def real_tensor(self, tensor: torch.Tensor) -> CapturedTensor:
        """A tensor reached in a way that cannot be followed again (an attribute, a list): held by identity."""
        self.opaque = True
        key = ("tensor", id(tensor))
        return CapturedTensor(
            key,
            "",
            self.storage_of(tensor, "A captured tensor"),
            tuple(tensor.shape),
            lambda: tensor,
            owner=tensor,
        )

    def storage_of(self, tensor: torch.Tensor, what: str) -> Storage:
        if tensor.dtype not in STORAGES:
            supported = ", ".join(s.value for s in STORAGES.values())
            raise UnsupportedDtype(
                argument=what, got=tensor.dtype, supported=supported, location=self.location()
            )
        return STORAGES[tensor.dtype]

    def concrete(self, expr: Expr, what: str) -> Number | None:
        """The present value of an expression of captured numbers, guarded; None where it depends on more."""
        if not is_concrete(expr, self):
            return None
        value = self.evaluate(expr)
        if any(isinstance(n, Load) for n in postorder(expr)):
            self.opaque = True  # a value in memory: nothing tells when it changes
        elif not isinstance(expr, Const):
            self.guard(what, lambda: self.evaluate(expr), value)
        return value

    def evaluate(self, expr: Expr) -> Number:
        """The present value of an expression that `is_concrete`."""
        known: dict[Expr, Number] = {
            n: self.scalars[n].accessor() for n in postorder(expr) if isinstance(n, Var)
        }
        return evaluate(expr, known, self._element)

    def _element(self, name: str, indices: tuple[int, ...]) -> Number:
        read = self.tensors[name].read
        assert read is not None
        return read().detach()[indices].item()

    def source_of(self, expr: Expr) -> str:
        """'file.py:12: text' of the line that gave a local variable its value, or of the line that built the node."""
        if expr not in self.lines:
            return ""
        path, line = self.lines[expr]
        name, code = self.locals.get(expr, ("", None))
        first = code.co_firstlineno if code is not None and code.co_filename == path else line
        starts = (f"{name} =", f"{name}:", f"{name},")
        for number in range(line, max(first, line - 12) - 1, -1):
            if name and linecache.getline(path, number).strip().startswith(starts):
                line = number
                break
        return f"{path.rsplit('/', 1)[-1]}:{line}: {linecache.getline(path, line).strip()}"


def is_concrete(expr: Expr, session: Session) -> bool:
    """Whether the expression is made of captured numbers and fixed elements of captured tensors only."""
    for node in postorder(expr):
        if isinstance(node, Var) and node not in session.scalars:
            return False
        if isinstance(node, Load) and session.tensors[node.tensor].read is None:
            return False
    return True

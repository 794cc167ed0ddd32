"""Values that a user's function receives: they record what is done to them instead of computing it."""

from __future__ import annotations

import numbers
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch

from attn_engine.errors import (
    ControlFlowOnTraced,
    NumberFromTraced,
    UnknownMethod,
    UnknownOperation,
    UnknownReduction,
    WrongIndexCount,
    WrongOperands,
)
from attn_engine.frontend import operations
from attn_engine.frontend.functions import FUNCTIONS
from attn_engine.frontend.names import type_name
from attn_engine.frontend.operations import constant, kind
from attn_engine.frontend.row_reductions import ROW_FUNCTIONS, Extremum, reduced, reduces_row
from attn_engine.frontend.session import Session
from attn_engine.frontend.symbolic import Symbolic
from attn_engine.frontend.vectors import Vector, of_vectors
from attn_engine.ir.expr import Const, Expr, Reduce
from attn_engine.ir.ops import DType

_SUPPORTED = (
    "Known functions: " + ", ".join(sorted(n for n in FUNCTIONS if not n.startswith("special_"))) + "."
)
_DUNDERS = {
    "floordiv": "floor_divide", "truediv": "true_divide", "mod": "remainder", "invert": "bitwise_not",
    "and": "bitwise_and", "or": "bitwise_or", "xor": "bitwise_xor",
    "lshift": "bitwise_left_shift", "rshift": "bitwise_right_shift",
}  # fmt: skip
# What an error calls an index into a traced value.
INDEX = "An index into it"
# The second operand decides which expression is built: a captured number is taken at its present value.
_FIXED_SECOND = ("pow", "float_power", "bitwise_left_shift", "bitwise_right_shift")
_IGNORED_OPTIONS = (
    "out",
    "inplace",
    "dtype",
    "device",
    "layout",
    "pin_memory",
    "requires_grad",
    "memory_format",
)


class Traced(Symbolic):
    """A number per (b, h, q_idx, kv_idx), or per row, or one captured number: an expression of the IR."""

    __slots__ = ("expr", "session")

    def __init__(self, expr: Expr, session: Session) -> None:
        self.expr = expr
        self.session = session

    def __repr__(self) -> str:
        return f"<traced {kind(self.expr)}>"

    def _operate(self, name: str, *args: Any) -> Any:
        return build(self.session, name, args, {})

    def element(self) -> Expr:
        return self.expr

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        return dispatch(func, args, kwargs or {})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name.endswith("_") or (
            name not in FUNCTIONS and not (self.session.rows and name in ROW_FUNCTIONS)
        ):
            raise UnknownMethod(
                operation=f".{name}", instead=_supported(self.session), location=self.session.location()
            )

        def method(*args: Any, **kwargs: Any) -> Any:
            return build(self.session, name, (self, *args), kwargs)

        return method

    # Python asks for a plain value: possible for captured numbers only.

    def __bool__(self) -> bool:
        value = self.session.concrete(self.expr, "branch")
        if value is None:
            raise ControlFlowOnTraced(kind=kind(self.expr)[2:].strip(), location=self.session.location())
        return bool(value)

    def __int__(self) -> int:
        return int(self._number("int()", "Use x.int(), which stays traced."))

    def __float__(self) -> float:
        advice = "Use x.float(), which stays traced, and torch's functions instead of math's: torch.exp, not math.exp."
        return float(self._number("float() or a function of math", advice))

    def __index__(self) -> int:
        advice = "range() and lists take plain ints; make a list a torch.tensor and index that."
        return operator.index(self._number("range() or an index of a list", advice))

    def __round__(self, digits: int | None = None) -> Any:
        return round(self._number("round()", "Use torch.round(x), which stays traced."), digits)

    def __iter__(self) -> Any:
        self._is_one_number("A loop over it")

    def __getitem__(self, _: Any) -> Any:
        self._is_one_number(INDEX)

    def __setitem__(self, _: Any, __: Any) -> None:
        self._is_one_number("An assignment to its elements")

    def __len__(self) -> int:
        return self._is_one_number("len()")

    def _is_one_number(self, call: str) -> Any:
        advice = "It is one number."
        if self.session.rows:
            advice = "Reduce a row with s.max(), s.sum() and so on; s.numel() counts its keys; torch.where chooses."
        raise NumberFromTraced(
            call=call, kind=_noun(self.expr), instead=advice, location=self.session.location()
        )

    def __format__(self, spec: str) -> str:
        value = self.session.concrete(self.expr, "text")
        return format(value, spec) if value is not None else repr(self)

    def __hash__(self) -> int:
        value = self.session.concrete(self.expr, "key")
        return hash(value) if value is not None else id(self)

    def item(self) -> Any:
        return self._number(".item()", "Keep the value traced.")

    def _number(self, call: str, instead: str) -> Any:
        value = self.session.concrete(self.expr, "number")
        if value is None:
            place = self.session.location()
            raise NumberFromTraced(call=call, kind=_noun(self.expr), instead=instead, location=place)
        return value

    # Methods whose name or meaning is not that of a function in FUNCTIONS.

    def float(self) -> Traced:
        return self._make(operations.to_float(self.expr))

    half = bfloat16 = double = float

    def int(self) -> Traced:
        return self._make(operations.to_int(self.expr))

    long = short = int

    def bool(self) -> Traced:
        return self._make(operations.to_bool(self.expr))

    def to(self, *args: Any, **kwargs: Any) -> Traced:
        """Casts to a kind: every floating dtype is the kernel's compute type, every integer type its 32-bit int."""
        for like in (*args, *kwargs.values()):
            dtype: Any = like.dtype if isinstance(like, Symbolic | torch.Tensor) else like
            if isinstance(dtype, torch.dtype):
                return self._make(_cast(self.expr, dtype))
        return self

    type = type_as = to

    def where(self, condition: Any, other: Any) -> Any:
        """self where condition holds, else other, as Tensor.where."""
        return build(self.session, "where", (condition, self, other), {})

    def new_full(self, size: Sequence[Any], fill_value: Any, **options: Any) -> Any:
        """A constant; `options["dtype"]` chooses its kind. Only size () is a number."""
        dtype = options.get("dtype") or self.dtype
        return self._make(_cast(lift(fill_value, self.session), dtype))

    def new_ones(self, size: Sequence[Any] = (), **options: Any) -> Any:
        return self.new_full(size, 1, **options)

    def new_zeros(self, size: Sequence[Any] = (), **options: Any) -> Any:
        return self.new_full(size, 0, **options)

    def new_tensor(self, data: Any, **options: Any) -> Any:
        return self.new_full((), data, **options)

    def get_reduce(self, reduction: str) -> Traced:
        """The reduction of a row's scores over the keys of the tile, inside OnlineFunc.online_fwd."""
        if reduction not in ("max", "min", "sum", "abssum"):
            raise UnknownReduction(kind=reduction, location=self.session.location())
        if "kv" not in self.expr.axes:
            raise WrongOperands(
                operation="get_reduce",
                expected="scores",
                got="a value per row",
                instead="It is reduced already.",
                location=self.session.location(),
            )
        x = operations.absolute(self.expr) if reduction == "abssum" else self.expr
        return self._make(Reduce("sum" if reduction == "abssum" else reduction, x, "kv"))

    def dim(self) -> Any:
        return 0

    @property
    def ndim(self) -> Any:
        return 0

    @property
    def shape(self) -> torch.Size:
        if self.session.rows and "kv" in self.expr.axes:
            self._is_one_number("The shape of a row")
        return torch.Size(())

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        return {DType.BOOL: torch.bool, DType.INT: torch.int32}.get(self.expr.dtype, torch.float32)

    def _make(self, expr: Expr) -> Traced:
        self.session.remember(expr)
        return Traced(expr, self.session)


def _noun(expr: Expr) -> str:
    return kind(expr).split(" ", 1)[1]


def _cast(expr: Expr, dtype: torch.dtype) -> Expr:
    if dtype is torch.bool:
        return operations.to_bool(expr)
    return operations.to_float(expr) if dtype.is_floating_point else operations.to_int(expr)


def lift(value: Any, session: Session) -> Expr:
    """The expression of anything that can stand beside a traced value in an operation."""
    if isinstance(value, Symbolic):
        return value.element()
    if isinstance(value, torch.Tensor):
        return lift_tensor(value, session)
    if isinstance(value, bool | numbers.Integral):
        return constant(value if isinstance(value, bool) else int(value))
    if isinstance(value, numbers.Real):
        return Const(float(value))
    raise WrongOperands(
        operation="An operation on a traced value",
        expected="numbers and traced values",
        got=type_name(value),
        instead="Turn it into a torch.tensor and index it.",
        location=session.location(),
    )


def lift_tensor(tensor: torch.Tensor, session: Session) -> Expr:
    """A scalar tensor: a constant made in the function, or a parameter that needs its gradient."""
    if tensor.ndim:
        raise WrongIndexCount(
            tensor="a tensor",
            rank=tensor.ndim,
            shape=tuple(tensor.shape),
            got=0,
            example="h" if tensor.ndim == 1 else "h, q_idx" if tensor.ndim == 2 else "h, q_idx, kv_idx",
            location=session.location(),
        )
    if tensor.requires_grad:
        return session.load(session.real_tensor(tensor), ())
    return constant(tensor.item())


def build(session: Session, name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """The traced result of torch's function `name`."""
    session = _live(session, args)
    if any(getattr(a, "ndim", 0) for a in args) and (vectors := _with_vectors(args)) is not None:
        return of_vectors(session, name, vectors, kwargs, build)
    if reduces_row(session, name, args):
        return _reduced(session, name, args, kwargs)
    values = [None if a is None else lift(a, session) for a in args]
    options = {
        k: v if v is None or isinstance(v, str) else lift(v, session)
        for k, v in kwargs.items()
        if k not in _IGNORED_OPTIONS
    }
    if name in _FIXED_SECOND and len(values) > 1 and isinstance(values[1], Expr):
        fixed = session.concrete(values[1], name)
        values[1] = values[1] if fixed is None else constant(fixed)
    try:
        expr = FUNCTIONS[name](*values, **options)
    except (WrongOperands, UnknownOperation) as error:
        raise type(error)(location=session.location(), **error.details) from None
    except TypeError as error:
        raise WrongOperands(
            operation=name,
            expected="what torch's does",
            got=f"these ({error})",
            instead="See the list of functions in the documentation.",
            location=session.location(),
        ) from None
    session.remember(expr)
    return Traced(expr, session)


def _with_vectors(args: Sequence[Any]) -> list[Any] | None:
    """The operands with rows of captured tensors as vectors; None where there is neither."""
    from attn_engine.frontend.views import TensorView

    rows = [a.as_vector() if isinstance(a, TensorView) and a.is_row else a for a in args]
    return rows if any(isinstance(a, Vector) for a in rows) else None


def _reduced(session: Session, name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """A reduction of a row; max and min over a dimension give torch's pair."""
    expr = reduced(session, name, lift(args[0], session), args[1:], kwargs)
    session.remember(expr)
    result = Traced(expr, session)
    return Extremum(result) if name in ("max", "min") and (len(args) > 1 or kwargs) else result


def _supported(session: Session) -> str:
    """What may be called instead."""
    rows = ", ".join(sorted(ROW_FUNCTIONS))
    return f"A row is reduced with {rows}. {_SUPPORTED}" if session.rows else _SUPPORTED


def _live(session: Session, args: Sequence[Any]) -> Session:
    """The session of a running trace among the operands; symbols made outside one have a session of their own."""
    if session.codes:
        return session
    return next((a.session for a in args if isinstance(a, Traced) and a.session.codes), session)


def dispatch(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Called by torch for any of its functions that got a traced value."""
    name = getattr(func, "__name__", str(func))
    session = _session_of((args, kwargs))
    name = name.strip("_") if name.startswith("__") else name
    name = _DUNDERS.get(name, name)
    if name == "getitem":
        from attn_engine.frontend.views import TensorView

        return TensorView(session, session.real_tensor(args[0]))[args[1]]
    if name not in FUNCTIONS and _with_vectors(args) is None and not reduces_row(session, name, args):
        module = getattr(func, "__module__", None) or "torch.Tensor"
        raise UnknownOperation(
            operation=f"{module}.{name}", instead=_supported(session), location=session.location()
        )
    return build(session, name, args, kwargs)


def _session_of(values: Any) -> Session:
    """The session of the first traced value inside nested arguments."""
    stack = [values]
    while stack:
        value = stack.pop(0)
        if isinstance(value, Symbolic):
            return value.session
        if isinstance(value, tuple | list):
            stack.extend(value)  # pyright: ignore[reportUnknownArgumentType]
        elif isinstance(value, dict):
            stack.extend(value.values())  # pyright: ignore[reportUnknownArgumentType]
    raise AssertionError("torch dispatched without a traced value")

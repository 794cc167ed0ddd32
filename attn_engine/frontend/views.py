"""Captured tensors inside a traced function: indexed with traced values they become loads."""

from __future__ import annotations

import numbers
from collections.abc import Callable
from typing import Any, cast

import torch

from attn_engine.errors import (
    IndexNotInteger,
    IndexOutOfRange,
    NumberFromTraced,
    UnknownCustomInput,
    UnknownMethod,
    UnknownOperation,
    WrongIndexCount,
)
from attn_engine.frontend.names import type_name
from attn_engine.frontend.operations import constant, kind
from attn_engine.frontend.session import CapturedTensor, Session, is_concrete
from attn_engine.frontend.symbolic import Symbolic
from attn_engine.frontend.traced import Traced, build, dispatch
from attn_engine.frontend.vectors import Vector, check_length
from attn_engine.ir.expr import Expr
from attn_engine.ir.ops import DType

_EXAMPLES = {1: "h", 2: "h, q_idx", 3: "h, q_idx, kv_idx", 4: "b, h, q_idx, kv_idx"}


class TensorView(Symbolic):
    """A captured tensor with some of its dimensions indexed; an element (`Traced`) once all of them are.

    Whatever does not involve traced values happens on the real tensor, and makes the trace opaque: its result is a new
    tensor that only running the function again can give.
    """

    __slots__ = ("indices", "session", "source")

    def __init__(
        self, session: Session, source: CapturedTensor, indices: tuple[Expr | None, ...] | None = None
    ) -> None:
        self.session = session
        self.source = source
        self.indices = indices if indices is not None else (None,) * source.rank

    def __repr__(self) -> str:
        return f"<tensor {self.source.label or 'without a name'} {self.source.sizes}>"

    @property
    def untouched(self) -> bool:
        return all(i is None for i in self.indices)

    @property
    def is_row(self) -> bool:
        """Whether one dimension is left of a tensor that is indexed with traced values."""
        given = [i for i in self.indices if i is not None]
        return self.ndim == 1 and any(not is_concrete(i, self.session) for i in given)

    def as_vector(self) -> Vector:
        """The numbers of the one dimension that is left. Raises VectorTooLong."""
        length = len(self)
        check_length(length, self.source.label or "tensor", self.session)
        return Vector(self.session, [self[i] for i in range(length)], build, self)

    def element(self) -> Expr:
        """The number that the view stands for without a further index. Raises WrongIndexCount."""
        if self.source.element is not None and self.untouched:
            return self._load(self.source.element).expr
        raise WrongIndexCount(
            tensor=self.source.label or "tensor",
            rank=self.source.rank,
            shape=self.source.sizes,
            got=sum(i is not None for i in self.indices),
            example=_EXAMPLES.get(self.source.rank, "..."),
            location=self.session.location(),
        )

    def _load(self, indices: tuple[Expr, ...]) -> Traced:
        expr = self.session.load(self.source, indices)
        self.session.remember(expr)
        return Traced(expr, self.session)

    def __getitem__(self, index: Any) -> Any:
        items = cast(tuple[Any, ...], index if isinstance(index, tuple) else (index,))
        if not any(isinstance(i, Symbolic) for i in items) and not all(_simple(i) for i in items):
            return self._real()[index]  # a slice, a mask, an index tensor: nothing traced in it
        filled = list(self.indices)
        open_dimensions = [d for d, i in enumerate(filled) if i is None]
        items = self._expand(items, len(open_dimensions))
        for dimension, item in zip(open_dimensions, items, strict=False):
            if not (isinstance(item, slice) and item == slice(None)):
                filled[dimension] = self._index(item, dimension)
        done = tuple(i for i in filled if i is not None)
        return (
            self._load(done)
            if len(done) == len(filled)
            else TensorView(self.session, self.source, tuple(filled))
        )

    def _expand(self, items: tuple[Any, ...], dimensions: int) -> tuple[Any, ...]:
        """`...` as the full slices that it stands for."""
        given = sum(i is not Ellipsis for i in items)
        if given > dimensions:
            raise WrongIndexCount(
                tensor=self.source.label or "tensor",
                rank=self.source.rank,
                shape=self.source.sizes,
                got=self.source.rank - dimensions + given,
                example=_EXAMPLES.get(self.source.rank, "..."),
                location=self.session.location(),
            )
        expanded: list[Any] = []
        for item in items:
            expanded += [slice(None)] * (dimensions - given) if item is Ellipsis else [item]
        return tuple(expanded)

    def _index(self, item: Any, dimension: int) -> Expr:
        name = self.source.label or "tensor"
        if isinstance(item, torch.Tensor) and item.ndim == 0:
            item = item.item()
        if isinstance(item, TensorView):
            item = Traced(item.element(), self.session)
        expr = item.expr if isinstance(item, Traced) else constant(int(item)) if _is_int(item) else None
        if expr is None or expr.dtype is not DType.INT:
            got = type_name(item) if expr is None else kind(expr)
            raise IndexNotInteger(tensor=name, got=got, location=self.session.location())
        return self._in_range(expr, dimension)

    def _in_range(self, expr: Expr, dimension: int) -> Expr:
        """A fixed index is checked against the size now, and again whenever either changes."""
        size = self._size(dimension)
        if size is None or not is_concrete(expr, self.session):
            return expr
        value = int(self.session.evaluate(expr))
        if not -size <= value < size:
            raise IndexOutOfRange(
                position=dimension,
                tensor=self.source.label or "tensor",
                index=value,
                size=size,
                location=self.session.location(),
            )
        if value < 0:
            self.session.concrete(expr, "index")
            self._guard_shape()
            return constant(value + size)
        if self.source.read is not None:
            read, session = self.source.read, self.session
            self.session.guard("index", lambda: 0 <= session.evaluate(expr) < read().shape[dimension], True)
        return expr

    def _size(self, dimension: int) -> int | None:
        size = self.source.sizes[dimension]
        return size if isinstance(size, int) else None

    def _guard_shape(self) -> None:
        read = self.source.read
        if read is not None:
            self.session.guard("shape", lambda: tuple(read().shape), tuple(read().shape))

    # What does not involve traced values.

    def _real(self) -> torch.Tensor:
        """The tensor itself, for operations on it as a whole."""
        if self.source.read is None:
            raise UnknownOperation(
                operation=f"An operation on all of custom input {self.source.label!r}",
                instead="Index it with the arguments, or do the operation before the call.",
                location=self.session.location(),
            )
        if not all(i is None or is_concrete(i, self.session) for i in self.indices):
            self.element()
        self.session.opaque = True
        chosen = tuple(slice(None) if i is None else int(self.session.evaluate(i)) for i in self.indices)
        return self.source.read()[chosen]

    def _operate(self, name: str, *args: Any) -> Any:
        if self.source.element is not None or any(_is_traced(a) for a in args):
            return build(self.session, name, args, {})
        first, *others = (real_value(a) for a in args)
        if not isinstance(first, torch.Tensor):
            first = torch.as_tensor(first)
        return getattr(torch, name)(first, *others)

    def __matmul__(self, other: Any) -> Any:
        return self._operate("matmul", self, other)

    def __rmatmul__(self, other: Any) -> Any:
        return self._operate("matmul", other, self)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        flat = [*args, *kwargs.values()]
        elements = any(isinstance(a, TensorView) and a.source.element is not None for a in flat)
        if elements or any(_is_traced(a) for a in flat):
            return dispatch(func, args, kwargs)
        return func(*(real_value(a) for a in args), **{k: real_value(v) for k, v in kwargs.items()})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if self.source.element is not None and self.untouched:
            return getattr(Traced(self.element(), self.session), name)
        if self.is_row:
            return getattr(self.as_vector(), name)
        if self.source.read is None:
            raise UnknownMethod(
                operation=f".{name} of a custom input",
                instead="Index it first.",
                location=self.session.location(),
            )
        return getattr(self._real(), name)

    @property
    def shape(self) -> torch.Size:
        return torch.Size(self._sizes())

    @property
    def ndim(self) -> int:
        return sum(i is None for i in self.indices)

    def dim(self) -> int:
        return self.ndim

    def size(self, dimension: int | None = None) -> Any:
        return self.shape if dimension is None else self.shape[dimension]

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.source.storage.value)

    @property
    def device(self) -> torch.device:
        return self.source.read().device if self.source.read else torch.device("cpu")

    def _sizes(self) -> list[int]:
        sizes = [size for size, i in zip(self.source.sizes, self.indices, strict=True) if i is None]
        if not all(isinstance(s, int) for s in sizes):
            raise UnknownMethod(
                operation=f".shape of custom input {self.source.label!r}",
                instead="Its sizes are known at the call only: give them as captured numbers.",
                location=self.session.location(),
            )
        self._guard_shape()
        return [int(s) for s in sizes]

    def __bool__(self) -> bool:
        return bool(self._plain_value("if"))

    def __float__(self) -> float:
        return float(self._plain_value("float()"))

    def __int__(self) -> int:
        return int(self._plain_value("int()"))

    def _plain_value(self, call: str) -> Any:
        if self.source.read is None:
            raise NumberFromTraced(
                call=call, kind="input", instead="Use torch.where.", location=self.session.location()
            )
        return self._real()

    def __iter__(self) -> Any:
        return (self[i] for i in range(len(self)))


def _simple(item: Any) -> bool:
    """An index that selects or keeps a whole dimension."""
    if isinstance(item, slice):
        return item == slice(None)
    return item is Ellipsis or isinstance(item, float) or _is_int(item)


def _is_int(item: object) -> bool:
    return isinstance(item, numbers.Integral) and item is not True and item is not False


def _is_traced(value: Any) -> bool:
    """Whether a value is another one for each pair, so that it cannot stand beside a real tensor."""
    if isinstance(value, TensorView):
        return value.is_row
    return isinstance(value, Vector) or (
        isinstance(value, Traced) and not is_concrete(value.expr, value.session)
    )


def real_value(value: Any) -> Any:
    """A plain tensor or number for the symbol of one; containers are searched."""
    if isinstance(value, TensorView):
        return value._real()  # pyright: ignore[reportPrivateUsage]
    if isinstance(value, Traced):
        return value.item()
    if isinstance(value, tuple | list):
        items = [real_value(v) for v in value]  # pyright: ignore[reportUnknownVariableType]
        return items if isinstance(value, list) else tuple(items)
    return value


class CustomInputs:
    """What a traced function gets as `custom_fwd_inputs`: symbols under `input_tensors`."""

    def __init__(self, views: dict[str, TensorView], session: Session) -> None:
        self.input_tensors = _Inputs(views, session)

    def __getitem__(self, name: str) -> TensorView:
        return self.input_tensors[name]


class _Inputs(dict[str, TensorView]):
    def __init__(self, views: dict[str, TensorView], session: Session) -> None:
        super().__init__(views)
        self._session = session

    def __missing__(self, name: str) -> TensorView:
        known = ", ".join(self) or "none"
        raise UnknownCustomInput(name=name, known=known, location=self._session.location())

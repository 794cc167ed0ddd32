"""Trace the mods of a linear attention: functions of one token's row of q, k or v, or of its decay or beta.

The front end calls the axis of a row "kv", as in a row of scores; here it is renamed to "d" (rows of q and k) or "dv".
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import CodeType
from typing import Any, cast

from attn_engine.errors import (
    AttnEngineError,
    Location,
    NumberFromTraced,
    UnknownOperation,
    WrongOperands,
    WrongParameters,
    definition_of,
)
from attn_engine.frontend.custom_io import CustomIO
from attn_engine.frontend.names import KernelNames, type_name
from attn_engine.frontend.operations import to_float
from attn_engine.frontend.session import CapturedTensor, Session
from attn_engine.frontend.trace import FunctionRun, Trace
from attn_engine.frontend.traced import INDEX, Traced, lift
from attn_engine.frontend.views import TensorView
from attn_engine.ir.expr import Const, Expr, Full, Reduce, Var, transform
from attn_engine.ir.linear import D_IDX, DV_IDX, T_IDX
from attn_engine.ir.ops import DType, Storage
from attn_engine.ir.program import BATCH, HEAD, ScalarFn
from attn_engine.linear_errors import MixesDimensions, MixesTokens, ModResult

Mod = Callable[..., Any]
PARAMETERS = "(x), (x, custom_io), (x, b, h, t) or (x, custom_io, b, h, t)"
# What torch calls on whole sequences, and what is meant by a dimension other than a token's row.
_ACROSS_TOKENS = frozenset(
    "cumsum cumprod cummax cummin roll flip diff shift narrow gather index_select conv1d sort argsort topk unfold "
    "cumulative_sum logcumsumexp flatten view reshape transpose permute unsqueeze squeeze".split()
)


@dataclass(frozen=True, slots=True)
class ModInputs:
    """What a mod may read beside its own argument: `inputs` by the names that custom_io.input_tensors has for them."""

    custom_io: CustomIO
    storages: Mapping[str, Storage]
    inputs: Mapping[str, Var]


def trace_mod(
    fn: Mod, what: str, row_axis: str, argument: Expr, inputs: ModInputs, names: KernelNames
) -> Trace:
    """The function of one token that `fn` is. row_axis: the axis of a row, "d" or "dv".

    argument: the symbol that it is called with. Raises WrongParameters, ModResult, MixesTokens, MixesDimensions and the
    tracing errors of the catalogue.
    """
    takes_custom, takes_position = _wanted(fn, what)
    other = "d" if row_axis == "dv" else "dv"
    fitting = {name: var for name, var in inputs.inputs.items() if other not in var.axes}
    run = _ModRun(fn, what, replace(inputs, inputs=fitting), names)
    positions = (BATCH, HEAD, T_IDX) if takes_position else ()
    try:
        trace = run.run(_renamed(argument, "kv", row_axis), takes_custom, positions)
    except (UnknownOperation, WrongOperands, NumberFromTraced) as error:
        if (told := _across_tokens(error, what)) is not None:
            raise told from None
        raise
    result = _renamed(trace.fn.result, row_axis)
    if other in result.axes:
        got = "both a row of q or k and a row of v" if row_axis in result.axes else "the other kind of row"
        raise MixesDimensions(mod=what, got=got, expected="its own row", location=run.session.returned_at)
    return replace(trace, fn=_with_renamed(trace.fn, result, row_axis))


class _ModRun(FunctionRun):
    """One trace of one mod."""

    def __init__(self, fn: Mod, what: str, inputs: ModInputs, names: KernelNames) -> None:
        self._what = what
        super().__init__(fn, inputs.custom_io, inputs.storages, names)
        self.session.rows = True
        own: dict[str, Any] = {
            name: Traced(_renamed(_renamed(var, "kv", "d"), "kv", "dv"), self.session)
            for name, var in inputs.inputs.items()
        }
        self.custom.input_tensors.update(own)

    def view(self, name: str, shape: tuple[str | int, ...], storages: Mapping[str, Storage]) -> TensorView:
        """A custom input; used without indices, its dimensions are batch, head, token, row, from the left."""
        storage = storages.get(name, Storage.FLOAT32)
        element = tuple(_index(size, place) for place, size in enumerate(shape)) if len(shape) <= 4 else None
        source = CapturedTensor(
            ("custom", name), name, storage, shape, None, custom_input=name, element=element
        )
        return TensorView(self.session, source)

    def run(self, argument: Expr, takes_custom: bool, positions: tuple[Var, ...]) -> Trace:
        custom = 1 if takes_custom else None
        return self.trace((argument, *positions), custom, self._result)

    def _result(self, returned: Any, session: Session, name: str) -> Expr:
        expected = "a number for each element of the row, computed from the arguments"
        if returned is None or isinstance(returned, bool | tuple | list | dict | str):
            got = "None (is a `return` missing?)" if returned is None else type_name(cast(object, returned))
            raise ModResult(mod=self._what, got=got, expected=expected, location=session.returned_at)
        expr = lift(returned, session)
        if expr.dtype is DType.BOOL:
            raise ModResult(mod=self._what, got="a bool", expected=expected, location=session.returned_at)
        return to_float(expr)


_POSITIONS: tuple[Var, ...] = (BATCH, HEAD, T_IDX, _row_index := Var("d_idx", DType.INT, ("kv",)))
_BY_NAME: dict[str, Var] = {
    "batch": BATCH, "heads": HEAD, "seq_len": T_IDX, "dimqk": _row_index, "dimv": _row_index
}  # fmt: skip


def _index(size: str | int, place: int) -> Expr:
    """What a dimension of a custom input is read at where no index is given."""
    if isinstance(size, str):
        return _BY_NAME.get(size, T_IDX)
    return Const(0) if size == 1 else _POSITIONS[place]


def _renamed(e: Expr, to: str, was: str = "kv") -> Expr:
    """`e` with one of its axes called otherwise."""

    def change(node: Expr) -> Expr | None:
        match node:
            case Var("d_idx" | "dv_idx", _, (axis,)) if axis == was:
                return {"d": D_IDX, "dv": DV_IDX}.get(to, _row_index)
            case Var(name, kind, spans) if was in spans:
                return Var(name, kind, tuple(to if a == was else a for a in spans))
            case Full(value, spans) if was in spans:
                return Full(value, tuple(to if a == was else a for a in spans))
            case Reduce(kind, x, axis) if axis == was:
                return Reduce(kind, x, to)
            case _:
                return None

    return transform(e, change)


def _with_renamed(fn: ScalarFn, result: Expr, row_axis: str) -> ScalarFn:
    names = {_renamed(e, row_axis): name for e, name in fn.names.items()}
    sources = {_renamed(e, row_axis): text for e, text in fn.sources.items()}
    return replace(fn, result=result, names=names, sources=sources)


def _wanted(fn: Any, what: str) -> tuple[bool, bool]:
    """Whether a mod takes the custom inputs, and b, h, t: by the number of its positional parameters."""
    if not callable(fn):
        got = f"{type_name(fn)}, which is not a function"
        raise WrongParameters(what=f"A {what}", expected=PARAMETERS, got=got)
    parameters = list(inspect.signature(fn).parameters.values())
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required = [p for p in positional if p.default is p.empty]
    keyword_only = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty]
    kinds = {1: (False, False), 2: (True, False), 4: (False, True), 5: (True, True)}
    if keyword_only or len(required) not in kinds:
        got = f"({', '.join(p.name for p in parameters)})"
        raise WrongParameters(what=f"A {what}", expected=PARAMETERS, got=got, location=_place(fn))
    return kinds[len(required)]


def _place(fn: Any) -> Location | None:
    code = getattr(fn, "__code__", None)
    return definition_of(code) if isinstance(code, CodeType) else None


def _across_tokens(error: AttnEngineError, what: str) -> MixesTokens | None:
    """The error of an operation that needs other tokens, where this is what went wrong."""
    operation = str(error.details.get("operation", ""))
    if error.details.get("call") == INDEX:
        reason = "its argument is one token's row, with no token to choose"
        return MixesTokens(mod=what, operation="an index", reason=reason, location=error.location)
    name = operation.strip(".()").rsplit(".", 1)[-1]
    if name in _ACROSS_TOKENS:
        reason = "a mod has one token's row at hand"
    elif "dim=" in str(error.details.get("got", "")):
        operation = f"{operation} with {error.details['got']}"
        reason = "the one dimension of a token's row is dim=-1"
    else:
        return None
    return MixesTokens(mod=what, operation=operation, reason=reason, location=error.location)

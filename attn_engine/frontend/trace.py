"""Run the user's function once on symbols, and keep what it computed and how to read what it captured."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from attn_engine.errors import (
    AttnEngineError,
    IndexedNumpyArray,
    Location,
    MaskIsNotBool,
    ReturnsTensor,
    ScoreIsBool,
    ScoreNotTraced,
    UnknownOperation,
    WrongOperands,
    WrongParameters,
    definition_of,
    location_of,
)
from attn_engine.frontend.capture import Rebuilder
from attn_engine.frontend.custom_io import CustomIO
from attn_engine.frontend.names import KernelNames, type_name
from attn_engine.frontend.operations import kind, to_float
from attn_engine.frontend.session import (
    READ_FAILURES,
    STORAGES,
    BoundScalar,
    BoundTensor,
    CapturedTensor,
    Guard,
    Session,
    guards_hold,
    number_kind,
)
from attn_engine.frontend.traced import Traced, lift
from attn_engine.frontend.vectors import Vector
from attn_engine.frontend.views import CustomInputs, TensorView
from attn_engine.ir.expr import Const, Expr, Var, loads, postorder, variables
from attn_engine.ir.ops import DType, Storage
from attn_engine.ir.program import BATCH, HEAD, KV_IDX, Q_IDX, SCORE, Captured, ScalarFn

ScoreMod = Callable[..., Any]
MaskMod = Callable[..., Any]

_SCORE_PARAMETERS = "(score, b, h, q_idx, kv_idx) or (score, custom_fwd_inputs, b, h, q_idx, kv_idx)"
_MASK_PARAMETERS = "(b, h, q_idx, kv_idx) or (b, h, q_idx, kv_idx, custom_fwd_inputs)"
_RANDOM = frozenset(
    "rand randn randint randperm normal bernoulli multinomial poisson binomial uniform random exponential geometric "
    "cauchy log_normal".split()
)
_DIMENSION_INDEX: dict[str | int, Expr] = {
    "batch": BATCH, "heads": HEAD, "seq_len": Q_IDX, "seq_len_kv": KV_IDX, 1: Const(0),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Trace:
    """A traced function and the ways back to what it captured.

    tensors, scalars: how to read the captured values of a call, in the order of `fn.captures` and `fn.scalars`; custom
    inputs are not among `tensors` but in `custom`: (name in the kernel, name in the CustomIO).
    opaque: the function reads things that cannot be watched; trace it again at every call.
    """

    fn: ScalarFn
    tensors: tuple[BoundTensor, ...]
    scalars: tuple[BoundScalar, ...]
    guards: tuple[Guard, ...]
    opaque: bool
    custom: tuple[tuple[str, str], ...] = ()

    def stale(self) -> bool:
        """Whether something the trace took for granted has changed, so that tracing again may give another program."""
        return captures_changed(self.tensors, self.scalars, self.guards)


def captures_changed(
    tensors: Iterable[BoundTensor], scalars: Iterable[BoundScalar], guards: Iterable[Guard]
) -> bool:
    """Whether a captured thing is gone, of another kind, or not what the trace has taken for granted."""
    try:
        for scalar in scalars:
            if number_kind(scalar.accessor()) is not scalar.var.kind:
                return True
        for tensor in tensors:
            now = tensor.accessor()
            if STORAGES.get(now.dtype) is not tensor.storage or now.ndim != tensor.rank:
                return True
    except READ_FAILURES:
        return True
    return not guards_hold(guards)


def trace_score_mod(
    fn: ScoreMod,
    custom_io: CustomIO | None = None,
    storages: Mapping[str, Storage] | None = None,
    names: KernelNames | None = None,
) -> Trace:
    """Trace score_mod(score, b, h, q_idx, kv_idx) or score_mod(score, custom_fwd_inputs, b, h, q_idx, kv_idx).

    storages: how the custom inputs lie, float32 where not given. names: pass one to all functions of an engine.
    Raises WrongParameters, ControlFlowOnTraced, ScoreIsBool and the other tracing errors of the catalogue.
    """
    run = FunctionRun(fn, custom_io or CustomIO(), storages or {}, names or KernelNames())
    takes_custom = _takes_custom(fn, 5, "A score_mod", _SCORE_PARAMETERS)
    position = 1 if takes_custom else None
    return run.trace((SCORE, BATCH, HEAD, Q_IDX, KV_IDX), position, _score_result)


def trace_mask_mod(
    fn: MaskMod,
    custom_io: CustomIO | None = None,
    storages: Mapping[str, Storage] | None = None,
    names: KernelNames | None = None,
) -> Trace:
    """Trace mask_mod(b, h, q_idx, kv_idx) or mask_mod(b, h, q_idx, kv_idx, custom_fwd_inputs); see trace_score_mod."""
    run = FunctionRun(fn, custom_io or CustomIO(), storages or {}, names or KernelNames())
    takes_custom = _takes_custom(fn, 4, "A mask_mod", _MASK_PARAMETERS)
    return run.trace((BATCH, HEAD, Q_IDX, KV_IDX), 4 if takes_custom else None, _mask_result)


def trace_plain_mask(fn: MaskMod) -> Trace:
    """Trace the mask_mod(b, h, q_idx, kv_idx) of a block mask, which is made without any custom inputs."""
    what, expected = "The mask_mod of a block mask", "(b, h, q_idx, kv_idx)"
    if _takes_custom(fn, 4, what, expected):
        raise WrongParameters(what=what, expected=expected, got="five parameters", location=_definition(fn))
    return trace_mask_mod(fn)


class FunctionRun:
    """One trace of one function."""

    def __init__(
        self, fn: Callable[..., Any], custom_io: CustomIO, storages: Mapping[str, Storage], names: KernelNames
    ) -> None:
        self.fn = fn
        self.session = Session(names=names)
        self.custom = CustomInputs(
            {name: self.view(name, shape, storages) for name, shape in custom_io.shapes.items()},
            self.session,
        )
        self.copy = Rebuilder(self.session, {id(custom_io): self.custom}).callable(fn)

    def view(self, name: str, shape: tuple[str | int, ...], storages: Mapping[str, Storage]) -> TensorView:
        known = all(size in _DIMENSION_INDEX for size in shape)
        element = tuple(_DIMENSION_INDEX[size] for size in shape) if known else None
        storage = storages.get(name, Storage.FLOAT32)
        source = CapturedTensor(
            ("custom", name), name, storage, shape, None, custom_input=name, element=element
        )
        return TensorView(self.session, source)

    def trace(
        self,
        inputs: tuple[Expr, ...],
        custom_position: int | None,
        convert: Callable[[Any, Session, str], Expr],
    ) -> Trace:
        arguments: list[Any] = [Traced(v, self.session) for v in inputs]
        if custom_position is not None:
            arguments.insert(custom_position, self.custom)
        with watching(self.session), tensors_expected(self.session):
            returned = self.copy(*arguments)
        name = _name_of(self.fn)
        return self._collect(name, convert(returned, self.session, name))

    def _collect(self, name: str, result: Expr) -> Trace:
        session = self.session
        used = list(dict.fromkeys(load.tensor for load in loads(result)))
        captures = tuple(Captured(n, session.tensors[n].storage, session.tensors[n].rank) for n in used)
        scalars = tuple(v for v in variables(result) if v in session.scalars)
        names, sources = names_and_sources(session, result)
        fn = ScalarFn(name, result, captures, scalars, names, sources)
        bound: list[BoundTensor] = []
        custom: list[tuple[str, str]] = []
        for kernel_name in used:
            tensor = session.tensors[kernel_name]
            if tensor.read is not None:
                bound.append(BoundTensor(kernel_name, tensor.storage, tensor.rank, tensor.read))
            else:
                custom.append((kernel_name, tensor.custom_input or kernel_name))
        numbers = tuple(session.scalars[v] for v in scalars)
        return Trace(fn, tuple(bound), numbers, tuple(session.guards), session.opaque, tuple(custom))


@contextmanager
def watching(session: Session) -> Any:
    """Collect the local variables of the user's functions as they return."""
    previous = sys.getprofile()

    def on_event(frame: FrameType, event: str, argument: Any) -> None:
        if event == "return" and frame.f_code in session.codes:
            session.returned_at = location_of(frame)
            for name, value in frame.f_locals.items():
                if isinstance(value, Traced) and not isinstance(value.expr, Var | Const):
                    session.locals.setdefault(value.expr, (name, frame.f_code))

    sys.setprofile(on_event)
    try:
        with _NoRandomness(session):
            yield
    finally:
        _profile_again(previous)


def _profile_again(previous: Any) -> None:
    """Put back what profiled before: a function, or a profiler in C (cProfile), which only it itself can start."""
    if previous is None or callable(previous):
        sys.setprofile(previous)
    else:
        sys.setprofile(None)
        previous.enable()


class _NoRandomness(TorchFunctionMode):
    """Refuses random numbers: drawn once, while tracing, they would be constants of the kernel."""

    def __init__(self, session: Session) -> None:
        super().__init__()
        self._session = session

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name.strip("_").removesuffix("_like") in _RANDOM:
            raise UnknownOperation(
                operation=f"torch's {name}",
                instead="The function runs once, not once per score: fill a tensor with random numbers before the "
                "call, capture it or pass it as a custom input, and index it.",
                location=self._session.location(),
            )
        return func(*args, **(kwargs or {}))


@contextmanager
def tensors_expected(session: Session) -> Any:
    """Give the complaints of torch and numpy about what they were given a place and an advice."""
    try:
        yield
    except IndexError as error:
        if "only integers, slices" not in str(error):
            raise
        raise IndexedNumpyArray(location=_raised_at(error, session)) from None
    except TypeError as error:
        if isinstance(error, AttnEngineError) or "must be Tensor, not" not in str(error):
            raise
        raise WrongOperands(
            operation=str(error).partition("(")[0],
            expected="tensors only",
            got="a plain number",
            instead="Use torch.clamp(x, min=...), torch.where, or torch.tensor(number).",
            location=_raised_at(error, session),
        ) from None


def _raised_at(error: BaseException, session: Session) -> Location | None:
    """The innermost line of the user's functions that an exception passed through."""
    found, trace = None, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code in session.codes:
            found = Location(
                trace.tb_frame.f_code.co_filename, trace.tb_lineno, trace.tb_frame.f_code.co_name
            )
        trace = trace.tb_next
    return found


def names_and_sources(session: Session, *results: Expr) -> tuple[dict[Expr, str], dict[Expr, str]]:
    """The user's name and source line for each node of the results that one of the user's variables held."""
    reachable = [n for n in postorder(*results) if n in session.locals]
    names = {n: session.locals[n][0] for n in reachable}
    sources = {n: text for n in (*reachable, *results) if (text := session.source_of(n))}
    return names, sources


def _score_result(returned: Any, session: Session, name: str) -> Expr:
    where = session.returned_at
    if isinstance(returned, TensorView) and returned.source.element is not None:
        returned = Traced(returned.element(), session)
    if isinstance(returned, Vector):
        returned.element()
    if isinstance(returned, torch.Tensor | TensorView):
        raise ReturnsTensor(what="A score_mod", shape=tuple(returned.shape), location=where)
    if not isinstance(returned, Traced) or returned.expr in session.scalars:
        got = "None (is a `return` missing?)" if returned is None else _describe(returned)
        raise ScoreNotTraced(got=got, location=where)
    if returned.expr.dtype is DType.BOOL:
        raise ScoreIsBool(location=where)
    return to_float(returned.expr)


def _mask_result(returned: Any, session: Session, name: str) -> Expr:
    where = session.returned_at
    if isinstance(returned, TensorView) and returned.source.element is not None:
        returned = Traced(returned.element(), session)
    if isinstance(returned, Vector):
        returned.element()
    if isinstance(returned, torch.Tensor | TensorView) and returned.ndim:
        raise ReturnsTensor(what="A mask_mod", shape=tuple(returned.shape), location=where)
    if not isinstance(returned, bool | torch.Tensor | Traced):
        got = "None (is a `return` missing?)" if returned is None else _describe(returned)
        raise MaskIsNotBool(got=got, location=where)
    expr = lift(returned, session)
    if expr.dtype is not DType.BOOL:
        raise MaskIsNotBool(got=kind(expr), location=where)
    return expr


def _describe(value: Any) -> str:
    if isinstance(value, Traced):
        return f"{kind(value.expr)} that does not depend on them"
    return (
        f"the {type(value).__name__} {value!r}" if isinstance(value, int | float | str) else type_name(value)
    )


def _name_of(fn: Any) -> str:
    while hasattr(fn, "func"):
        fn = fn.func
    name = getattr(fn, "__name__", type(fn).__name__)
    return "lambda_" if name == "<lambda>" else name


def _takes_custom(fn: Any, plain: int, what: str, expected: str) -> bool:
    """Whether the function wants the custom inputs too: by the number of its positional parameters."""
    if not callable(fn):
        raise WrongParameters(what=what, expected=expected, got=f"{type_name(fn)}, which is not a function")
    try:
        parameters = inspect.signature(fn).parameters.values()
    except ValueError:
        return False
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required = [p for p in positional if p.default is p.empty]
    keyword_only = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty]
    most = sys.maxsize if any(p.kind is p.VAR_POSITIONAL for p in parameters) else len(positional)
    if not keyword_only and len(required) <= plain <= most:
        return False
    if not keyword_only and len(required) == plain + 1 <= most:
        return True
    names = ", ".join([p.name for p in positional] + [f"{n} (by keyword)" for n in keyword_only])
    raise WrongParameters(what=what, expected=expected, got=f"({names})", location=_definition(fn))


def _definition(fn: Any) -> Location | None:
    while hasattr(fn, "func"):
        fn = fn.func
    code = getattr(fn, "__code__", None) or getattr(type(fn).__call__, "__code__", None)
    return definition_of(code) if isinstance(code, CodeType) else None


__all__ = ["MaskMod", "ScoreMod", "Trace", "trace_mask_mod", "trace_plain_mask", "trace_score_mod"]

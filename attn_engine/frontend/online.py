"""Normalisers in the user's words: how a row of scores becomes weights, one tile of keys at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import CodeType
from typing import Any, cast

from attn_engine.errors import (
    AttnEngineError,
    NotAnOnlineFunc,
    OnlineMethodMissing,
    OnlineStateMismatch,
    OnlineWrongResult,
    RuleNotDerivable,
    UnknownRowValue,
    definition_of,
)
from attn_engine.frontend.capture import codes_of
from attn_engine.frontend.names import KernelNames, type_name
from attn_engine.frontend.online_func import OnlineFunc, RuleTrace
from attn_engine.frontend.operations import to_float
from attn_engine.frontend.row_function import RowFunction, trace_row_function
from attn_engine.frontend.rule_guards import initial_number, watch_captures
from attn_engine.frontend.session import Session
from attn_engine.frontend.trace import names_and_sources, watching
from attn_engine.frontend.traced import Traced, lift
from attn_engine.ir.expr import Expr
from attn_engine.ir.passes.check_rule import part_rows
from attn_engine.ir.passes.derive_rule import Given, complete_rule
from attn_engine.ir.passes.row_form import NotDerivable
from attn_engine.ir.passes.try_rule import forward_roots
from attn_engine.ir.program import (
    BATCH,
    D_PROBS,
    DELTA,
    HEAD,
    KV_IDX,
    LOGIT,
    OUT,
    PROBS,
    Q_IDX,
    OnlineRule,
    RowState,
    saved_var,
)  # fmt: skip

Rows = dict[str, Any]


def trace_online(func: OnlineFunc | type[OnlineFunc], names: KernelNames | None = None) -> RuleTrace:
    """The rule that an online function's methods describe.

    Raises OnlineMethodMissing, OnlineWrongResult, OnlineStateMismatch, RuleNotDerivable and the tracing errors.
    """
    made = cast(object, func() if isinstance(func, type) else func)
    if not isinstance(made, OnlineFunc):
        raise NotAnOnlineFunc(got=type_name(made))
    if isinstance(made, RowFunction):
        return trace_row_function(made, names or KernelNames())
    trace = _OnlineTrace(made, names or KernelNames())
    rule = trace.rule()
    watch_captures(trace.func, trace.session)
    return RuleTrace(rule, tuple(trace.session.guards), trace.session.opaque)


def given_methods(func: OnlineFunc | type[OnlineFunc]) -> tuple[str, ...]:
    """Which of forward, backward and combine the user has written."""
    made = func() if isinstance(func, type) else func
    optional = ("forward", "backward", "combine")
    return tuple(m for m in optional if getattr(made, m, None) is not None)


def trace_combine(func: OnlineFunc | type[OnlineFunc], rule: OnlineRule) -> Expr | None:
    """The factors that `combine(final_rowscales)` gives to the parts' outputs; their axis is "kv". None without it."""
    made = func() if isinstance(func, type) else func
    if getattr(made, "combine", None) is None:
        return None
    trace = _OnlineTrace(made, KernelNames())
    rows = {n: Traced(part_rows(n), trace.session) for n, _ in rule.saved}
    return trace.lifted("combine", trace.called("combine", _RowValues(rows, trace, "final_rowscales")))


class _OnlineTrace:
    """One trace of an OnlineFunc's methods."""

    def __init__(self, func: OnlineFunc, names: KernelNames) -> None:
        self.func = func
        self.name = type(func).__name__
        self.session = Session(names=names, tensors_allowed=False)
        self.states = {
            user: RowState(names.assign(("state", self.name, user), user, row=True), initial_number(value))
            for user, value in func.online_rowscales.items()
        }
        self.final = dict.fromkeys(func.final_rowscales)

    def rule(self) -> OnlineRule:
        weights, new_states, out_scale = self._step()
        output, saved = self._epilogue()
        given = Given(*self._backward(saved))
        rule = OnlineRule(
            self.name, tuple(self.states.values()), weights, new_states, out_scale, output,
            tuple(saved.items()), PROBS if given.recompute is None else given.recompute,
            PROBS if given.gradient is None else given.gradient,
        )  # fmt: skip
        if given.recompute is None or given.gradient is None:
            rule = self._completed(rule, given)
        roots = (*forward_roots(rule), rule.recompute, rule.gradient)
        names, sources = names_and_sources(self.session, *roots)
        return replace(rule, names={**rule.names, **names}, sources={**rule.sources, **sources})

    def _completed(self, rule: OnlineRule, given: Given) -> OnlineRule:
        """The rule with the methods that the class leaves out."""
        try:
            return complete_rule(rule, given, self.session.names.taken)
        except NotDerivable as why:
            pairs = (("forward", given.recompute), ("backward", given.gradient))
            missing = " and ".join(name for name, expr in pairs if expr is None)
            raise RuleNotDerivable(
                rule=self.name, reason=str(why), method=missing, location=self._where()
            ) from None

    def _method(self, method: str) -> Callable[..., Any] | None:
        found = getattr(self.func, method, None)
        code = getattr(found, "__code__", None)
        if isinstance(code, CodeType):
            self.session.codes.update(codes_of(code))
        return found

    def called(self, method: str, *arguments: Any) -> Any:
        found = self._method(method)
        if found is None:
            raise OnlineMethodMissing(rule=self.name, method=method, location=self._where())
        with watching(self.session):
            return found(*(Traced(a, self.session) if isinstance(a, Expr) else a for a in arguments))

    def _step(self) -> tuple[Expr, tuple[Expr, ...], Expr]:
        returned = self.called("online_fwd", LOGIT, self._rows(), BATCH, HEAD, Q_IDX)
        weights, states, scale = self._parts("online_fwd", returned, 3, "(scores, new row values, o_scale)")
        if states.keys() != self.states.keys():
            self._mismatch("online_fwd", states, self.states)
        new = tuple(self._row("online_fwd", f"row value {n!r}", states[n]) for n in self.states)
        return self.lifted("online_fwd", weights), new, self._row("online_fwd", "o_scale", scale)

    def _epilogue(self) -> tuple[Expr, dict[str, Expr]]:
        returned = self.called("online_fwd_epilogue", OUT, self._rows(), BATCH, HEAD, Q_IDX)
        output, final = self._parts("online_fwd_epilogue", returned, 2, "(o, final row values)")
        if self.final and final.keys() != self.final.keys():
            self._mismatch("online_fwd_epilogue", final, self.final)
        saved = {n: self._row("online_fwd_epilogue", f"row value {n!r}", final[n]) for n in final}
        return self.lifted("online_fwd_epilogue", output), saved

    def _backward(self, saved: dict[str, Expr]) -> tuple[Expr | None, Expr | None]:
        """What forward and backward give; None for those that the class leaves out."""
        values = {n: Traced(saved_var(n), self.session) for n in saved}
        first, second = (_RowValues(values, self, "final_rowscales") for _ in range(2))
        where = (BATCH, HEAD, Q_IDX, KV_IDX)
        recompute = gradient = None
        if self._method("forward") is not None:
            recompute = self.lifted("forward", self.called("forward", LOGIT, first, *where))
        if self._method("backward") is not None:
            found = self.called("backward", D_PROBS, PROBS, second, DELTA, *where)
            gradient = self.lifted("backward", found)
        return recompute, gradient

    def _rows(self) -> Rows:
        rows = {user: Traced(state.var, self.session) for user, state in self.states.items()}
        return _RowValues(rows, self, "online_rowscales")

    def _parts(self, method: str, returned: Any, count: int, expected: str) -> tuple[Any, ...]:
        parts: tuple[Any, ...] = ()
        if isinstance(returned, tuple | list):
            parts = tuple(cast(Sequence[Any], returned))
        if len(parts) != count or not isinstance(parts[1], dict):
            self._wrong(method, _describe(returned), expected)
        return parts

    def lifted(self, method: str, value: Any) -> Expr:
        try:
            return to_float(lift(value, self.session))
        except AttnEngineError:
            return self._wrong(method, type_name(value), "a traced value")

    def _row(self, method: str, what: str, value: Any) -> Expr:
        expr = self.lifted(method, value)
        if not set(expr.axes) <= {"q"}:
            self._wrong(
                method, f"{what} that still differs between keys", "one value per row: see get_reduce"
            )
        return expr

    def _wrong(self, method: str, got: str, expected: str) -> Any:
        where = self.session.returned_at
        raise OnlineWrongResult(rule=self.name, method=method, got=got, expected=expected, location=where)

    def _mismatch(self, method: str, got: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
        raise OnlineStateMismatch(
            rule=self.name,
            method=method,
            got=sorted(got),
            expected=sorted(expected),
            location=self.session.returned_at,
        )

    def _where(self) -> Any:
        code = getattr(type(self.func).__dict__.get("online_fwd"), "__code__", None)
        code = code or getattr(getattr(self.func, "online_fwd", None), "__code__", None)
        return definition_of(code) if isinstance(code, CodeType) else None


class _RowValues(dict[str, Any]):
    """What a method gets as row values: symbols by name."""

    def __init__(self, rows: Mapping[str, Any], trace: _OnlineTrace, declared: str) -> None:
        super().__init__(rows)
        self._trace, self._declared = trace, declared

    def __missing__(self, name: object) -> Any:
        raise UnknownRowValue(
            name=name,
            rule=self._trace.name,
            known=", ".join(self) or "none",
            declared=self._declared,
            location=self._trace.session.location(),
        )


def _describe(returned: Any) -> str:
    """What a method has returned, for a message: the types of a tuple's parts."""
    if isinstance(returned, tuple | list):
        parts = cast(Sequence[Any], returned)
        return f"{len(parts)} values ({', '.join(_describe_part(p) for p in parts)})"
    return "None (is a `return` missing?)" if returned is None else _describe_part(returned)


def _describe_part(part: Any) -> str:
    if isinstance(part, Traced):
        return "a traced value"
    return "a dict" if isinstance(part, dict) else type_name(cast(object, part))

"""`@online`: a normaliser as a plain function from a row of scores to a row of weights."""

from __future__ import annotations

import copy
import functools
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from attn_engine.errors import (
    AttnEngineError,
    Location,
    RowFunctionNotDerivable,
    RowFunctionResult,
    UnorderedReduction,
    WrongParameters,
    definition_of,
)
from attn_engine.frontend.capture import Rebuilder
from attn_engine.frontend.names import KernelNames, type_name
from attn_engine.frontend.online_func import OnlineFunc, RuleTrace
from attn_engine.frontend.operations import to_float
from attn_engine.frontend.session import BoundTensor, Session
from attn_engine.frontend.trace import tensors_expected, watching
from attn_engine.frontend.traced import Traced, lift
from attn_engine.ir.expr import Expr, Full, Load, Reduce, Var, postorder
from attn_engine.ir.passes.derive_row_function import RowDefinition, derive_row_function
from attn_engine.ir.passes.row_form import NotDerivable, NotOrdered
from attn_engine.ir.program import BATCH, HEAD, LOGIT, Q_IDX, Captured, OnlineRule

_PARAMETERS = "a row of scores, and b, h, q_idx by these names where it wants them"
_WHERE: dict[str, Expr] = {"b": BATCH, "h": HEAD, "q_idx": Q_IDX}


class RowFunction(OnlineFunc):
    """A row function as a normaliser. Called with a tensor, it is the function."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        functools.update_wrapper(cast(Any, self), function)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> RowFunction:
        return RowFunction(copy.deepcopy(self.function, memo))

    def __reduce__(self) -> Any:
        found: Any = sys.modules.get(getattr(self, "__module__", ""))
        name: str = getattr(self, "__qualname__", "")
        for part in name.split("."):
            found = getattr(found, part, None)
        return name if found is self else (online, (self.function,))


def online(function: Callable[..., Any]) -> RowFunction:
    """Make a normaliser of a function from a row of scores to a row of weights: give it as `online_func`.

    function(s), or with b, h, q_idx among its parameters: `s` is one row, reduced with s.max(), s.sum(), s.mean() and
    so on, over the keys that the mask keeps. It returns the weights, or (weights, {"name": value}): further values per
    row, which calls with return_final_rowscales=True hand out. Numbers and tensors that it captures are read at every
    call, and floating tensors that require it get gradients.

    Raises WrongParameters for what is not such a function; the engine raises the tracing errors, RowFunctionResult and
    UnorderedReduction.

    >>> import torch
    >>> @online
    ... def softmax(s):
    ...     p = torch.exp(s - s.max())
    ...     return p / p.sum()
    >>> softmax(torch.zeros(4))
    tensor([0.2500, 0.2500, 0.2500, 0.2500])
    """
    if not callable(function) or isinstance(function, type):
        got = f"{type_name(function)}, which is not a function"
        raise WrongParameters(what="A row function", expected=_PARAMETERS, got=got)
    _positions(function)
    return RowFunction(function)


def _positions(function: Callable[..., Any]) -> list[str]:
    """Which of b, h and q_idx the function takes."""
    parameters = list(inspect.signature(function).parameters.values())
    first, others = parameters[:1], parameters[1:]
    takes_row = bool(first) and first[0].kind in (
        inspect.Parameter.POSITIONAL_ONLY,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
    )
    needed = [p.name for p in others if p.default is p.empty and p.name not in _WHERE]
    if not takes_row or needed:
        got = f"({', '.join(p.name for p in parameters)})"
        code = getattr(function, "__code__", None)
        place = None if code is None else definition_of(code)
        raise WrongParameters(what="A row function", expected=_PARAMETERS, got=got, location=place)
    return [p.name for p in others if p.name in _WHERE]


def trace_row_function(func: RowFunction, names: KernelNames) -> RuleTrace:
    """The rule of a row function. Raises the errors that `online` names."""
    return _RowTrace(func, names).trace()


class _RowTrace:
    """One trace of a row function."""

    def __init__(self, func: RowFunction, names: KernelNames) -> None:
        self.function = func.function
        name = getattr(self.function, "__name__", type(self.function).__name__)
        self.name = "row_function" if name == "<lambda>" else name
        self.session = Session(names=names, rows=True)

    def trace(self) -> RuleTrace:
        weights, outputs = self._run()
        rule = self._rule(weights, outputs)
        session = self.session
        tensors = tuple(
            BoundTensor(c.name, c.storage, c.rank, read)
            for c in rule.captures
            if (read := session.tensors[c.name].read) is not None
        )
        scalars = tuple(session.scalars[v] for v in rule.scalars)
        return RuleTrace(rule, tuple(session.guards), session.opaque, tensors, scalars)

    def _run(self) -> tuple[Expr, dict[str, Expr]]:
        session = self.session
        function = Rebuilder(session, {}).callable(self.function)
        where = {name: Traced(_WHERE[name], session) for name in _positions(self.function)}
        with watching(session), tensors_expected(session):
            returned = function(Traced(LOGIT, session), **where)
        outputs: Mapping[Any, Any] = {}
        if isinstance(returned, tuple | list):
            parts = tuple(cast("Sequence[Any]", returned))
            if len(parts) != 2 or not isinstance(parts[1], dict):
                self._wrong(f"{len(parts)} values", "weights, or weights and a dict of row values")
            returned, outputs = parts
        weights = self._lifted("the weights", returned)
        if "kv" not in weights.axes:
            self._wrong("one value, not a row", "a weight for each key")
        return weights, {self._fit(n): self._row(n, value) for n, value in outputs.items()}

    def _lifted(self, what: str, value: Any) -> Expr:
        try:
            return to_float(lift(value, self.session))
        except AttnEngineError:
            got = "None (is a `return` missing?)" if value is None else f"{type_name(value)} for {what}"
            return self._wrong(got, "a value computed from the scores")

    def _row(self, name: str, value: Any) -> Expr:
        expr = self._lifted(f"row value {name!r}", value)
        if "kv" in expr.axes:
            self._wrong(f"a row for row value {name!r}", "one value: reduce it, for example with .sum()")
        return expr

    def _fit(self, name: Any) -> str:
        if not isinstance(name, str) or not name.isidentifier() or name.startswith("d_"):
            self._wrong(f"a row value named {name!r}", "a name like `entropy`")
        if name in self.session.tensors or any(name == v.name for v in self.session.scalars):
            self._wrong(f"a row value named {name!r} like something captured", "another name")
        return name

    def _wrong(self, got: str, expected: str) -> Any:
        place = self.session.returned_at
        raise RowFunctionResult(rule=self.name, got=got, expected=expected, location=place)

    def _rule(self, weights: Expr, outputs: dict[str, Expr]) -> OnlineRule:
        session, roots = self.session, (weights, *outputs.values())
        names = self._names(roots, outputs)
        reserved = frozenset(n for n in outputs if session.names.assign(("row output", n), n, row=True) != n)
        reads = dict.fromkeys(n.tensor for n in postorder(*roots) if isinstance(n, Load))
        definition = RowDefinition(
            self.name,
            weights,
            tuple(outputs.items()),
            names,
            session.names.taken,
            reserved,
            tuple(
                (n, session.locals[n][0], session.source_of(n))
                for n in postorder(*roots)
                if n in session.locals
            ),
            tuple(Captured(n, session.tensors[n].storage, session.tensors[n].rank) for n in reads),
            tuple(v for v in postorder(*roots) if isinstance(v, Var) and v in session.scalars),
        )
        try:
            return derive_row_function(definition)
        except NotOrdered as unordered:
            place, kind = self._line_of(unordered.reduction), _KIND[unordered.reduction.kind]
            raise UnorderedReduction(rule=self.name, kind=kind, location=place) from None
        except NotDerivable as why:
            place = session.returned_at
            raise RowFunctionNotDerivable(rule=self.name, reason=str(why), location=place) from None

    def _names(self, roots: tuple[Expr, ...], outputs: dict[str, Expr]) -> tuple[tuple[Reduce, str], ...]:
        """A name for every reduction: its row output's, the user's variable, or what is reduced and how."""
        by_output = {e: n for n, e in outputs.items()}
        found: list[tuple[Reduce, str]] = []
        for node in postorder(*roots):
            if isinstance(node, Reduce):
                wanted = by_output.get(node) or self._local(node)
                base = self._local(node.x)
                wanted = wanted or (f"{base}_{node.kind}" if base else _unnamed(node))
                wanted = f"row_{wanted}" if wanted.startswith("d_") else wanted
                key = ("row output", wanted) if node in by_output else ("reduction", node)
                found.append((node, self.session.names.assign(key, wanted, node, row=True)))
        return tuple(found)

    def _local(self, node: Expr) -> str | None:
        return self.session.locals[node][0] if node in self.session.locals else None

    def _line_of(self, node: Expr) -> Location | None:
        if node not in self.session.lines:
            return self.session.returned_at
        path, line = self.session.lines[node]
        return Location(path, line, self.name)


def _unnamed(node: Reduce) -> str:
    return "row_count" if isinstance(node.x, Full) else f"row_{node.kind}"


_KIND = {"max": "maximum", "min": "minimum", "sum": "sum"}

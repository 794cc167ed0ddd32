"""Reductions of a row inside a row function: s.max(), p.sum(), torch.logsumexp(s, -1), under torch's names.

A row is one-dimensional here; `dim` may be given as 0 or -1, `keepdim` changes nothing. Keys that the mask hides are
not part of the row.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from attn_engine.errors import WrongOperands
from attn_engine.frontend import operations
from attn_engine.frontend.session import Session
from attn_engine.ir.expr import Const, Expr, Full, Reduce, call
from attn_engine.ir.ops import DType, Op
from attn_engine.ir.program import LOGIT


class Extremum(NamedTuple):
    """What torch's max and min over a dimension give; there is no index here."""

    values: Any
    indices: Any = None


def largest(x: Expr) -> Expr:
    return Reduce("max", x, "kv")


def smallest(x: Expr) -> Expr:
    return Reduce("min", x, "kv")


def total(x: Expr) -> Expr:
    return Reduce("sum", x, "kv")


def count(_: Expr) -> Expr:
    """The number of keys that the row sees."""
    return total(ones(_))


def ones(_: Expr) -> Expr:
    """One for each key."""
    return Full(1.0, LOGIT.axes)


def mean(x: Expr) -> Expr:
    return total(x) / count(x)


def sum_of_exponentials(x: Expr) -> tuple[Expr, Expr, Expr]:
    """The maximum, exp(x - maximum), and its sum."""
    top = largest(x)
    powers = operations.exp(x - top)
    return top, powers, total(powers)


def logsumexp(x: Expr) -> Expr:
    top, _, below = sum_of_exponentials(x)
    return top + operations.log(below)


def softmax(x: Expr) -> Expr:
    _, powers, below = sum_of_exponentials(x)
    return powers / below


def log_softmax(x: Expr) -> Expr:
    top, _, below = sum_of_exponentials(x)
    return x - top - operations.log(below)


def variance(x: Expr, correction: float = 1) -> Expr:
    off = x - mean(x)
    return total(off * off) / (count(x) - float(correction))


def deviation(x: Expr, correction: float = 1) -> Expr:
    return operations.sqrt(variance(x, correction))


def norm(x: Expr, p: float = 2) -> Expr:
    """The p-norm of the row; p is a number."""
    size = operations.absolute(x)
    if p == math.inf:
        return largest(size)
    if p == 1:
        return total(size)
    if p == 2:
        return operations.sqrt(total(x * x))
    return operations.power(total(operations.power(size, Const(float(p)))), Const(1.0 / p))


ROW_FUNCTIONS: dict[str, Callable[..., Expr]] = {
    "max": largest,
    "min": smallest,
    "amax": largest,
    "amin": smallest,
    "sum": total,
    "mean": mean,
    "numel": count,
    "ones_like": ones,
    "logsumexp": logsumexp,
    "softmax": softmax,
    "log_softmax": log_softmax,
    "var": variance,
    "std": deviation,
    "norm": norm,
    "linalg_vector_norm": norm,
}
_FIRST_OPTION = {
    "norm": "p",
    "linalg_vector_norm": "p",
}  # what a second argument is, where it is not the dimension
_OPTIONS = {"var": ("correction",), "std": ("correction",), "norm": ("p",), "linalg_vector_norm": ("p",)}


def reduces_row(session: Session, name: str, args: Sequence[Any]) -> bool:
    """Whether a call of torch's function `name` is a reduction of a row; max and min of two values are not."""
    if not session.rows or name not in ROW_FUNCTIONS:
        return False
    return name not in ("max", "min") or len(args) == 1 or (len(args) == 2 and isinstance(args[1], int))


def reduced(session: Session, name: str, x: Expr, args: Sequence[Any], options: dict[str, Any]) -> Expr:
    """The reduction of x. args, options: what follows the row in the call. Raises WrongOperands."""
    given = dict(options)
    given |= dict(zip((_FIRST_OPTION.get(name, "dim"), "keepdim"), args, strict=False))
    if "ord" in given:
        given["p"] = given.pop("ord")
    for ignored in ("keepdim", "dtype", "_stacklevel"):
        given.pop(ignored, None)
    dim = given.pop("dim", given.pop("axis", None))
    unknown = set(given) - set(_OPTIONS.get(name, ()))
    if dim not in (None, 0, -1, (0,), (-1,), [0], [-1]) or unknown:
        raise WrongOperands(
            operation=f".{name}",
            expected="the one dimension of a row, dim=-1",
            got=f"{', '.join(sorted(unknown)) or f'dim={dim}'}",
            instead="A row function sees one row of scores.",
            location=session.location(),
        )
    if not all(isinstance(v, numbers.Real) for v in given.values()):
        raise WrongOperands(
            operation=f".{name}",
            expected=f"a plain number for {', '.join(given)}",
            got="a traced value",
            instead="Write the power or the correction as a number.",
            location=session.location(),
        )
    if "kv" not in x.axes:
        raise WrongOperands(
            operation=f".{name}()",
            expected="a row, with a value for each key",
            got="one value",
            instead="It is reduced already.",
            location=session.location(),
        )
    return ROW_FUNCTIONS[name](x if x.dtype is DType.FLOAT else call(Op.TO_FLOAT, x), **given)

"""Expressions on plain Python numbers: what the IR means, with no tensor library in the way."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from attn_engine.ir.expr import Call, Cast, Const, Dot, Expr, Full, Load, Reduce, Var, postorder
from attn_engine.ir.ops import INFO, Number

LoadElement = Callable[[str, tuple[int, ...]], Number]


Environment = Mapping[Expr, Number] | Mapping[str, Number]


def evaluate(expr: Expr, environment: Environment, load: LoadElement | None = None) -> Number:
    """The value of `expr` at one point of its axes.

    environment: the value of each variable, by its name or by its node; other nodes may have a value there too.
    load(tensor, indices): the element of a tensor. Rounding to a storage type (`Cast`) does nothing here.
    Raises KeyError for a variable without a value and TypeError for nodes that need a whole axis (Dot, Reduce).
    """
    named = {key: value for key, value in environment.items() if isinstance(key, str)}
    values: dict[Expr, Number] = {key: value for key, value in environment.items() if isinstance(key, Expr)}
    for node in postorder(expr):
        if isinstance(node, Var) and node.name in named:
            values.setdefault(node, named[node.name])
        elif node not in values:
            values[node] = _value(node, values, load)
    return values[expr]


def _value(node: Expr, values: Mapping[Expr, Number], load: LoadElement | None) -> Number:
    match node:
        case Const(value) | Full(value):
            return value
        case Call(op, args):
            return INFO[op].evaluate(*(values[a] for a in args))
        case Cast(x):
            return values[x]
        case Load(tensor, _, indices):
            if load is None:
                raise TypeError(f"{tensor} is read, and no `load` was given")
            return load(tensor, tuple(int(values[i]) for i in indices))
        case Dot() | Reduce():
            raise TypeError(f"{type(node).__name__} needs a whole axis, not one point of it")
        case _:
            raise KeyError(node)

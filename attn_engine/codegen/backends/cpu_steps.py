"""What the C++ spelling of loops and of a row's steps asks of them beforehand: which bodies are steps, how long
rows are, which products are only summed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from attn_engine.codegen.lower.nests import Branch, Item, Nest, Sweep
from attn_engine.codegen.lower.steps import Step, name_made, names_read, stored_by_column
from attn_engine.ir.expr import Call, Expr, Load, Reduce, Var, postorder, variables
from attn_engine.ir.ops import Op
from attn_engine.ir.tile import Accumulate, If, Let, Loop, StoreTile, expressions, walk


def is_long(n: Nest) -> bool:
    """Whether a row reads or adds at so many places that unrolled rows would take long to compile."""
    lets = (s for s in n.steps if isinstance(s, Let | StoreTile | Accumulate))
    found = {e for s in lets for e in postorder(*expressions(s))}
    places = sum(isinstance(e, Load) and len(e.axes) > 0 for e in found)
    return places + sum(isinstance(s, Accumulate) and not stored_by_column(s) for s in n.steps) > 2


def with_summed_products(n: Nest, steps: tuple[Step, ...]) -> tuple[Step, ...]:
    """Products that are only summed over the rows become part of that sum, which then rounds as the micro-kernel does:
    dP - delta is exactly 0 in a row that sees one key."""
    products: dict[Expr, Expr] = {
        s.var: s.value
        for s in steps
        if isinstance(s, Let)
        and isinstance(s.value, Call)
        and s.value.op is Op.MUL
        and s.name not in n.stored
        and s.name not in n.forms
        and sum(s.name in names_read(x) for x in steps) == 1
    }
    sums = {
        s.value.x: replace(s, value=Reduce("sum", products[s.value.x], s.value.axis))
        for s in steps
        if isinstance(s, Let)
        and isinstance(s.value, Reduce)
        and s.value.kind == "sum"
        and s.value.x in products
    }
    made = {v.name for v in sums if isinstance(v, Var)}
    kept = (s for s in steps if name_made(s) not in made)
    return tuple(
        sums[s.value.x] if isinstance(s, Let) and isinstance(s.value, Reduce) and s.value.x in sums else s
        for s in kept
    )


def titled(items: tuple[Item, ...]) -> Iterator[Branch]:
    """The branches of a loop's body that are steps of their own."""
    for item in items:
        if isinstance(item, Branch):
            if item.branch.title and item.innermost:
                yield item
            else:
                yield from titled(item.body)


def steps_of_entries(sweep: Sweep) -> Iterator[tuple[Loop, Loop | If, tuple[Item, ...]]]:
    """The steps of loops over tiles inside a loop over the entries of a list, which they do not know of.

    Each with its loop: their functions can stand before the loop over the entries.
    """
    for item in sweep.body if sweep.loop.axis is None else ():
        if not isinstance(item, Sweep):
            continue
        inner = (
            [(item.loop, item.body)] if item.innermost else [(b.branch, b.body) for b in titled(item.body)]
        )
        own = {sweep.loop.var, *(s.name for s in sweep.loop.body if isinstance(s, Let))}
        for step, body in inner:
            if not own & {v.name for s in walk(step.body) for e in expressions(s) for v in variables(e)}:
                yield item.loop, step, body

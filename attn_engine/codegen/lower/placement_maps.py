"""Loop nests of a placed program: neighbours become one, and cheap values are made where they are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from attn_engine.codegen.lower.placed import (
    Branch,
    Buffer,
    Copy,
    CopyIn,
    CopyOut,
    Fill,
    Gemm,
    Map,
    Placed,
    ReduceInto,
    Step,
    Steps,
    walk_placed,
)
from attn_engine.ir.expr import variables
from attn_engine.ir.ops import DType
from attn_engine.ir.tile import Let, expressions


def fused(body: tuple[Placed, ...], rows: str, outer: Mapping[str, Let] | None = None) -> tuple[Placed, ...]:
    """Neighbouring Maps over the same axes as one; cheap values brought into every Map that reads them.

    rows: the first of the kernel's axes. outer: cheap values of enclosing blocks.
    """
    cheap = dict(outer or {})
    done: list[Placed] = []
    for s in body:
        match s:
            case Steps() | Branch():
                done.append(replace(s, body=fused(s.body, rows, cheap)))
            case Map(_, (Let() as let,)) if is_cheap(let, rows):
                cheap[let.name] = let
            case Map(axes, steps):
                steps = _with_cheap(steps, cheap)
                last = done[-1] if done else None
                if isinstance(last, Map) and last.axes == axes:
                    known = {x.name for x in last.steps if isinstance(x, Let) and x.name in cheap}
                    new = (x for x in steps if not (isinstance(x, Let) and x.name in known))
                    done[-1] = Map(axes, (*last.steps, *new))
                else:
                    done.append(Map(axes, steps))
            case _:
                done.append(s)
    return tuple(done)


def is_cheap(let: Let, rows: str) -> bool:
    """Integers and conditions of pairs and of columns: made again wherever they are read, for that costs less than a
    buffer. Those of rows stay: they are made once, before the loops."""
    return let.value.dtype in (DType.BOOL, DType.INT) and let.value.axes != (rows,)


def _with_cheap(steps: tuple[Step, ...], cheap: Mapping[str, Let]) -> tuple[Step, ...]:
    """The steps, each after the cheap values that it reads."""
    made: set[str] = set()
    done: list[Step] = []

    def bring(step: Step) -> None:
        for name in dict.fromkeys(v.name for e in expressions(step) for v in variables(e)):
            if name in cheap and name not in made:
                bring(cheap[name])
        done.append(step)
        if isinstance(step, Let):
            made.add(step.name)

    for step in steps:
        bring(step)
    return tuple(done)


def without_locals(body: tuple[Placed, ...], buffers: Mapping[str, Buffer]) -> list[Buffer]:
    """The buffers that something besides a Map that makes them first reads, or that no Map makes."""
    made: set[str] = set()
    needed: set[str] = set()
    for s in walk_placed(body):
        match s:
            case Map(_, steps):
                here: set[str] = set()
                for step in steps:
                    needed |= {v.name for e in expressions(step) for v in variables(e)} - here
                    here |= {step.name} if isinstance(step, Let) else set()
                made |= here
            case Copy(target, source) | ReduceInto(target, _, source):
                needed |= {target, source}
            case Gemm(target, left, right):
                needed |= {target, left, right}
            case CopyIn(name) | Fill(name) | CopyOut(_, _, name):
                needed.add(name)
            case _:
                pass
    return [b for name, b in buffers.items() if name in needed]

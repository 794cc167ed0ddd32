"""Blocks of a kernel cut into straight runs of statements, and each run fused into nests that are still filled."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeGuard

from attn_engine.codegen.lower.splitter import Splitter
from attn_engine.codegen.lower.steps import (
    Product,
    Shape,
    Step,
    is_total,
    loops_of,
    name_made,
    names_read,
    numbers_read,
    step_shape,
)
from attn_engine.ir.ops import DType
from attn_engine.ir.tile import Accumulate, Choose, If, Lanes, Let, Loop, Narrow, Section, Stmt, StoreTile


@dataclass(eq=False, slots=True)
class OpenNest:
    """A nest still being filled."""

    shape: Shape
    lanes: Lanes
    steps: list[Step] = field(default_factory=list[Step])
    complete: bool = False

    def accepts(self, shape: Shape) -> bool:
        if self.complete:
            return False
        if self.shape.rows is None or shape.rows is None:
            return self.shape.rows is shape.rows
        if self.shape.rows != shape.rows:
            return False
        return self.shape.lanes == shape.lanes or {self.shape.lanes, shape.lanes} == {None, self.lanes.axis}

    def add(self, step: Step, shape: Shape) -> None:
        self.shape = Shape(self.shape.rows, self.shape.lanes or shape.lanes)
        self.steps.append(step)

    def totals(self) -> set[str]:
        return {
            name
            for s in self.steps
            if is_total(s, loops_of(self.shape, self.lanes)) and (name := name_made(s))
        }

    def outside_reads(self) -> set[str]:
        """Names whose numbers this nest reads before it makes them."""
        made: set[str] = set()
        found: set[str] = set()
        for step in self.steps:
            found |= numbers_read(step) - made
            if name := name_made(step):
                made.add(name)
        return found


@dataclass(eq=False, slots=True)
class Run:
    """Statements without inner blocks, fused."""

    nests: list[OpenNest]


Draft = Section | Narrow | Choose | Run | tuple[Loop, "list[Draft]"] | tuple[If, "list[Draft]"]


def draft(body: tuple[Stmt, ...], splitter: Splitter, outer: Mapping[str, Let]) -> list[Draft]:
    """Fuse each run of plain statements; a title ends a run, except in an innermost loop, where it is dropped.

    outer: what enclosing blocks make that a nest here would rather make again.
    """
    cheap = dict(outer)
    innermost = not any(isinstance(s, Loop | If) for s in body)
    drafts: list[Draft] = []
    pending: list[Stmt] = []

    def flush() -> None:
        if pending:
            steps = splitter.block(pending)
            cheap.update({s.name: s for s in steps if is_cheap(s, splitter.lanes)})
            drafts.append(Run(remake_cheap_values(fuse(steps, splitter.lanes, cheap), cheap)))
            pending.clear()

    for s in body:
        match s:
            case Section():
                if not innermost or any(isinstance(x, StoreTile) for x in body):
                    flush()
                    drafts.append(s)
            case Narrow() | Choose():
                flush()
                drafts.append(s)
            case Loop():
                flush()
                drafts.append((s, draft(s.body, splitter, cheap)))
            case If():
                flush()
                drafts.append((s, draft(s.body, splitter, cheap)))
            case Let() | StoreTile() | Accumulate():
                pending.append(s)
    flush()
    return drafts


def all_blocks(drafts: list[Draft]) -> Iterable[Run]:
    for d in drafts:
        if isinstance(d, Run):
            yield d
        elif isinstance(d, tuple):
            yield from all_blocks(d[1])


def fuse(steps: list[Step], lanes: Lanes, cheap: Mapping[str, Let]) -> list[OpenNest]:
    """Put each step into the first nest of its shape that runs no earlier than what it needs; keep the order inside.

    cheap: what a nest makes again, so that it reads what that is made from.
    """
    nests: list[OpenNest] = []
    home: dict[str, OpenNest] = {}
    readers: dict[str, list[OpenNest]] = {}
    for step in steps:
        shape, starts, reads = step_shape(step, lanes), isinstance(step, Product), all_reads(step, cheap)

        def soonest(nest: OpenNest, at_hand: bool, shape: Shape = shape, starts: bool = starts) -> int:
            """The first place after `nest`, or `nest` itself when this step can join it."""
            return nests.index(nest) + (0 if nest.accepts(shape) and at_hand and not starts else 1)

        needs = [soonest(home[r], r not in home[r].totals()) for r in reads if r in home]
        made = name_made(step)
        # Carried state is overwritten after its last reader.
        needs += [soonest(n, True) for n in readers.get(made, [])] if made else []
        earliest = max(needs, default=0)
        target = None if starts else next((n for n in nests[earliest:] if n.accepts(shape)), None)
        if target is None:
            # For few rows a product fills its array in one call: nothing joins it in registers.
            target = OpenNest(shape, lanes, complete=starts and not lanes.whole)
            nests.insert(earliest, target)
        target.add(step, shape)
        if made:
            home[made] = target
        for r in reads:
            readers.setdefault(r, []).append(target)
    return nests


def all_reads(step: Step, cheap: Mapping[str, Let]) -> set[str]:
    """Names that the step reads, and those that the cheap ones among them are made from."""
    found: set[str] = set()
    pending = list(names_read(step))
    while pending:
        name = pending.pop()
        if name not in found:
            found.add(name)
            pending += names_read(cheap[name]) if name in cheap else ()
    return found


def is_cheap(step: Step, lanes: Lanes) -> TypeGuard[Let]:
    """Integers and conditions of a row: computed again where another nest reads them, for arrays hold numbers."""
    rows = step_shape(step, lanes).rows
    return isinstance(step, Let) and rows is not None and step.value.dtype in (DType.BOOL, DType.INT)


def remake_cheap_values(nests: list[OpenNest], cheap: Mapping[str, Let]) -> list[OpenNest]:
    """Bring cheap values into every nest that reads them, and drop them where nothing does."""
    for nest in nests:
        made: set[str] = set()
        steps: list[Step] = []

        def bring(step: Step, made: set[str] = made, steps: list[Step] = steps) -> None:
            for name in sorted(names_read(step) & cheap.keys() - made):
                bring(cheap[name])
            if (name := name_made(step)) not in made or not isinstance(step, Let) or name not in cheap:
                steps.append(step)
            if name:
                made.add(name)

        for step in nest.steps:
            bring(step)
        nest.steps = steps
        while unread := {name_made(s) for s in nest.steps} & cheap.keys() - names_read_by(nest.steps):
            nest.steps = [s for s in nest.steps if name_made(s) not in unread]
    return [n for n in nests if n.steps]


def names_read_by(steps: list[Step]) -> set[str]:
    return {name for step in steps for name in names_read(step)}

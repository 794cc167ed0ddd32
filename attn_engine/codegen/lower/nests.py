"""Schedule a kernel for a machine without tile instructions: fuse its steps into few row loops.

    item = Section | Nest(shape, steps, stored, places) | Sweep(loop, items) | Branch(branch, items)

A nest is one loop over rows: a product of the micro-kernel and everything that can be done to its result while that is
in registers. Values that another nest needs are stored in scratch arrays; all others never leave the registers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeGuard

from attn_engine.codegen.lower.steps import (
    Form,
    Product,
    Shape,
    Splitter,
    Step,
    is_total,
    loops_of,
    name_made,
    names_read,
    numbers_read,
    prepare,
    step_shape,
)
from attn_engine.ir.ops import DType
from attn_engine.ir.tile import Accumulate, If, Kernel, Lanes, Let, Loop, Section, Stmt, StoreTile

FLAT = Shape(None, None)


@dataclass(frozen=True, slots=True)
class Nest:
    """`steps` at every row of shape.rows, or once where that is None.

    stored: names kept in arrays. places: the array of each stored name of this block that uses another one's.
    forms: names kept for paired products, in these forms.
    """

    shape: Shape
    steps: tuple[Step, ...]
    stored: frozenset[str] = frozenset()
    places: Mapping[str, str] = field(default_factory=dict[str, str], compare=False)
    forms: Mapping[str, tuple[Form, ...]] = field(default_factory=dict[str, "tuple[Form, ...]"])


@dataclass(frozen=True, slots=True)
class Sweep:
    """A loop whose body is scheduled."""

    loop: Loop
    body: tuple[Item, ...]

    @property
    def innermost(self) -> bool:
        return all(isinstance(item, Nest) for item in self.body)


@dataclass(frozen=True, slots=True)
class Branch:
    """An `If` whose body is scheduled."""

    branch: If
    body: tuple[Item, ...]

    @property
    def innermost(self) -> bool:
        return all(isinstance(item, Nest) for item in self.body)


Item = Section | Nest | Sweep | Branch


@dataclass(frozen=True, slots=True)
class Schedule:
    """A scheduled kernel.

    arrays: the shape of every scratch array; operands: of every value that paired products read, in forms of its own;
    states: the names that loops overwrite.
    """

    kernel: Kernel
    body: tuple[Item, ...]
    arrays: Mapping[str, Shape]
    operands: Mapping[str, Shape]
    states: frozenset[str]


def schedule_nests(kernel: Kernel, paired: bool = False) -> Schedule:
    """Turn the statements of every block into nests; `paired`: products multiply pairs of bfloat16."""
    kernel, factors = prepare(kernel, paired)
    splitter = Splitter(kernel, factors, paired)
    drafts = draft(kernel.body, splitter, {})
    arrays: dict[str, Shape] = {}
    operands = computed_operands(drafts)
    body = finish(drafts, frozenset(), arrays, operand_forms(drafts, operands))
    return Schedule(kernel, body, arrays, operands, frozenset(rewritten(drafts, set())))


# -- drafts: blocks cut into straight runs of statements


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


Draft = Section | Run | tuple[Loop, "list[Draft]"] | tuple[If, "list[Draft]"]


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


# -- finishing: what is stored, and where


def rewritten(drafts: list[Draft], outer: set[str]) -> Iterable[str]:
    """Variables that an inner block, or a later step of their own block, assigns again: state that loops carry."""
    made = set(outer)
    for d in drafts:
        if isinstance(d, tuple):
            yield from rewritten(d[1], made)
        elif isinstance(d, Run):
            for step in (step for n in d.nests if n.shape.rows is None for step in n.steps):
                if isinstance(step, Let):
                    yield from {step.name} & made
                    made.add(step.name)


def all_products(drafts: list[Draft]) -> list[Product]:
    steps = (step for run in all_blocks(drafts) for nest in run.nests for step in nest.steps)
    return [step for step in steps if isinstance(step, Product) and step.paired]


def computed_operands(drafts: list[Draft]) -> dict[str, Shape]:
    """How the operands of paired products that are no tiles of tensors lie."""
    read = {name for p in all_products(drafts) for name in (p.a.name, p.b.name)}
    return {
        name: array_shape(nest, name)
        for run in all_blocks(drafts)
        for nest in run.nests
        for step in nest.steps
        if (name := name_made(step)) in read and name and isinstance(step, Let | Product)
    }


def operand_forms(drafts: list[Draft], operands: Mapping[str, Shape]) -> dict[str, tuple[Form, ...]]:
    """The forms in which paired products read each of them."""
    forms: dict[str, dict[Form, None]] = {}
    for p in all_products(drafts):
        if p.a.name in operands:
            forms.setdefault(p.a.name, {})[p.form_of_numbers(operands[p.a.name])] = None
        if p.b.name in operands:
            forms.setdefault(p.b.name, {})[p.form_of_lanes] = None
    return {name: tuple(found) for name, found in forms.items()}


Forms = Mapping[str, tuple[Form, ...]]


def finish(
    drafts: list[Draft], outer: frozenset[str], arrays: dict[str, Shape], forms: Forms
) -> tuple[Item, ...]:
    """Decide what each nest of a block stores; `outer` names what enclosing blocks keep in arrays."""
    reads = outer | {
        name for run in all_blocks(drafts) for nest in run.nests for name in nest.outside_reads()
    }
    items: list[Item] = []
    for d in drafts:
        match d:
            case Section():
                items.append(d)
            case Run(nests):
                items += close(nests, reads, arrays, forms)
            case (Loop() as loop, inner):
                inside = outer | arrays.keys() & made_in(drafts)
                items.append(Sweep(loop, finish(inner, inside, arrays, forms)))
            case (If() as branch, inner):
                inside = outer | arrays.keys() & made_in(drafts)
                items.append(Branch(branch, finish(inner, inside, arrays, forms)))
    return tuple(items)


def made_in(drafts: list[Draft]) -> set[str]:
    """Names made by the plain statements of a block."""
    runs = [d for d in drafts if isinstance(d, Run)]
    return {name for run in runs for n in run.nests for step in n.steps if (name := name_made(step))}


def close(nests: list[OpenNest], reads: frozenset[str], arrays: dict[str, Shape], forms: Forms) -> list[Item]:
    """Values of a row that some nest reads from outside are stored."""
    stored = [frozenset(kept(n, reads)) for n in nests]
    places = share(nests, stored)
    for nest, names in zip(nests, stored, strict=True):
        for name in names - places.keys():
            shape = array_shape(nest, name)
            assert arrays.setdefault(name, shape) == shape, f"{name} changes shape"
    return [
        Nest(n.shape, tuple(n.steps), s, places, {name: forms[name] for name in made_by(n) if name in forms})
        for n, s in zip(nests, stored, strict=True)
    ]


def made_by(nest: OpenNest) -> list[str]:
    return [name for step in nest.steps if (name := name_made(step))]


def kept(nest: OpenNest, reads: frozenset[str]) -> Iterable[str]:
    """The numbers of a row that must be in an array."""
    for step in nest.steps:
        name = name_made(step)
        number = isinstance(step, Product) or (isinstance(step, Let) and step.value.dtype is DType.FLOAT)
        if name in reads and number and nest.shape.rows is not None and not is_total(step, {nest.shape.rows}):
            yield name


def array_shape(nest: OpenNest, name: str) -> Shape:
    step = next(s for s in nest.steps if name_made(s) == name)
    if isinstance(step, Product):
        return step.shape
    assert isinstance(step, Let)
    axes = step.value.axes
    return Shape(*(axis if axis in axes else None for axis in (nest.shape.rows, nest.shape.lanes)))


def share(nests: list[OpenNest], stored: list[frozenset[str]]) -> dict[str, str]:
    """A value may overwrite, row by row, one that nothing reads any more."""
    local = {name for names in stored for name in names}
    carried = {r for n in nests for r in n.outside_reads()} - local
    places: dict[str, str] = {}
    first_made: set[str] = set()
    for i, nest in enumerate(nests):
        later = {r for n in nests[i + 1 :] for r in n.outside_reads()}
        in_products = {r for s in nest.steps if isinstance(s, Product) for r in names_read(s)}
        for k, step in enumerate(nest.steps):
            name = name_made(step)
            if name not in stored[i] or not holds_pairs(array_shape(nest, name)):
                continue
            read_after = {r for s in nest.steps[k + 1 :] for r in names_read(s)}
            dead = first_made & names_read(step) - later - in_products - read_after - carried - set(places)
            if dead and name not in names_read(step):
                places[name] = min(dead)
                first_made.remove(places[name])
        first_made |= {n for n in stored[i] if holds_pairs(array_shape(nest, n))} - set(places)
    return places


def holds_pairs(shape: Shape) -> bool:
    return {shape.rows, shape.lanes} == {"q", "kv"}

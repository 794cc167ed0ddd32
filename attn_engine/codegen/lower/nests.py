"""Schedule a kernel for a machine without tile instructions: fuse its steps into few row loops.

    item = Section | Narrow | Choose | Nest(shape, steps, stored, places) | Sweep(loop, items) | Branch(branch, items)

A nest is one loop over rows: a product of the micro-kernel and everything that can be done to its result while that is
in registers. Values that another nest needs are stored in scratch arrays; all others never leave the registers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from attn_engine.codegen.lower.drafts import Draft, OpenNest, Run, all_blocks, draft
from attn_engine.codegen.lower.splitter import Splitter, prepare
from attn_engine.codegen.lower.steps import Form, Product, Shape, Step, is_total, name_made, names_read
from attn_engine.ir.ops import DType
from attn_engine.ir.tile import Choose, If, Kernel, Let, Loop, Narrow, Section


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
        return all(isinstance(item, Nest | Narrow | Choose) for item in self.body)


@dataclass(frozen=True, slots=True)
class Branch:
    """An `If` whose body is scheduled."""

    branch: If
    body: tuple[Item, ...]

    @property
    def innermost(self) -> bool:
        return all(isinstance(item, Nest | Narrow | Choose) for item in self.body)


Item = Section | Narrow | Choose | Nest | Sweep | Branch


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
            case Section() | Narrow() | Choose():
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

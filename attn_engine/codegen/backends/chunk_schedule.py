"""What the C++ of a chunk program does at once: factors of rows go into the product beside them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from attn_engine.ir.chunk import (
    STATE,
    ChunkStmt,
    Gram,
    GramGradient,
    Product,
    Scale,
    StateStep,
    Tile,
    tiles_of,
)


@dataclass(frozen=True, slots=True)
class ScaledProduct:
    """A product whose rows are multiplied by the numbers of `by` before they are stored."""

    product: Product
    by: Tile


@dataclass(frozen=True, slots=True)
class ScaledStateStep:
    """A state step whose keys are multiplied by the numbers of `by` as they are packed."""

    step: StateStep
    by: Tile


ScheduledStmt = ChunkStmt | ScaledProduct | ScaledStateStep


def scheduled(body: tuple[ChunkStmt, ...], paired: bool) -> tuple[ScheduledStmt, ...]:
    """The same statements, with every scaling left out that a product can do by the way.

    paired: operands of state steps are packed.
    """
    found: list[ScheduledStmt] = list(body)
    for scale in [s for s in body if isinstance(s, Scale) and s.by.axes == ("t",)]:
        if scale.to is scale.x:
            _scale_result(found, scale)
        elif not (paired and _scale_keys(found, scale)):
            _scale_operand(found, scale)
    return tuple(found)


def _scale_operand(body: list[ScheduledStmt], scale: Scale) -> None:
    """(x * by) b = (x b) * by where only products read x * by."""
    users = [i for i, s in enumerate(body) if s != scale and scale.to in _tiles(s)]
    products = [
        (i, s) for i in users if isinstance(s := body[i], Product) and s.a == scale.to and s.b != scale.to
    ]
    if len(products) != len(users):
        return
    for i, s in products:
        product = Product(s.to, scale.x, s.b, s.add, s.negative, s.upper, s.turned)
        body[i] = ScaledProduct(product, scale.by)
    body.remove(scale)


def _scale_keys(body: list[ScheduledStmt], scale: Scale) -> bool:
    """Whether only a state step read the scaled rows, which now scales them itself."""
    users = [i for i, s in enumerate(body) if s != scale and scale.to in _tiles(s)]
    if len(users) != 1 or not isinstance(step := body[users[0]], StateStep):
        return False
    body[users[0]] = ScaledStateStep(replace(step, keys=scale.x), scale.by)
    body.remove(scale)
    return True


def _scale_result(body: list[ScheduledStmt], scale: Scale) -> None:
    """to = a b; to = to * by, as one."""
    place = body.index(scale)
    before = [i for i in range(place) if scale.to in _tiles(body[i])]
    last = body[before[-1]] if before else None
    if isinstance(last, Product) and not last.add and last.to == scale.to:
        body[before[-1]] = ScaledProduct(last, scale.by)
        del body[place]


def _tiles(s: ScheduledStmt) -> tuple[Tile, ...]:
    match s:
        case ScaledProduct(product, by):
            return (*tiles_of(product), by)
        case ScaledStateStep(step, by):
            return (*tiles_of(step), by)
        case _:
            return tiles_of(s)


def reads_state_rows(body: tuple[ChunkStmt, ...]) -> bool:
    """Whether the state is the right operand of a product: then products of pairs read it in pairs of rows."""
    return any(isinstance(s, Product) and s.b == STATE and not s.turned for s in body)


def phases_between(body: tuple[ChunkStmt, ...]) -> tuple[bool, ...]:
    """Which matrices of what is left of a token at another the statements need: whether they are exclusive."""
    grams = [s.within for s in body if isinstance(s, Gram | GramGradient)]
    return tuple(sorted({w.exclusive for w in grams if w is not None and not w.vector}))

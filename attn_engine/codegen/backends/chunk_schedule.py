"""What the C++ of a chunk program does at once: factors of rows go into the product beside them."""

from __future__ import annotations

from dataclasses import dataclass

from attn_engine.ir.chunk import ChunkStmt, Gram, GramGradient, Product, Scale, Tile, tiles_of


@dataclass(frozen=True, slots=True)
class ScaledProduct:
    """A product whose rows are multiplied by the numbers of `by` before they are stored."""

    product: Product
    by: Tile


ScheduledStmt = ChunkStmt | ScaledProduct


def scheduled(body: tuple[ChunkStmt, ...]) -> tuple[ScheduledStmt, ...]:
    """The same statements, with every scaling left out that a product can do by the way."""
    found: list[ScheduledStmt] = list(body)
    for scale in [s for s in body if isinstance(s, Scale) and s.by.axes == ("t",)]:
        if scale.to is scale.x:
            _scale_result(found, scale)
        else:
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


def _scale_result(body: list[ScheduledStmt], scale: Scale) -> None:
    """to = a b; to = to * by, as one."""
    place = body.index(scale)
    before = [i for i in range(place) if scale.to in _tiles(body[i])]
    last = body[before[-1]] if before else None
    if isinstance(last, Product) and not last.add and last.to == scale.to:
        body[before[-1]] = ScaledProduct(last, scale.by)
        del body[place]


def _tiles(s: ScheduledStmt) -> tuple[Tile, ...]:
    return (*_tiles(s.product), s.by) if isinstance(s, ScaledProduct) else tiles_of(s)


def phases_between(body: tuple[ChunkStmt, ...]) -> tuple[bool, ...]:
    """Which matrices of what is left of a token at another the statements need: whether they are exclusive."""
    grams = [s.within for s in body if isinstance(s, Gram | GramGradient)]
    return tuple(sorted({w.exclusive for w in grams if w is not None and not w.vector}))

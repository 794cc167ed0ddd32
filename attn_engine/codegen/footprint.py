"""What a kernel keeps where, read off its tile program: the facts that the resource model counts.

A product's operands come from tiles that are loaded before the loop (`resident`: a query tile), loaded in it
(`staged`: key and value tiles, through the load pipeline) or made in it (`made`: the weights, rounded). What a loop
carries (`carried`: the output so far) and what a step makes (`scores`) lies in registers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from math import prod

from attn_engine.codegen.lower.columns import cut_columns, padded
from attn_engine.ir.expr import COLUMNS, Cast, Dot, Expr, FirstColumns, Load, Var, postorder
from attn_engine.ir.ops import DType, Storage
from attn_engine.ir.tile import If, Kernel, Let, Loop, Stmt, StoreTile, expressions, walk

_WIDTH = {Storage.FLOAT64: 8, Storage.FLOAT32: 4, Storage.FLOAT16: 2, Storage.BFLOAT16: 2}
_ROLES = ("resident", "staged", "made")


@dataclass(frozen=True, slots=True)
class Tile:
    """Some values over `axes`, `width` bytes each; `tensor`: where they are loaded from. products: which of a step's
    products read it, by their place."""

    tensor: str
    axes: tuple[str, ...]
    width: int
    products: tuple[int, ...] = ()
    elements: int = 0

    @property
    def bytes(self) -> int:
        return self.elements * self.width


@dataclass(frozen=True, slots=True)
class Product:
    """[rows, depth] @ [depth, columns]: axes and sizes."""

    axes: tuple[str, str, str]
    rows: int = 0
    columns: int = 0
    depth: int = 0

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.columns * self.depth


@dataclass(frozen=True, slots=True)
class Footprint:
    """Tiles by role and products of the largest step. read: other tiles that a step loads, such as row values.

    width: bytes of an element. sizes: of every axis. scores: how many tiles of pairs a step has at once, about.
    """

    width: int
    sizes: tuple[tuple[str, int], ...]
    products: tuple[Product, ...]
    resident: tuple[Tile, ...]
    staged: tuple[Tile, ...]
    made: tuple[Tile, ...]
    read: tuple[Tile, ...]
    carried: tuple[Tile, ...]
    stored: tuple[Tile, ...]

    @property
    def pairs(self) -> int:
        """Pairs of a query and a key in a step."""
        sizes = dict(self.sizes)
        return sizes.get("q", 1) * sizes.get("kv", 1)

    @property
    def scores(self) -> int:
        made = sum(1 for p in self.products if set(p.axes[:2]) == {"q", "kv"})
        return 2 * made + len({t.tensor for t in self.made})

    @property
    def flops(self) -> int:
        return sum(p.flops for p in self.products)

    def sized(self, q: int, kv: int) -> Footprint:
        """The same kernel in other tiles."""
        sizes = {axis: {"q": q, "kv": kv}.get(axis, n) for axis, n in self.sizes}
        tiles = {
            role: tuple(replace(t, elements=_count(sizes, t.axes)) for t in getattr(self, role))
            for role in (*_ROLES, "read", "carried", "stored")
        }
        products = tuple(Product(p.axes, *(sizes[a] for a in p.axes)) for p in self.products)
        return replace(self, sizes=tuple(sizes.items()), products=products, **tiles)


@lru_cache(maxsize=4096)
def footprint(kernel: Kernel) -> Footprint:
    """Of a kernel as Triton sees it: head dimensions in pieces, each a power of two."""
    cut = cut_columns(kernel)
    sizes = dict(cut.tile)
    return _Reader(cut).footprint().sized(sizes.get("q", 1), sizes.get("kv", 1))


@dataclass
class _Reader:
    kernel: Kernel
    inner: dict[str, Expr] = field(default_factory=dict[str, Expr])
    outer: dict[str, Expr] = field(default_factory=dict[str, Expr])

    def footprint(self) -> Footprint:
        body = self.kernel.body
        step = max(_innermost(body), key=lambda s: len(_products(s.body)), default=None)
        inside = [] if step is None else list(walk(step.body))
        own = {id(s) for s in inside}
        self.inner = {s.name: s.value for s in inside if isinstance(s, Let)}
        self.outer = {s.name: s.value for s in walk(body) if isinstance(s, Let) and id(s) not in own}
        products = list(dict.fromkeys(p for s in inside for p in _dots(s)))
        roles = self.operands(products)
        loads = (
            v for n, v in self.inner.items() if isinstance(v, Load) and v.axes and n not in roles["staged"]
        )
        sizes = ((a, padded(n) if a in COLUMNS else n) for a, n in self.kernel.tile)
        carried = (self.inner[n].axes for n in self.inner if n in self.outer and self.inner[n].axes)
        stored = (s for s in walk(body) if isinstance(s, StoreTile))
        return Footprint(
            width=self.width,
            sizes=tuple(sizes),
            products=tuple(Product(self.oriented(p)) for p in products),
            resident=tuple(roles["resident"].values()),
            staged=tuple(roles["staged"].values()),
            made=tuple(roles["made"].values()),
            read=tuple(Tile(x.tensor, x.axes, self.width if x.dtype is DType.ELEMENT else 4) for x in loads),
            carried=tuple(Tile("", axes, 4) for axes in carried),
            stored=tuple(
                Tile(s.tensor, tuple(a for i in s.indices for a in i.axes), self.width) for s in stored
            ),
        )

    @property
    def width(self) -> int:
        """That of q: tiles in float8 become such numbers before they are multiplied."""
        wide = (p for p in self.kernel.params if p.shape and p.shape[-1] in ("dim_qk", "dim_v"))
        return min((_WIDTH[p.storage] for p in wide if p.storage is not Storage.FLOAT8), default=4)

    def operands(self, products: list[Dot]) -> dict[str, dict[str, Tile]]:
        """By role and name, each with the places of the products that read it."""
        found: dict[str, dict[str, Tile]] = {role: {} for role in _ROLES}
        for place, product in enumerate(products):
            for operand in (product.a, product.b):
                name, role, tensor = self.role(operand)
                before = found[role].get(name, Tile(tensor, operand.axes, self.width))
                found[role][name] = replace(before, products=(*before.products, place))
        return found

    def role(self, operand: Expr) -> tuple[str, str, str]:
        """(name, role, tensor that it is loaded from) of an operand of a product."""
        x = operand.x if isinstance(operand, Cast) else operand
        name = x.name if isinstance(x, Var) else f"tile over {', '.join(x.axes)}"
        if isinstance(found := self.inner.get(name), FirstColumns):
            return self.role(found.x)
        if isinstance(found, Load):
            return name, "staged", found.tensor
        if name not in self.inner and isinstance(found := self.outer.get(name), Load):
            return name, "resident", found.tensor
        return name, "made", name

    def oriented(self, p: Dot) -> tuple[str, str, str]:
        rows, columns = sorted(p.axes, key=self.kernel.order.index)
        return rows, columns, p.contracted


def _count(sizes: Mapping[str, int], axes: Iterable[str]) -> int:
    return prod(sizes[axis] for axis in axes)


def _innermost(body: tuple[Stmt, ...]) -> list[Loop]:
    """Loops that hold products and no loop that does."""
    found: list[Loop] = []
    for s in body:
        if isinstance(s, Loop):
            found += _innermost(s.body) or ([s] if _products(s.body) else [])
        elif isinstance(s, If):
            found += _innermost(s.body)
    return found


def _products(body: tuple[Stmt, ...]) -> list[Dot]:
    return [p for s in walk(body) for p in _dots(s)]


def _dots(s: Stmt) -> list[Dot]:
    return [e for e in postorder(*expressions(s)) if isinstance(e, Dot)]

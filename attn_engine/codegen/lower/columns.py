"""Head dimensions cut into powers of two, for backends whose tiles have no other sizes.

A tile over 576 columns would be padded to 1024, in shared memory and in every product. Cut into 512 and 64 columns it
is two tiles: loads, accumulators and stores come once per piece, and a product over the columns is a sum of products.
The pieces of "d" are the axes "d", "d2", ... in order; `Kernel.first_column` says where each begins.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import lru_cache

from attn_engine.codegen.lower.emit import Names
from attn_engine.codegen.lower.scaled import COLUMNS_OF_SCALE, is_scaled
from attn_engine.ir.expr import MOST_PIECES, Dot, Expr, FirstColumns, Full, Reduce, Var, call, rebuild
from attn_engine.ir.ops import Op
from attn_engine.ir.tile import Accumulate, If, Kernel, Let, Loop, Stmt, StoreTile, walk

SMALLEST = 16  # columns that a matrix unit multiplies
MOST_WITHOUT_SCALES = 4  # pieces
_JOINED = {"sum": Op.ADD, "max": Op.MAX, "min": Op.MIN}


def padded(columns: int) -> int:
    """The power of two, at least 16, that holds so many columns.

    >>> [padded(n) for n in (8, 64, 72)]
    [16, 64, 128]
    """
    return max(SMALLEST, 1 << (columns - 1).bit_length())


def pieces(columns: int) -> tuple[int, ...]:
    """Columns of each piece: powers of two, but for the last, which is masked where it is none.

    The fewest pieces that waste an eighth of the columns at most, else those that waste least.

    >>> [pieces(n) for n in (128, 192, 576, 96, 80, 40, 24, 120, 112)]
    [(128,), (128, 64), (512, 64), (64, 32), (64, 16), (32, 8), (24,), (120,), (64, 32, 16)]
    """
    cuts: list[tuple[int, ...]] = [(columns,)]
    while len(cuts) < MOST_WITHOUT_SCALES and (rest := cuts[-1][-1]) > SMALLEST and padded(rest) != rest:
        largest = 1 << (rest.bit_length() - 1)
        cuts.append((*cuts[-1][:-1], largest, rest - largest))
    room = [sum(padded(n) for n in cut) for cut in cuts]
    enough = (cut for cut, held in zip(cuts, room, strict=True) if held * 8 <= columns * 9)
    return next(enough, cuts[room.index(min(room))])


def pieces_of_scales(columns: int) -> tuple[int, ...]:
    """The same where every 128 columns have a scale of their own: no piece holds columns of two. Up to 1024 columns;
    backends that cut refuse more.

    >>> [pieces_of_scales(n) for n in (64, 240, 576)]
    [(64,), (128, 64, 32, 16), (128, 128, 128, 128, 64)]
    """
    if columns > MOST_PIECES * COLUMNS_OF_SCALE:
        return pieces(columns)
    whole, rest = divmod(columns, COLUMNS_OF_SCALE)
    last = pieces(rest) if rest else ()
    return (COLUMNS_OF_SCALE,) * whole + (last if whole + len(last) <= MOST_PIECES else (rest,))


def piece_axes(axis: str, count: int) -> tuple[str, ...]:
    """("d", "d2", ...): the axes of the pieces of "d"."""
    return (axis, *(f"{axis}{i}" for i in range(2, count + 1)))


@lru_cache(maxsize=1024)
def cut_columns(kernel: Kernel) -> Kernel:
    """The kernel with "d" and "dv" in pieces; the kernel itself where one piece each will do."""
    cut = pieces_of_scales if is_scaled(kernel) else pieces
    for axis, size in reversed(kernel.tile):  # "dv" first: pieces of a value are found among those of its key
        if axis in ("d", "dv") and len(cut(size)) > 1:
            kernel = _Cut(kernel, axis, cut(size)).kernel()
    return kernel


class _Cut:
    """One axis of one kernel, cut. A value over the axis becomes one value per piece."""

    def __init__(self, kernel: Kernel, axis: str, sizes: tuple[int, ...]) -> None:
        self.before, self.axis = kernel, axis
        self.pieces = dict(zip(piece_axes(axis, len(sizes)), sizes, strict=True))
        lets = [s for s in walk(kernel.body) if isinstance(s, Let)]
        taken = Names({s.name for s in lets} | {v.name for v in kernel.scalars})
        wide = dict.fromkeys(s.name for s in lets if axis in s.value.axes)
        self._names: Mapping[tuple[str, str], str] = {
            (name, piece): name if piece == axis else taken.fresh(f"{name}_{piece[len(axis) :]}")
            for name in wide
            for piece in self.pieces
        }
        self._done: dict[tuple[Expr, str], Expr] = {}

    def kernel(self) -> Kernel:
        kernel = self.before
        firsts, column = dict(kernel.first_columns), 0
        for piece, size in self.pieces.items():
            firsts[piece], column = column, column + size
        order = (p for axis in kernel.order for p in (self.pieces if axis == self.axis else (axis,)))
        tile = (
            cut
            for axis, size in kernel.tile
            for cut in (self.pieces.items() if axis == self.axis else [(axis, size)])
        )
        return replace(
            kernel,
            order=tuple(order),
            tile=tuple(tile),
            body=tuple(self._body(kernel.body)),
            first_columns=tuple((axis, first) for axis, first in firsts.items() if first),
        )

    def _body(self, body: tuple[Stmt, ...]) -> Iterator[Stmt]:
        for s in body:
            match s:
                case Let(name, value, source) if self.axis in value.axes:
                    for piece in self.pieces:
                        yield Let(self._names[name, piece], self._of(value, piece), source)
                case Let(_, value):
                    yield replace(s, value=self._whole(value))
                case StoreTile(_, indices, value) | Accumulate(_, indices, value):
                    here = any(self.axis in i.axes for i in indices)
                    for piece in self.pieces if here else [self.axis]:
                        where = tuple(self._of(i, piece) for i in indices)
                        yield replace(s, indices=where, value=self._of(value, piece))
                case Loop(_, lo, hi):
                    yield replace(s, lo=self._whole(lo), hi=self._whole(hi), body=tuple(self._body(s.body)))
                case If(condition):
                    yield replace(s, condition=self._whole(condition), body=tuple(self._body(s.body)))
                case _:
                    yield s

    def _whole(self, e: Expr) -> Expr:
        """A value that does not span the axis, whatever it was made from."""
        return self._of(e, self.axis)

    def _of(self, e: Expr, piece: str) -> Expr:
        """The part of a value that lies in one piece; all of a value that does not span the axis."""
        found = self._done.get((e, piece))
        if found is None:
            found = self._done[e, piece] = self._made(e, piece)
        return found

    def _made(self, e: Expr, piece: str) -> Expr:
        match e:
            case Dot(a, b) if e.contracted == self.axis:
                return self._joined("sum", [Dot(self._of(a, p), self._of(b, p)) for p in self.pieces])
            case Reduce(kind, x, axis) if axis == self.axis:
                return self._joined(kind, [Reduce(kind, self._of(x, p), p) for p in self.pieces])
            case Var(name, dtype, axes) if self.axis in axes:
                own = f"{piece}_idx" if name == f"{self.axis}_idx" else self._names[name, piece]
                return Var(own, dtype, self._spans(axes, piece))
            case FirstColumns(x, axis) if axis == self.axis:
                return FirstColumns(x, piece)
            case FirstColumns(x, axis) if self.axis in x.axes:
                return FirstColumns(self._of(x, f"{self.axis}{axis.removeprefix('dv')}"), axis)
            case Full(value, axes) if self.axis in axes:
                return Full(value, self._spans(axes, piece))
            case _:
                return rebuild(e, tuple(self._of(o, piece) for o in e.operands))

    def _spans(self, axes: tuple[str, ...], piece: str) -> tuple[str, ...]:
        return tuple(piece if axis == self.axis else axis for axis in axes)

    def _joined(self, kind: str, parts: list[Expr]) -> Expr:
        total, *rest = parts
        for part in rest:
            total = call(_JOINED[kind], total, part)
        return total

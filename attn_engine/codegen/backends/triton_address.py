"""Where a tensor's elements lie: pointers, offsets and masks of generated Triton code.

Q, K, V and their like are addressed by batch, head, row and dimension. A tile's address has two parts: a scalar base
in 64 bits and the tile's own offsets in 32 bits, which do not change from tile to tile:

    K_base = K + batch * K_batch_stride + kv_head * K_head_stride + kv_row * K_row_stride
    key = tl.load(K_base + (kv_tile[:, None] * K_row_stride + d_idx[None, :] * K_d_stride), mask=..., other=0.0)
"""

from __future__ import annotations

from dataclasses import dataclass

from attn_engine.codegen.lower.columns import padded
from attn_engine.codegen.render import ATOM, Renderer
from attn_engine.ir.expr import AXES, COLUMNS, Call, Const, Expr, Load, Var
from attn_engine.ir.ops import DType, Op
from attn_engine.ir.printer import INFIX
from attn_engine.ir.tile import Kernel, Let, Loop, Narrow, Param, walk

DIMENSION_WORDS = {
    "batches": "batch", "heads": "head", "kv_heads": "head", "splits": "split",
    "q_len": "row", "kv_len": "row", "dim_qk": "d", "dim_v": "d",
    "q_blocks": "tile", "kv_blocks": "tile", "ends": "end",
    "q_bounds": "block", "kv_bounds": "block", "partial_listed": "entry", "full_listed": "entry",
    "tile_count": "tile", "span": "end", "partial_words": "word", "pages": "page",
    "K_scales": "block", "V_scales": "block",
    "tokens": "token", "shares": "share", "tile_tokens": "row", "words": "word", "topk": "place",
}  # fmt: skip
DIMENSION_CONSTANTS = {"dim_qk": "DIM_QK", "dim_v": "DIM_V"}
BLOCKS = {axis: f"BLOCK_{axis.upper()}" for axis in AXES}
GRID_SIZES = {
    "head": "heads", "kv_head": "kv_heads", "batch": "batches", "split": "splits",
    "tile": "tile_count", "turn": "batches",
}  # fmt: skip
NON_NEGATIVE = frozenset(
    f"{axis}_{what}" for axis in AXES for what in ("idx", "start", "len")
) | {*GRID_SIZES, *GRID_SIZES.values(), "group", "first_tile", "tile_tokens"}  # fmt: skip
LISTED = frozenset(
    {"q_bounds", "kv_bounds", "partial_listed", "full_listed", "partial_words", "span", "tile_count"}
)  # last sizes of lists of blocks and of tables of sequences: no number in them is negative
OF_TILE = {
    "head",
    "kv_head",
    "place",
    "tile_start",
}  # never negative, though how a tile's number gives them hides it


@dataclass(frozen=True, slots=True)
class Address:
    """A tile's place: scalar pointer, tile offsets ("" for one element), condition of being inside ("" for always)."""

    base: str
    offset: str
    inside: str

    @property
    def pointer(self) -> str:
        return f"{self.base} + {self.offset}" if self.offset else self.base


def block_size(kernel: Kernel, axis: str) -> int:
    """How many positions a tile has along an axis: a power of two, at least 16 for the head dimensions."""
    size = kernel.block(axis)
    return padded(size) if axis in COLUMNS else size


def wide_axes(kernel: Kernel) -> set[str]:
    """Axes of the grid that are held in 64 bits; the tiles and shares of a selection count tokens and keys."""
    of_tokens = {"tile", "split"} if kernel.chooses else set[str]()
    return set(kernel.grid) - {"q", "kv"} - of_tokens


def captured(param: Param) -> bool:
    """Whether a tensor's sizes are its own: what the user's functions index, and its gradient."""
    return any("_size_" in size for size in param.shape)


def stride_names(param: Param) -> tuple[str, ...]:
    """One argument per dimension: Q_batch_stride, Q_head_stride, ... or bias_stride_0, ..."""
    if captured(param):
        return tuple(f"{param.name}_stride_{i}" for i in range(len(param.shape)))
    return tuple(f"{param.name}_{DIMENSION_WORDS[size]}_stride" for size in param.shape)


def tile_axis(index: Expr) -> str | None:
    """The axis whose plain positions an index is, None for any other expression."""
    if isinstance(index, Var) and index.name.endswith("_idx") and len(index.axes) == 1:
        return index.axes[0] if index.name == f"{index.axes[0]}_idx" else None
    return None


class Addressing(Renderer):
    """The part of the Triton renderer that turns (tensor, indices) into an `Address`."""

    narrowed: dict[str, str]  # tensors of which a sequence is seen, and where that begins
    lowest: dict[str, int]  # integer names and what they are never below
    wide: set[str]  # integer names that hold 64 bits

    def learn(self, kernel: Kernel) -> None:
        """Find lower bounds of the kernel's integers, and which of them hold 64 bits."""
        values: dict[str, list[Expr]] = {}
        for s in walk(kernel.body):
            if isinstance(s, Loop):
                values.setdefault(s.var, []).append(s.lo)
            elif isinstance(s, Let) and s.value.dtype is DType.INT:
                values.setdefault(s.name, []).append(s.value)
        of_tile = OF_TILE if "tile" in kernel.grid else set[str]()
        self.lowest = dict.fromkeys((*NON_NEGATIVE, *of_tile), 0)
        for name, assigned in values.items():  # a name that its own values read has no bound, and needs none
            found = [self.lower_bound(value) for value in assigned]
            if all(bound is not None for bound in found):
                self.lowest[name] = min(bound for bound in found if bound is not None)
            elif name not in of_tile:
                self.lowest.pop(name, None)
        self.wide = wide_axes(kernel)
        for name, assigned in values.items():
            if any(self._is_wide(value) for value in assigned):
                self.wide.add(name)

    def narrow(self, s: Narrow) -> list[str]:
        param = self.kernel.param(s.tensor)
        stride = stride_names(param)[param.shape.index(f"{s.axis}_len")]
        name = self.narrowed[s.tensor] = self._named((s.tensor, "rows"), f"{s.tensor}_rows")
        whole = s.tensor
        if s.page is not None and s.page.axes:
            page, first = (f"tl.cast({self.expr(e)}, tl.int64)" for e in (s.page, s.first))
            places = self._named((s.tensor, "places"), f"{s.tensor}_places")
            beside = (
                "[:, None]" if param.shape[-1] in DIMENSION_CONSTANTS else ""
            )  # columns, where it has any
            return [
                f"{places} = {page} * {stride_names(param)[0]} + {first} * {stride}",
                f"{name} = {s.tensor} + {places}{beside}",
            ]
        if s.page is not None:
            whole += f" + tl.cast({self.expr(s.page)}, tl.int64) * {stride_names(param)[0]}"
        return [f"{name} = {whole} + tl.cast({self.expr(s.first)}, tl.int64) * {stride}"]

    def _named(self, key: object, wish: str) -> str:
        raise NotImplementedError

    def address(
        self, tensor: str, indices: tuple[Expr, ...], axes: tuple[str, ...], *, clamp: bool
    ) -> Address:
        """Where tensor[indices] lies, as a tile over `axes`.

        Positions q_idx, kv_idx, d_idx, dv_idx past the end are masked. Any other index of a captured tensor is clamped
        to its range for reading (`clamp`) and masked for writing.
        """
        param = self.kernel.param(tensor)
        base, offset, inside = [self.narrowed.get(tensor, tensor)], list[str](), list[str]()
        for index, size, stride in zip(indices, param.shape, stride_names(param), strict=True):
            axis = tile_axis(index)
            if axis in COLUMNS:
                position = self.expr(index, axes, ATOM)
                offset.append(f"{position} * {stride}")
                if self.kernel.block(axis) != block_size(self.kernel, axis):
                    inside.append(f"{position} < {DIMENSION_CONSTANTS.get(size, size)}")
            elif axis is not None:
                inside.append(f"{self.expr(index, axes, ATOM)} < {size}")
                if len(indices) == 1:
                    offset.append(f"{self.expr(index, axes, ATOM)} * {stride}")
                else:
                    base.append(f"{axis}_row * {stride}")
                    offset.append(f"{axis}_tile{self.broadcast((axis,), axes)} * {stride}")
            elif not (isinstance(index, Const) and index.value == 0):
                text, bound = self._other(index, size, axes, captured(param), clamp)
                inside += bound
                wide = self._is_wide(index) or bool(index.axes and len(indices) == 1)
                place = f"{text if wide else f'tl.cast({text}, tl.int64)'} * {stride}"
                place = stride if index is Const(1) and not captured(param) else place
                (offset if index.axes else base).append(place)
        conditions = inside[0] if len(inside) == 1 else " & ".join(f"({c})" for c in inside)
        joined = " + ".join(offset)
        return Address(" + ".join(base), f"({joined})" if len(offset) > 1 else joined, conditions)

    def _other(
        self, index: Expr, size: str, axes: tuple[str, ...], of_captured: bool, clamp: bool
    ) -> tuple[str, list[str]]:
        """An index that is no plain position: its text, and the conditions of being inside."""
        if of_captured and clamp:
            text = self.expr(index, axes)
            return (
                f"tl.minimum({text if self.is_non_negative(index) else f'tl.maximum({text}, 0)'}, {size} - 1)",
                [],
            )
        text = self.expr(index, axes, INFIX[Op.MUL][1])
        if not of_captured and (not index.axes or size in LISTED):
            return text, []  # batch and head come from the grid, the places of lists from lists
        low = [] if self.is_non_negative(index) else [f"{self.expr(index, axes, INFIX[Op.ADD][1])} >= 0"]
        return text, [*low, f"{self.expr(index, axes, INFIX[Op.ADD][1])} < {size}"]

    def _is_wide(self, index: Expr) -> bool:
        match index:
            case Var(name):
                return name in self.wide
            case Load():
                return False  # wherever it was read, what was read has 32 bits
            case _:
                return any(self._is_wide(o) for o in index.operands)

    def is_non_negative(self, e: Expr) -> bool:
        """Whether an integer is certainly >= 0: then Triton's // and % are Python's."""
        bound = self.lower_bound(e)
        return bound is not None and bound >= 0

    def lower_bound(self, e: Expr) -> int | None:
        """A number that an integer is never below, None where none is known."""
        match e:
            case Const(value):
                return int(value)
            case Var(name):
                return self.lowest.get(name)
            case Load(tensor) if self.kernel.param(tensor).shape[-1] in LISTED:
                return 0
            case Call(Op.SUB, (a, Const(value))) if (low := self.lower_bound(a)) is not None:
                return low - int(value)
            case Call(Op.MAX, (a, b)):
                known = [low for low in (self.lower_bound(a), self.lower_bound(b)) if low is not None]
                return max(known) if known else None
            case Call(Op.ADD | Op.MUL | Op.FLOORDIV | Op.MOD | Op.MIN as op, (a, b)):
                return _lower_bound_of(op, self.lower_bound(a), self.lower_bound(b))
            case Call(Op.WHERE, (_, a, b)):
                return _lower_bound_of(Op.MIN, self.lower_bound(a), self.lower_bound(b))
            case _:
                return None


def _lower_bound_of(op: Op, a: int | None, b: int | None) -> int | None:
    if a is None or b is None:
        return None
    if op is Op.ADD:
        return a + b
    if op is Op.MIN:
        return min(a, b)
    if a < 0 or b < 0:
        return None
    return a * b if op is Op.MUL else 0

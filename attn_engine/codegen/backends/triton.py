"""Triton spellings: one kernel becomes one readable file that imports only triton.

The file is complete: block sizes are constants at its top, device functions that it needs stand before the kernel.
A launch passes what `argument_names` lists, in that order.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import ClassVar

from attn_engine.codegen.backends.triton_address import (
    BLOCKS,
    DIMENSION_CONSTANTS,
    Address,
    block_size,
    captured,
    stride_names,
)  # fmt: skip
from attn_engine.codegen.backends.triton_choices import Choosing, choice_lines, choice_names
from attn_engine.codegen.backends.triton_descriptors import (
    TileDescriptor,
    about,
    descriptor_name,
    tile_descriptors,
    tile_load,
)
from attn_engine.codegen.backends.triton_functions import HELPERS, helper_lines
from attn_engine.codegen.backends.triton_grid import positions, tile_positions, unread
from attn_engine.codegen.backends.triton_layout import WIDTH, wrapped
from attn_engine.codegen.backends.triton_types import TYPES, element_storage, widened
from attn_engine.codegen.lower.columns import cut_columns
from attn_engine.codegen.lower.emit import Names
from attn_engine.codegen.lower.scaled import multiplied
from attn_engine.codegen.render import ATOM, ordered
from attn_engine.ir.expr import COLUMNS, Call, Expr, Full, Load, Var, transform
from attn_engine.ir.ops import DType, Op, Storage
from attn_engine.ir.tile import (
    Accumulate,
    If,
    Kernel,
    Let,
    Loop,
    Stmt,
    StoreTile,
    map_expressions,
    walk,
)

SIZES = ("batches", "heads", "kv_heads", "q_len", "kv_len")
LENGTHS = {"q_len", "kv_len"}


@dataclass(frozen=True, slots=True)
class TritonOptions:
    """How a kernel is spelled, compiled and launched.

    num_warps: per program instance. num_stages: of the load pipeline. descriptors: tiles that loops read come as tensor
    descriptors, where the target has a tensor memory accelerator.
    """

    num_warps: int = 4
    num_stages: int = 2
    descriptors: bool = False


def render_triton(kernel: Kernel, options: TritonOptions | None = None) -> str:
    """The text of a Python file that defines the kernel as a `@triton.jit` function of the kernel's name."""
    options = options or TritonOptions()
    launch = f"launch with num_warps={options.num_warps}, num_stages={options.num_stages}"
    renderer = TritonRenderer(descriptors=options.descriptors)
    return renderer.render(replace(kernel, header=(*kernel.header, launch)))


@lru_cache(maxsize=1024)
def argument_names(kernel: Kernel, descriptors: bool = False) -> tuple[str, ...]:
    """The rendered kernel's arguments in order: tensors, strides, numbers, sizes; those it never reads are left out."""
    renderer = TritonRenderer(descriptors=descriptors)
    renderer.render(kernel)
    return tuple(name for group in renderer.arguments for name in group)


class TritonRenderer(Choosing):
    """Renders one kernel; use a fresh one for each."""

    functions: ClassVar[Mapping[Op, str]] = {
        Op.MAX: "tl.maximum", Op.MIN: "tl.minimum", Op.WHERE: "tl.where", Op.ABS: "tl.abs", Op.FLOOR: "tl.floor",
        Op.EXP: "tl.exp", Op.EXP2: "tl.exp2", Op.LOG: "tl.log", Op.LOG2: "tl.log2", Op.TANH: "tanh",
        Op.SIGMOID: "tl.sigmoid", Op.SQRT: "tl.sqrt", Op.RSQRT: "tl.rsqrt", Op.SIN: "tl.sin", Op.COS: "tl.cos",
        Op.FLOORDIV: "floor_divide", Op.MOD: "floor_modulo", Op.BIT: "bit_of",
    }  # fmt: skip

    arguments: list[list[str]]  # in groups, one line of the signature each
    _said: list[str]  # bases named before the statement above

    def __init__(self, *, descriptors: bool = False) -> None:
        self._with_descriptors = descriptors
        self._described: tuple[TileDescriptor, ...] = ()

    # -- the file

    def render(self, kernel: Kernel) -> str:
        kernel = multiplied(cut_columns(kernel))
        self.element = element_storage(kernel)
        self._described = tile_descriptors(kernel) if self._with_descriptors else ()
        self.kernel = replace(kernel, body=map_expressions(kernel.body, self._widened))
        self.learn(self.kernel)
        self.narrowed = {}
        self._hoisted: list[str] = []
        self._names_of: dict[object, str] = {}
        self._renamed = self._renamings()
        body = self.block(self.kernel.body, depth=1)
        body = [*positions(self.kernel, "\n".join(body)), *body]
        body = [line for line in body if not unread(line, body)]
        text = "\n".join(body)
        self.arguments = self._arguments(text)
        used = {name for name in HELPERS if re.search(rf"\b{name}\(", text)}
        helpers = [*helper_lines(used, self.element), *choice_lines(text)]
        return "\n".join([*self._top(text), *helpers, *self._signature(), *body]) + "\n"

    def _top(self, body: str) -> list[str]:
        lines = [
            *(f"# {line}" for line in self.kernel.header),
            *about(self._described),
            "import triton",
            "import triton.language as tl",
            "",
        ]
        without_blocks = len(lines)
        for axis, size in self.kernel.tile:
            block = block_size(self.kernel, axis)
            if axis in COLUMNS and block != size:
                columns = self.kernel.first_column(axis) + size
                lines.append(f"{_dimension(axis)} = tl.constexpr({columns})")
            if re.search(rf"\b{BLOCKS[axis]}\b", body):
                lines.append(f"{BLOCKS[axis]} = tl.constexpr({block})")
        return [*lines, *["", ""][len(lines) == without_blocks :]]

    def _arguments(self, body: str) -> list[list[str]]:
        """The arguments that the body reads: tensors, then the strides of each, then numbers and sizes."""
        params = self.kernel.params
        own_sizes = dict.fromkeys(s for p in params if captured(p) for s in p.shape)
        groups = [
            [name for p in params for name in self._names_of_tensor(p.name)],
            *(list(stride_names(p)) for p in params),
            [*dict.fromkeys([*(s.name for s in self.kernel.scalars), *SIZES])],
            list(own_sizes),
        ]
        words = set(re.findall(r"\w+", body)) | {p.name for p in params}
        words |= {d.name for d in self._described}
        words -= LENGTHS & {s.name for s in walk(self.kernel.body) if isinstance(s, Let)}
        return [kept for group in groups if (kept := [name for name in group if name in words])]

    def _names_of_tensor(self, tensor: str) -> list[str]:
        """Its argument, or those of the descriptors of its pieces."""
        return [d.name for d in self._described if d.tensor == tensor] or [tensor]

    def _signature(self) -> list[str]:
        """Lengths, counts and row vectors' strides change from call to call: no recompilation for their values."""
        numbers = {s.name for s in self.kernel.scalars}
        rows = {
            s
            for p in self.kernel.params
            if len(p.shape) == 3 and not captured(p)
            for s in stride_names(p)[:-1]
        }
        changing = numbers | rows | set(SIZES)
        fixed = [n for group in self.arguments for n in group if n in changing or "_size_" in n]
        quoted = textwrap.wrap(", ".join(f'"{name}"' for name in fixed), WIDTH - 4)
        return [
            "@triton.jit(do_not_specialize=[",
            *(f"    {line}" for line in quoted),
            "])  # fmt: skip",
            f"def {self.kernel.name}(",
            *(f"    {', '.join(group)}," for group in self.arguments),
            "):  # fmt: skip",
        ]

    # -- names

    def _renamings(self) -> dict[str, str]:
        """New names for a user's values that would hide the file's own names."""
        own = {"tl", "triton", "float", *HELPERS, *BLOCKS.values(), *DIMENSION_CONSTANTS.values()}
        own |= {f"{axis}_{what}" for axis in ("q", "kv") for what in ("tile", "row")} | {"place"}
        own |= choice_names(self.kernel)
        for p in self.kernel.params:
            own |= {p.name, *stride_names(p), *p.shape}
        own -= LENGTHS  # a kernel over sequences sets them
        taken = Names(own | {s.name for s in walk(self.kernel.body) if isinstance(s, Let)})
        renamed: dict[str, str] = {}
        for s in walk(self.kernel.body):
            if isinstance(s, Let) and s.name in own and s.name not in renamed:
                renamed[s.name] = taken.fresh(f"{s.name}_value")
        self._taken = taken
        return renamed

    def _named(self, key: object, wish: str) -> str:
        """A name for a hoisted value, the same for the same key."""
        if key not in self._names_of:
            self._names_of[key] = self._taken.fresh(wish)
        return self._names_of[key]

    # -- statements

    def block(self, body: tuple[Stmt, ...], depth: int) -> list[str]:
        outer, self._depth, self._said = self._depth, depth, []
        lines = super().block(body, depth)
        self._depth, self._said = outer, []
        return lines or ["    " * depth + "pass"]

    def statement(self, s: Stmt) -> list[str]:
        self._hoisted = []
        lines = super().statement(s)
        # The pieces of one tile have one base: it is said once.
        own = re.compile(rf"tl\.load|\b{s.name if isinstance(s, Let) else 'tl'}\b")
        still_true = [x for x in self._hoisted if not own.search(x)]
        self._hoisted, self._said = [x for x in self._hoisted if x not in self._said], still_true
        if isinstance(s, Let):
            comment, assignment = lines[:-1], lines[-1]
            said = s.source == self._source  # the line above came from the same line of the user's
            lines = [*([] if said else comment), *self._hoisted, assignment]
            self._source = s.source
        else:
            lines, self._source = [*self._hoisted, *lines], ""
        return [piece for line in lines for piece in wrapped(line, self._depth)]

    _source = ""
    _depth = 1

    def let(self, s: Let) -> list[str]:
        name = self._renamed.get(s.name, s.name)
        if self._is_described(s.value):
            return [f"{name} = {self._tile(s)}"]
        if isinstance(s.value, Load):
            return [f"{name} = {self._loaded(s.value, self.span(s.value))}"]
        return [f"{name} = {self.expr(s.value)}"]

    def _is_described(self, e: Expr) -> bool:
        return isinstance(e, Load) and any(d.tensor == e.tensor for d in self._described)

    def _tile(self, s: Let) -> str:
        """A load through a descriptor: batch, head, first row and column of the tile."""
        load = tile_load(self.kernel, s)
        assert load is not None
        rows, columns = (i.axes[0] for i in load.indices[2:])
        place = [self.expr(i) for i in load.indices[:2]]
        place += [f"{rows}_start", str(self.kernel.first_column(columns))]
        name = descriptor_name(load.tensor, columns)
        return f"load_tile({', '.join([name, *place, BLOCKS[rows], BLOCKS[columns]])})"

    def loop(self, s: Loop) -> list[str]:
        lo, hi = self.expr(s.lo), self.expr(s.hi)
        if s.axis is None:
            return [f"for {s.var} in tl.range({lo}, {hi}):"]
        if self.is_flat(s):
            return [f"{s.var} = {lo}", *tile_positions(s.axis)]
        return [
            f"for {s.var} in tl.range({lo}, {hi}, {BLOCKS[s.axis]}):",
            *(f"    {line}" for line in tile_positions(s.axis)),
        ]

    def is_flat(self, s: Loop | If) -> bool:
        return isinstance(s, Loop) and s.axis is not None and s.is_one_tile(self.kernel.block(s.axis))

    def store(self, s: StoreTile) -> list[str]:
        axes = self._index_axes(s.indices)
        address = self._based(s.tensor, self.address(s.tensor, s.indices, axes, clamp=False))
        mask = f", mask={address.inside}" if address.inside else ""
        return [f"tl.store({address.pointer}, {self.expr(s.value, axes)}{mask})"]

    def accumulate(self, s: Accumulate) -> list[str]:
        """Read, add, write. The barrier orders this tile's writes before other threads' reads of the next tile's."""
        axes = self._index_axes(s.indices)
        address = self._based(s.tensor, self.address(s.tensor, s.indices, axes, clamp=False))
        place = self._named((s.tensor, "place"), f"{s.tensor}_place")
        old = self._named((s.tensor, "old"), f"{s.tensor}_old")
        mask = f", mask={address.inside}" if address.inside else ""
        other = ", other=0.0" if address.inside else ""
        return [
            f"{place} = {address.pointer}",
            f"{old} = tl.load({place}{mask}{other})",
            f"tl.store({place}, {old} + {self.expr(s.value, axes, 6)}{mask})",
            "tl.debug_barrier()",
        ]

    def _index_axes(self, indices: tuple[Expr, ...]) -> tuple[str, ...]:
        return ordered(tuple(a for i in indices for a in i.axes), self.kernel.order)

    def _based(self, tensor: str, address: Address) -> Address:
        """The same address with its scalar part named on a line of its own."""
        if not address.offset or address.base == tensor:
            return address
        name = self._named((tensor, address.base), f"{tensor}_base")
        line = f"{name} = {address.base}"
        if line not in self._hoisted:
            self._hoisted.append(line)
        return replace(address, base=name)

    # -- expressions

    def expr(self, e: Expr, axes: tuple[str, ...] | None = None, parent: int = 0) -> str:
        match e:
            case Var(name):
                have = self.span(e)
                return self._renamed.get(name, name) + self.broadcast(have, have if axes is None else axes)
            case Full():
                have = self.span(e)
                return self.full(e) + self.broadcast(have, have if axes is None else axes)
            case _:
                return super().expr(e, axes, parent)

    def call(self, e: Call, axes: tuple[str, ...], parent: int) -> str:
        match e.op:
            case Op.FLOORDIV | Op.MOD if not all(self.is_non_negative(a) for a in e.args):
                return self.function(e.op, [self.expr(a, axes) for a in e.args])
            case Op.TO_FLOAT | Op.TO_INT:
                return self._converted(e, axes, parent)
            case Op.NOT if (
                not e.axes
            ):  # `~` of a scalar that the interpreter holds as a Python bool is never false
                text = f"{self.expr(e.args[0], axes, 3)} == 0"
                return f"({text})" if parent > 1 else text
            case _:
                return super().call(e, axes, parent)

    def _converted(self, e: Call, axes: tuple[str, ...], parent: int) -> str:
        (x,) = e.args
        if x.dtype is e.dtype:
            return self.expr(x, axes, parent)
        target = f"tl.{self.compute}" if e.op is Op.TO_FLOAT else "tl.int32"
        if not x.axes:  # may be a plain number, which has no methods
            return f"tl.cast({self.expr(x, axes)}, {target})"
        return f"{self.expr(x, axes, ATOM)}.to({target})"

    def load(self, e: Load, axes: tuple[str, ...]) -> str:
        """Loads within an expression get a line and a name of their own."""
        name = self._named(e, f"{e.tensor}_value")
        line = f"{name} = {self._loaded(e, self.span(e))}"
        if line not in self._hoisted:
            self._hoisted.append(line)
        return name + self.broadcast(self.span(e), axes)

    def _loaded(self, e: Load, axes: tuple[str, ...]) -> str:
        address = self._based(e.tensor, self.address(e.tensor, e.indices, axes, clamp=True))
        storage = self.kernel.param(e.tensor).storage
        other = "0.0" if storage.floating else "0"
        mask = f", mask={address.inside}, other={other}" if address.inside else ""
        text = f"tl.load({address.pointer}{mask})"
        if storage is Storage.FLOAT8:
            return f"float8_values({text})"
        if e.kind is DType.FLOAT and TYPES.get(storage) != self.compute:
            return f"{text}.to(tl.{self.compute})"
        if e.kind is DType.INT and storage is not Storage.INT32:
            return f"{text}.to(tl.int32)"
        return text

    def full(self, e: Full) -> str:
        if not e.axes:
            return self.number(e.value)
        shape = ", ".join(BLOCKS[axis] for axis in self.span(e))
        return f"tl.full([{shape}], {self.number(e.value)}, tl.{self.compute})"

    def dot(self, left: str, right: str) -> str:
        exact = ', input_precision="ieee"' if self.element in (Storage.FLOAT32, Storage.FLOAT64) else ""
        return f"tl.dot({left}, {right}{exact})"

    def cast(self, x: str, like: str) -> str:
        if TYPES[self.kernel.param(like).storage] == self.compute:
            return x
        described = any(d.tensor == like for d in self._described)
        return f"{x}.to({like}.dtype{'' if described else '.element_ty'})"

    def reduce(self, kind: str, x: str, axis: int) -> str:
        return f"tl.{kind}({x}, axis={axis})"

    # -- element types

    @property
    def compute(self) -> str:
        """The type that FLOAT values have."""
        return "float64" if self.element is Storage.FLOAT64 else "float32"

    def _widened(self, root: Expr) -> Expr:
        """Arithmetic on stored elements happens in the compute type."""
        if TYPES[self.element] == self.compute:
            return root
        return transform(root, widened)


def _dimension(axis: str) -> str:
    return "DIM_V" if axis.startswith("dv") else "DIM_QK"

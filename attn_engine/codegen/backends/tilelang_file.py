"""The frame of a generated TileLang file, and expressions of one element: names, types, arguments, loads."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Mapping
from dataclasses import replace

from attn_engine.codegen.backends.tilelang_sequences import LENGTHS, PAGES
from attn_engine.codegen.backends.tilelang_types import (
    BLOCKS,
    BYTES,
    COUNTERS,
    COUNTS,
    DIMENSIONS,
    TileLangOptions,
    dtype_name,
    stride_names,
)
from attn_engine.codegen.backends.triton_address import GRID_SIZES, captured, tile_axis
from attn_engine.codegen.backends.triton_layout import WIDTH
from attn_engine.codegen.lower.emit import Names
from attn_engine.codegen.lower.placed import Buffer, CopyIn, CopyOut, PlacedKernel, Steps, walk_placed
from attn_engine.codegen.lower.placement import WIDE_RANK
from attn_engine.codegen.render import ATOM, Renderer
from attn_engine.ir.expr import Call, Const, Expr, Full, Load, Var, substitute
from attn_engine.ir.ops import DType, Number, Op, Storage
from attn_engine.ir.printer import INFIX
from attn_engine.ir.tile import If, Kernel, Let, Loop, Narrow, Param, Stmt, map_expressions, walk

# TileLang knows nothing of run-time strides, and copies element by element what may begin anywhere.
ALIGNED = '''
def begin_aligned(elements, *strides):
    """Rows begin at multiples of so many, which the launch sees to: one instruction may copy them."""
    for stride in strides:
        T.evaluate(T.assume(stride % elements == 0))
'''

REGISTERS = (40, 232)  # of a copying and of a computing thread: 128 and 256 of them have 65536
_LENGTHS = {"q": "q_len", "kv": "kv_len"}


class TileLangFile(Renderer):
    """The part of the TileLang renderer that does not look at statements."""

    options: TileLangOptions
    placed: PlacedKernel
    buffers: dict[str, Buffer]
    sizes: Mapping[str, int]
    element: Storage
    compute: str
    firsts: Mapping[str, Narrow]  # where the rows of a sequence begin, of tensors that hold several
    _loaded: dict[Expr, str]
    _hoisted: list[str]

    # -- the file

    def file(self, body: list[str]) -> str:
        text = "\n".join(body)
        kernel = self.kernel
        threads = "" if self.options.cpu else ", threads=THREADS"
        grid, names = self._grid()
        open_kernel = f"with T.Kernel({', '.join(grid)}{threads}) as ({', '.join(names)}):"
        if len(names) == 1:
            open_kernel = f"with T.Kernel({grid[0]}{threads}) as {names[0]}:"
        return (
            "\n".join(
                [
                    *(f"# {line}" for line in kernel.header),
                    "import tilelang.language as T",
                    "",
                    *self._constants(text),
                    "",
                    *self._dynamic(),
                    "",
                    "",
                    *([] if self.options.cpu else [*ALIGNED.strip().splitlines(), "", ""]),
                    "@T.prim_func",
                    f"def {kernel.name}(",
                    *(f"    {line}" for line in self._arguments()),
                    "):  # fmt: skip",
                    f"    {open_kernel}",
                    *body,
                ]
            )
            + "\n"
        )

    def _constants(self, body: str) -> list[str]:
        used = body + "\n".join(self._arguments()) + " ".join(self._grid()[0])
        named = {BLOCKS[a]: n for a, n in self.sizes.items()}
        named |= {("DIM_QK" if a == "d" else "DIM_V"): n for a, n in self.kernel.tile if a in ("d", "dv")}
        lines = [f"{name} = {n}" for name, n in named.items() if re.search(rf"\b{name}\b", used)]
        if self.options.cpu:
            return lines
        lines.append(f"THREADS = {self.options.threads}")
        return [*lines, "FULL_ROW = T.GemmWarpPolicy.FullRow"] if "FULL_ROW" in body else lines

    def _dynamic(self) -> list[str]:
        """Lengths and strides are read from the tensors of a call: no compilation for their values."""
        sizes = dict.fromkeys(s for p in self.kernel.params for s in p.shape if s not in DIMENSIONS)
        lines: list[str] = []
        for part in textwrap.wrap(", ".join(sizes), (WIDTH - 16) // 2):
            part = part.rstrip(",")
            lines.append(f'{part} = T.dynamic("{part}")')
        for p in self.kernel.params:
            if names := stride_names(p):
                lines.append(f'{p.name}_strides = T.dynamic("{", ".join(names)}", "int64")')
        return lines

    def _arguments(self) -> list[str]:
        sizes = {s for p in self.kernel.params for s in p.shape}
        numbers = [s for s in self.kernel.scalars if s.name not in sizes]
        kinds = {
            DType.FLOAT: self.compute,
            DType.INT: "int32",
            DType.BOOL: "bool",
            DType.ELEMENT: self.compute,
        }
        return [
            *(f"{p.name}: {self._tensor(p)}," for p in self.kernel.params),
            *(f"{s.name}: T.{kinds[s.dtype]}," for s in numbers),
        ]

    def _tensor(self, p: Param) -> str:
        shape = ", ".join(DIMENSIONS.get(size, size) for size in p.shape) + "," * (len(p.shape) == 1)
        own, many = f"{p.name}_strides", len(stride_names(p)) > 1
        if captured(p):
            strides = own if many else f"({own},)"
        elif len(p.shape) == 1:
            strides = "(1,)"
        else:
            strides = f"({'*' * many}{own}, 1)"
        return f'T.StridedTensor(({shape}), {strides}, "{p.storage.value}")'

    def _grid(self) -> tuple[list[str], list[str]]:
        """Sizes and names of the launch; it has three dimensions, which further axes share the last of."""
        sizes = [
            f"T.ceildiv({_LENGTHS[a]}, {BLOCKS[a]})" if a in _LENGTHS else GRID_SIZES[a]
            for a in self.kernel.grid
        ]
        names = [f"{a}_tile" if a in _LENGTHS else a for a in self.kernel.grid]
        if not sizes:
            return ["1"], ["block"]
        if len(sizes) > 3:
            return [*sizes[:2], " * ".join(sizes[2:])], [*names[:2], "_and_".join(names[2:])]
        return sizes, names

    def _copied(self) -> list[Param]:
        """Tensors that are copied in or out by whole tiles."""
        copies = walk_placed(self.placed.body)
        names = {
            s.load.tensor if isinstance(s, CopyIn) else s.tensor
            for s in copies
            if isinstance(s, CopyIn | CopyOut)
        }
        wide = {p.name for p in self.kernel.params if p.name in self.firsts and len(p.shape) == WIDE_RANK}
        return [p for p in self.kernel.params if p.name in names | wide]

    def positions(self) -> list[str]:
        """What this block is: where its tile starts, and grid indices that share a dimension of the launch."""
        lines: list[str] = []
        grid = self.kernel.grid
        for p in [] if self.options.cpu else self._copied():
            star = "*" * (len(p.shape) > 2)
            lines.append(f"begin_aligned({self.options.line // BYTES[p.storage]}, {star}{p.name}_strides)")
        if len(grid) > 3:
            shared, third = list(grid[2:]), self._grid()[1][2]
            for axis in shared[:-1]:
                lines.append(f"{axis} = {third} % {GRID_SIZES[axis]}")
                third = f"{third} // {GRID_SIZES[axis]}"
            lines.append(f"{shared[-1]} = {third}")
        for i, axis in enumerate(grid):
            if axis in _LENGTHS:
                tile = f"{axis}_tile"
                if self.kernel.heavy_last and i == 0:
                    tile = f"(T.ceildiv({_LENGTHS[axis]}, {BLOCKS[axis]}) - 1 - {tile})"
                lines.append(f"{axis}_start = {tile} * {BLOCKS[axis]}")
        return [f"        {line}" for line in [*self._registers(), *lines]]

    @property
    def stages(self) -> int:
        """Copies that run ahead. Only the first loop of a kernel is given warps that copy, and TileLang 0.1.15 lowers
        the others, whose lengths are run-time numbers, with one stage alone. Rows of sequences are read by the
        threads themselves, and a loop that begins anew for every block of a list is over before it could run ahead."""
        one = self._loops() <= 1 and not self.firsts and not self._begins_anew()
        return self.options.num_stages if one else min(self.options.num_stages, 1)

    def _loops(self) -> int:
        return sum(isinstance(s, Steps) and s.pipelined for s in walk_placed(self.placed.body))

    def _begins_anew(self) -> bool:
        """Whether the loop over tiles stands in another loop."""
        loops = [s for s in walk_placed(self.placed.body) if isinstance(s, Steps) and not s.pipelined]
        return any(isinstance(x, Steps) and x.pipelined for s in loops for x in walk_placed(s.body))

    def _registers(self) -> list[str]:
        """How registers are shared out: the 24 of copying warps, TileLang's choice, do not hold a window's bounds."""
        if self.options.cpu or not self.options.specialised or self.stages < 2 or not self._loops():
            return []
        producer, consumer = REGISTERS
        return [f"T.annotate_producer_reg_dealloc({producer})", f"T.annotate_consumer_reg_alloc({consumer})"]

    def allocations(self) -> list[str]:
        lines: list[str] = []
        for b in self.placed.buffers:
            scope = "local" if self.options.cpu else b.scope.value
            shape = ", ".join(self.extent(a) for a in b.axes) + "," * (len(b.axes) == 1)
            dtype = dtype_name(b.dtype, self.element, self.compute)
            lines.append(f'        {b.name} = T.alloc_{scope}(({shape}), "{dtype}")')
        return lines

    def extent(self, axis: str) -> str:
        if axis in ("d", "dv") and self.sizes[axis] == self.kernel.block(axis):
            return "DIM_QK" if axis == "d" else "DIM_V"
        return BLOCKS[axis]

    # -- names

    def renamed(self, kernel: Kernel) -> Kernel:
        """Users' values that would hide the file's own names under other ones."""
        own = {
            "T",
            "THREADS",
            "FULL_ROW",
            *COUNTERS.values(),
            *BLOCKS.values(),
            *DIMENSIONS.values(),
            "step",
            "float",
        }
        own |= {f"{axis}_{what}" for axis in ("q", "kv") for what in ("tile", "steps")}
        for p in kernel.params:
            own |= {p.name, *stride_names(p), *p.shape}
        lets = [s for s in walk(kernel.body) if isinstance(s, Let)]
        self.taken = Names(own | {s.name for s in lets})
        clashes = {s.name: s.var for s in lets if s.name in own}
        new = {name: self.taken.fresh(f"{name}_value") for name in clashes}
        if not new:
            return kernel
        variables: dict[Expr, Expr] = {
            Var(s.name, s.value.dtype, s.value.axes): Var(new[s.name], s.value.dtype, s.value.axes)
            for s in lets
            if s.name in new
        }
        body = map_expressions(kernel.body, lambda e: substitute(e, variables))
        return replace(kernel, body=_with_names(body, new))

    # -- expressions of one element

    def expr(self, e: Expr, axes: tuple[str, ...] | None = None, parent: int = 0) -> str:
        match e:
            case Var(name):
                buffer = self.buffers.get(name)
                return name if buffer is None else f"{name}[{', '.join(COUNTERS[a] for a in buffer.axes)}]"
            case Full(value):
                return self.number(value)
            case _:
                return super().expr(e, axes, parent)

    def call(self, e: Call, axes: tuple[str, ...], parent: int) -> str:
        match e:
            case Call(Op.FLOORDIV | Op.MOD, (a, b)) if (
                not isinstance(b, Const) and is_count(a) and is_count(b)
            ):
                name = "T.truncdiv" if e.op is Op.FLOORDIV else "T.truncmod"
                return f"{name}({self.expr(a)}, {self.expr(b)})"
            case Call(Op.TO_FLOAT | Op.TO_INT, (x,)):
                if x.dtype is e.dtype:
                    return self.expr(x, axes, parent)
                kind = self.compute if e.op is Op.TO_FLOAT else "int32"
                return f'T.cast({self.expr(x)}, "{kind}")'
            case Call(Op.DIV, (a, b)) if a.dtype is not DType.FLOAT and b.dtype is not DType.FLOAT:
                return super().call(Call(Op.DIV, (Call(Op.TO_FLOAT, (a,)), b)), axes, parent)
            case Call(Op.BIT, (word, place)):
                return f"(T.bitwise_and(T.shift_right({self.expr(word)}, {self.expr(place)}), 1) != 0)"
            case Call(Op.ABS, (x,)) if self.options.cpu:  # its C has no fabs
                return f"T.max({self.expr(x)}, -{self.expr(x, None, ATOM)})"
            case Call(Op.NOT):
                return self.function(e.op, [self.expr(a) for a in e.args])
            case _:
                return super().call(e, axes, parent)

    def number(self, value: Number) -> str:
        if isinstance(value, float) and math.isinf(value):
            return "-" * (value < 0) + f'T.infinity("{self.compute}")'
        if isinstance(value, float) and math.isnan(value):
            return f'T.cast(float("nan"), "{self.compute}")'
        return repr(value)

    def load(self, e: Load, axes: tuple[str, ...]) -> str:
        """Loads within an expression of a loop nest get a line and a name of their own."""
        if not e.axes:
            return self.loaded(e)
        if e not in self._loaded:
            name = self.taken.fresh(f"{e.tensor}_value")
            self._hoisted.append(f"{name} = {self.loaded(e)}")
            self._loaded[e] = name
        return self._loaded[e]

    def loaded(self, e: Load) -> str:
        """One element, zero where a position lies past the end; other indices of captured tensors are clamped."""
        param = self.kernel.param(e.tensor)
        places = [
            self._clamped(i, size)
            if (captured(param) and tile_axis(i) is None) or size in ("q_blocks", "kv_blocks")
            else self.place(e.tensor, i, size)
            for i, size in zip(e.indices, param.shape, strict=True)
        ]
        inside = self.conditions(e.tensor, tuple(i for i in e.indices), positions_only=True)
        text = f"{e.tensor}[{', '.join(places)}]"
        if e.kind is DType.FLOAT and param.storage.value != self.compute:
            text = f'T.cast({text}, "{self.compute}")'
        if e.kind is DType.INT and param.storage is not Storage.INT32:
            text = f'T.cast({text}, "int32")'
        if not inside:
            return text
        zero = {DType.FLOAT: "0.0", DType.INT: "0", DType.BOOL: "False"}.get(e.kind, "0.0")
        if e.kind is DType.ELEMENT and param.storage.value != self.compute:
            zero = f'T.cast(0.0, "{param.storage.value}")'
        return f"T.if_then_else({' & '.join(inside)}, {text}, {zero})"

    def conditions(
        self, tensor: str, indices: tuple[Expr, ...], *, positions_only: bool = False
    ) -> list[str]:
        """What holds where an element lies inside its tensor."""
        param = self.kernel.param(tensor)
        found: list[str] = []
        for i, size in zip(indices, param.shape, strict=True):
            size = DIMENSIONS.get(size) or LENGTHS.get(size, size)
            axis = tile_axis(i)
            if axis in ("d", "dv"):
                if self.sizes[axis] != self.kernel.block(axis):
                    found.append(f"({self.expr(i)} < {size})")
            elif axis is not None:
                found.append(f"({self.expr(i)} < {size})")
            elif not positions_only and (i.axes or captured(param)):
                text = self.expr(i, None, INFIX[Op.LT][1] + 1)
                low = [] if is_count(i) else [f"({text} >= 0)"]
                found += [*low, f"({text} < {size})"]
        return [found[0][1:-1]] if len(found) == 1 else found

    def place(self, tensor: str, index: Expr, size: str) -> str:
        """Where along a dimension a position lies: those of a sequence begin at its first row, or in pages."""
        s = self.firsts.get(tensor)
        if s is not None and s.page is not None and size == PAGES:
            return self.expr(s.page)
        if s is None or LENGTHS.get(size) != f"{s.axis}_len":
            return self.expr(index)
        return f"{self.expr(s.first)} + {self.expr(index)}"

    def _clamped(self, index: Expr, size: str) -> str:
        text = self.expr(index)
        return f"T.min({text if is_count(index) else f'T.max({text}, 0)'}, {size} - 1)"


def is_count(e: Expr) -> bool:
    """Whether an integer is certainly not negative."""
    match e:
        case Const(value):
            return value >= 0
        case Var(name):
            return name in COUNTS
        case Call(Op.ADD | Op.MUL | Op.FLOORDIV | Op.MOD | Op.MIN, args):
            return all(is_count(a) for a in args)
        case Call(Op.MAX, args):
            return any(is_count(a) for a in args)
        case _:
            return False


def _with_names(body: tuple[Stmt, ...], new: dict[str, str]) -> tuple[Stmt, ...]:
    done: list[Stmt] = []
    for s in body:
        if isinstance(s, Let):
            s = replace(s, name=new.get(s.name, s.name))
        elif isinstance(s, Loop | If):
            s = replace(s, body=_with_names(s.body, new))
        done.append(s)
    return tuple(done)

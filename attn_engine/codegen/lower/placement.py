"""Placement: a memory for every tile of a kernel, and a statement for every copy, product and reduction.

1. Loops count tiles; a loop around a loop over tiles becomes one (`placement_loops`).
2. Each Let is split into fills, copies, products, reductions, and what is left: a Map of one step.
3. Neighbouring Maps over the same axes become one loop nest.
4. A name that only its own Map reads is a number of that trip; any other gets a buffer. What copies fill and products
   read is shared memory; left operands of products, accumulators and everything computed are fragments.
"""

from __future__ import annotations

from dataclasses import replace

from attn_engine.codegen.lower.emit import Names
from attn_engine.codegen.lower.listed import ENTRY
from attn_engine.codegen.lower.placed import (
    Branch,
    Buffer,
    Copy,
    CopyIn,
    CopyOut,
    Fill,
    Gemm,
    Map,
    Placed,
    PlacedKernel,
    ReduceInto,
    Scope,
    Step,
    Steps,
)
from attn_engine.codegen.lower.placement_loops import counted
from attn_engine.codegen.lower.placement_maps import fused, is_cheap, without_locals
from attn_engine.codegen.render import ordered, oriented
from attn_engine.ir.expr import Call, Cast, Const, Dot, Expr, Full, Load, Reduce, Var, postorder, substitute
from attn_engine.ir.ops import DType, Op
from attn_engine.ir.tile import (
    Accumulate,
    Choose,
    If,
    Kernel,
    Let,
    Loop,
    Narrow,
    Section,
    Stmt,
    StoreTile,
    expressions,
    walk,
)

WIDE_RANK = 4  # of Q, K, V, O and their gradients


def place(kernel: Kernel, *, rounds: bool) -> PlacedKernel:
    """The kernel with its tiles in buffers. rounds: elements are narrower than what products add up in."""
    placer = _Placer(kernel, rounds)
    body = fused(tuple(placer.block(kernel.body)), kernel.order[0])
    return PlacedKernel(kernel, tuple(without_locals(body, placer.buffers)), body, placer.waits)


class _Placer:
    def __init__(self, kernel: Kernel, rounds: bool) -> None:
        self.kernel, self.order, self.rounds = kernel, kernel.order, rounds
        self.buffers: dict[str, Buffer] = {}
        self._operands = _operands(kernel.body)
        self._names = Names({s.name for s in walk(kernel.body) if isinstance(s, Let)})
        self._loops = 0  # loops over tiles so far
        self._loop = 0  # the one that this statement is in
        self._entry: frozenset[str] = frozenset()  # what the entry of a list says, inside a loop over them
        self.waits = True
        # A copy would bring rows of the next sequence, which zeros in a product do not keep out where they are NaN.
        self._over_sequences = any(isinstance(s, Narrow) for s in walk(kernel.body))
        self._loaded_in: dict[str, int] = {}
        self._renamed: dict[Expr, Expr] = {}

    # -- statements

    def block(self, body: tuple[Stmt, ...]) -> list[Placed]:
        return [placed for s in body for placed in self.statement(s)]

    def statement(self, s: Stmt) -> list[Placed]:
        match s:
            case Section():
                return [s]
            case Loop():
                return self.loop(s)
            case If(condition, body):
                return [Branch(self.read(condition), tuple(self.block(body)))]
            case Let(name, value, source):
                return self.let(name, self.read(value), source)
            case StoreTile(tensor, indices, value):
                return self.store(tensor, tuple(self.read(i) for i in indices), self.read(value))
            case Accumulate(tensor, indices, value):
                lets, value = self.plain(self.read(value), f"{tensor}_part")
                place = tuple(self.read(i) for i in indices)
                return [*lets, self.mapped(Accumulate(tensor, place, value))]
            case Choose():
                raise AssertionError("selections are refused before this backend is asked")
            case Narrow():
                return []  # each access begins at the first row of its tensor

    def read(self, e: Expr) -> Expr:
        return substitute(e, self._renamed) if self._renamed else e

    def loop(self, s: Loop) -> list[Placed]:
        blocks = dict(self.kernel.tile)
        if s.axis is not None and s.is_one_tile(blocks[s.axis]):
            return [Let(s.var, self.read(s.lo)), *self.block(s.body)]
        c = counted(s, blocks, self._entry)
        before = [placed for let in c.before for placed in self.statement(let)]
        outer, renamed, entry = self._loop, dict(self._renamed), self._entry
        if s.var == ENTRY.name:
            self._entry |= {x.name for x in c.body if isinstance(x, Let)}
        pipelined = c.over_tiles and not any(isinstance(x, Loop) for x in walk(c.body))
        if pipelined:
            self._loops += 1
            self._loop = self._loops
            self.waits &= c.once
        body = tuple(self.block(c.body))
        self._loop, self._renamed, self._entry = outer, renamed, entry
        return [*before, Steps(c.var, self.read(c.first), self.read(c.stop), body, pipelined)]

    def let(self, name: str, value: Expr, source: str) -> list[Placed]:
        if not value.axes:
            return [Let(name, value, source)]
        name = self.own_name(name, value)
        match value:
            case Load() if self.is_plain(value):
                return [self.copy_in(name, value, source)]
            case Full():
                self.declare(name, value.axes, DType.FLOAT)
                return [Fill(name, value.value)]
            case Call(Op.ADD, (before, Dot() as product)) if before.axes == value.axes:
                own = isinstance(before, Var) and before.name == name
                self.declare(name, value.axes, DType.FLOAT)
                kept = [] if own else [*self.let(name, before, source)]
                return [*kept, *self.gemm(name, product, clear=False)]
            case _:
                lets, rest = self.plain(value, name)
                if isinstance(rest, Var) and rest.name == name:
                    return lets
                return [*lets, self.mapped(Let(name, rest, source))]

    def own_name(self, name: str, value: Expr) -> str:
        """The name, or another where a buffer over other axes has it: names of one loop mean nothing in the next."""
        known = self.buffers.get(name)
        if known is None or known.axes == ordered(value.axes, self.order):
            return name
        own = self._names.fresh(name)
        self._renamed[Var(name, value.dtype, value.axes)] = Var(own, value.dtype, value.axes)
        return own

    def store(self, tensor: str, indices: tuple[Expr, ...], value: Expr) -> list[Placed]:
        """Tiles of the outputs go through a copy, all else element by element."""
        if len(self.kernel.param(tensor).shape) != WIDE_RANK or not self.is_plain(
            Load(tensor, DType.ELEMENT, indices)
        ):
            lets, value = self.plain(value, f"{tensor}_tile")
            return [*lets, self.mapped(StoreTile(tensor, indices, value))]
        lets: list[Placed] = []
        if not (isinstance(value, Var) and value.name in self.buffers):
            name = self._names.fresh(f"{tensor}_tile")
            lets, value = self.let(name, value, ""), Var(name, DType.FLOAT, value.axes)
        assert isinstance(value, Var)
        if not self.rounds:
            return [*lets, self.copy_out(tensor, indices, value)]
        # Through shared memory, in whole lines: registers alone would write a few bytes of each at a time.
        rounded = self.declare(
            self._names.fresh(f"{tensor}_rounded"), value.axes, DType.ELEMENT, Scope.SHARED
        )
        out = self.copy_out(tensor, indices, Var(rounded.name, DType.ELEMENT, value.axes))
        return [*lets, Copy(rounded.name, value.name), out]

    def copy_out(self, tensor: str, indices: tuple[Expr, ...], tile: Var) -> CopyOut | Map:
        if self._over_sequences:
            return Map(ordered(tile.axes, self.order), (StoreTile(tensor, indices, tile),))
        return CopyOut(tensor, indices, tile.name)

    # -- values

    def copy_in(self, name: str, load: Load, source: str) -> CopyIn | Map:
        """Loops over tiles that follow each other own what they load: each of them is pipelined for itself."""
        if self._loaded_in.setdefault(name, self._loop) != self._loop:
            own = self._names.fresh(name)
            self._renamed[Var(name, load.dtype, load.axes)] = Var(own, load.dtype, load.axes)
            self._loaded_in[own] = self._loop
            self._operands |= {own} if name in self._operands else set()
            name = own
        rows = ordered(load.axes, self.order) == self.order[:1]
        scope = (
            Scope.FRAGMENT if rows or (name not in self._operands and len(load.axes) > 1) else Scope.SHARED
        )
        self.declare(name, load.axes, load.dtype, scope)
        if self._over_sequences:
            return Map(ordered(load.axes, self.order), (Let(name, load, source),))
        return CopyIn(name, load, ahead=self._loop > 0)

    def is_plain(self, load: Load) -> bool:
        """Whether a load is a tile of a tensor that no user's function reads: whole rows or columns in order."""
        shape = self.kernel.param(load.tensor).shape
        plain = all(not i.axes or (isinstance(i, Var) and i.name == f"{i.axes[0]}_idx") for i in load.indices)
        return plain and not any("_size_" in size for size in shape) and bool(load.indices[-1].axes)

    def plain(self, value: Expr, name: str) -> tuple[list[Placed], Expr]:
        """Statements for the products and reductions in a value, and what is left of it for a Map.

        name: of the value; its buffer holds a product on the way where that changes nothing that is still read.
        """
        placed: list[Placed] = []
        done: dict[Expr, Expr] = {}
        found = [e for e in postorder(value) if isinstance(e, Dot | Reduce)]
        free = all(not (isinstance(e, Var) and e.name == name) for e in postorder(value))
        for node in found:
            inside = substitute(node, {k: v for k, v in done.items() if k is not node})
            own = free and node.axes == value.axes and (isinstance(node, Dot) or node is value)
            wish = f"tile_{node.kind}" if isinstance(node, Reduce) else f"{name}_product"
            target = name if own else self._names.fresh(wish)
            free = free and not own
            if isinstance(inside, Dot):
                placed += self.gemm(target, inside, clear=True)
            elif isinstance(inside, Reduce):
                placed += self.reduce(target, inside)
            done[node] = Var(target, node.dtype, node.axes)
        return placed, substitute(value, done)

    def reduce(self, target: str, e: Reduce) -> list[Placed]:
        lets, source = self.named(e.x, f"{target}_terms")
        self.declare(target, e.axes, DType.FLOAT)
        return [*lets, ReduceInto(target, e.kind, source, e.axis)]

    def gemm(self, target: str, product: Dot, *, clear: bool) -> list[Placed]:
        left, right, transpose_left, transpose_right = oriented(product, self.order)
        self.declare(target, product.axes, DType.FLOAT)
        placed: list[Placed] = []
        names: list[str] = []
        for operand, in_registers in ((left, not transpose_left), (right, False)):
            inner = operand.x if isinstance(operand, Cast) else operand
            lets, name = self.named(inner, f"{target}_operand")
            placed += lets
            if isinstance(operand, Cast) and self.rounds:
                scope = Scope.FRAGMENT if in_registers else Scope.SHARED
                rounded = self.declare(f"{name}_rounded", inner.axes, DType.ELEMENT, scope)
                placed.append(Copy(rounded.name, name))
                name = rounded.name
            names.append(name)
        return [*placed, Gemm(target, names[0], names[1], transpose_left, transpose_right, clear)]

    def named(self, e: Expr, wish: str) -> tuple[list[Placed], str]:
        """A name for a tile; statements that make it where it has none."""
        if isinstance(e, Var):
            self.declare(e.name, e.axes, e.dtype)
            return [], e.name
        name = self._names.fresh(wish)
        return self.let(name, e, ""), name

    def mapped(self, step: Step) -> Map:
        axes = (
            step.value.axes
            if isinstance(step, Let)
            else tuple(a for i in (*step.indices, step.value) for a in i.axes)
        )
        if isinstance(step, Let) and not is_cheap(step, self.order[0]):
            rows = ordered(axes, self.order) == self.order[:1] or len(axes) > 1
            scope = Scope.FRAGMENT if rows else Scope.SHARED
            self.declare(step.name, axes, step.value.dtype, scope)
        return Map(ordered(axes, self.order), (_filled(step),))

    def declare(
        self, name: str, axes: tuple[str, ...], dtype: DType, scope: Scope = Scope.FRAGMENT
    ) -> Buffer:
        buffer = Buffer(name, scope, ordered(axes, self.order), dtype)
        known = self.buffers.setdefault(name, buffer)
        assert known.axes == buffer.axes, f"{name} is over {known.axes} and over {buffer.axes}"
        return known


def _filled(step: Step) -> Step:
    """Constant tiles inside a value are numbers."""

    def plain(e: Expr) -> Expr:
        return substitute(e, {x: Const(x.value) for x in postorder(e) if isinstance(x, Full)})

    return replace(step, value=plain(step.value))


def _operands(body: tuple[Stmt, ...]) -> set[str]:
    """Names of the tiles that products read as they were loaded."""
    nodes = (e for s in walk(body) for x in expressions(s) for e in postorder(x) if isinstance(e, Dot))
    return {x.name for e in nodes for x in e.operands if isinstance(x, Var)}

"""Tile kernels run directly with torch, one program instance after another, one statement after another.

This is what a machine without a C++ compiler falls back on, and the check of a lowering that no renderer took part
in. A tile is a tensor whose dimensions are its axes in the order of `AXES`; a value over no axis is a Python number.
Everything is computed in the compute type: float32, or float64 where the kernel's own tensors are float64.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import product

import torch
from torch import Tensor

from attn_engine.ir.expr import (
    AXES,
    COLUMNS,
    Call,
    Cast,
    Const,
    Dot,
    Expr,
    FirstColumns,
    Full,
    Load,
    Reduce,
    Var,
    in_order,
    postorder,
)
from attn_engine.ir.ops import INFO, Number, Storage
from attn_engine.ir.tile import (
    Accumulate,
    Choose,
    If,
    Kernel,
    Let,
    Loop,
    Narrow,
    Param,
    Section,
    Stmt,
    StoreTile,
)
from attn_engine.runtime.dense import apply_op, torch_kind
from attn_engine.runtime.tile_spans import Span

Value = Tensor | bool | int | float

_COUNTED = {
    "head": "heads", "kv_head": "kv_heads", "batch": "batches", "split": "splits",
    "tile": "tile_count", "turn": "batches",
}  # fmt: skip
_TILED = {"q": "q_len", "kv": "kv_len"}
_REDUCTION = {"max": torch.amax, "min": torch.amin, "sum": torch.sum}


def run_kernel(
    kernel: Kernel,
    tensors: Mapping[str, Tensor],
    scalars: Mapping[str, Number],
    sizes: Mapping[str, int] | None = None,
) -> None:
    """Run every program instance of `kernel`, writing its output tensors in place.

    tensors: one per parameter, by name, in the parameter's logical order of dimensions, any strides.
    scalars: the kernel's run-time numbers by name. sizes: "batches", "heads", "kv_heads", "q_len", "kv_len"; those
    that are dimensions of a parameter may be left out. Raises KeyError for anything missing.
    """
    known = {
        name: size for p in kernel.params for name, size in zip(p.shape, tensors[p.name].shape, strict=True)
    }
    numbers: dict[str, Number] = {**known, **(sizes or {}), **scalars}
    with torch.no_grad():
        for place in _instances(kernel, numbers):
            _Instance(kernel, tensors, numbers, place).run()


def _instances(kernel: Kernel, numbers: Mapping[str, Number]) -> Iterator[dict[str, int]]:
    """Each program instance's position on the grid; tile axes count tiles."""
    counts = [
        range(-(-int(numbers[_TILED[axis]]) // kernel.block(axis)))
        if axis in _TILED
        else range(int(numbers[_COUNTED[axis]]))
        for axis in kernel.grid
    ]
    for position in product(*reversed(counts)):
        yield dict(zip(reversed(kernel.grid), position, strict=True))


def compute_type(kernel: Kernel) -> torch.dtype:
    """The torch dtype of FLOAT in this kernel: its own tensors decide, captured ones do not."""
    own = (p for p in kernel.params if not any("_size_" in name for name in p.shape))
    return torch.float64 if any(p.storage is Storage.FLOAT64 for p in own) else torch.float32


def _torch_storage(storage: Storage) -> torch.dtype:
    return getattr(torch, storage.value)


class _Instance:
    """One program instance: the values of its names and the positions of its tiles."""

    def __init__(
        self,
        kernel: Kernel,
        tensors: Mapping[str, Tensor],
        numbers: Mapping[str, Number],
        place: Mapping[str, int],
    ) -> None:
        self.kernel = kernel
        self.params: dict[str, Param] = {p.name: p for p in kernel.params}
        self.whole = self.tensors = tensors
        self.device = next(iter(tensors.values())).device if tensors else torch.device("cpu")
        self.compute = compute_type(kernel)
        self.names: dict[str, Value] = dict(numbers)
        self.start: dict[str, int] = {}
        # Of a page: a dimension, and where position 0 lies in it.
        self.shifts: dict[str, tuple[int, int]] = {}
        self.listed: dict[str, tuple[int, Tensor]] = {}  # of an output: a dimension, and its rows by position
        self.sizes: dict[str, int] = dict(kernel.tile)
        for axis in (a for a in COLUMNS if a in self.sizes):
            self._place(axis, kernel.first_column(axis))
        for axis, position in place.items():
            if axis in _TILED:
                self._place(axis, position * self.sizes[axis])
            else:
                self.names[axis] = position

    def run(self) -> None:
        self._run(self.kernel.body)

    def _place(self, axis: str, start: int) -> None:
        """Put the tile of `axis` at `start`."""
        self.start[axis] = start
        self.names[f"{axis}_start"] = start
        self.names[f"{axis}_idx"] = torch.arange(start, start + self.sizes[axis], device=self.device)

    # Statements

    def _run(self, body: tuple[Stmt, ...]) -> None:
        for statement in body:
            match statement:
                case Section():
                    pass
                case Let(name, value):
                    self.names[name] = self.value(value)
                case Loop():
                    self._loop(statement)
                case If(condition, inner):
                    if self.value(condition):
                        self._scoped(inner)
                case Narrow():
                    self._narrow(statement)
                case Choose():
                    raise AssertionError("torch carries selections out by runtime/selection_dense.py")
                case StoreTile(name, indices, value) | Accumulate(name, indices, value):
                    self._write(name, indices, value, add=isinstance(statement, Accumulate))

    def _narrow(self, s: Narrow) -> None:
        rows = self.params[s.tensor].shape.index(f"{s.axis}_len")
        whole, length = self.whole[s.tensor], int(self._number(s.length))
        if s.page is not None and s.page.axes:
            self._gather_pages(s, whole, length)
            return
        first = int(self._number(s.first))
        if s.places is not None:
            found = self.whole[s.places][first : first + length].long()
            output = self.params[s.tensor].output
            if output:
                self.listed[s.tensor] = rows, found
            self.tensors = {**self.tensors, s.tensor: whole if output else whole.index_select(rows, found)}
            return
        if s.page is not None:
            page = int(self._number(s.page))
            whole = whole[page : page + 1]
            self.shifts[s.tensor] = (rows, first)
            length, first = first + length, 0
        self.tensors = {**self.tensors, s.tensor: whole.narrow(rows, first, length)}

    def _gather_pages(self, s: Narrow, whole: Tensor, length: int) -> None:
        """The rows of this tile, copied from their pages: (1, heads, rows, columns)."""
        assert s.page is not None
        start = self.start[s.axis]
        count = max(0, min(self.sizes[s.axis], length - start))
        pages, first = self.value(s.page), self.value(s.first)
        assert isinstance(pages, Tensor)
        assert isinstance(first, Tensor)
        positions = torch.arange(start, start + count, device=self.device) + first[:count]
        found = whole.transpose(1, 2)[pages[:count].long(), positions]
        self.shifts[s.tensor] = (2, -start)
        self.tensors = {**self.tensors, s.tensor: found.transpose(0, 1)[None]}

    def _loop(self, loop: Loop) -> None:
        step = self.sizes[loop.axis] if loop.axis else 1
        outside = self.start.get(loop.axis) if loop.axis else None
        for position in range(int(self._number(loop.lo)), int(self._number(loop.hi)), step):
            if loop.axis:
                self._place(loop.axis, position)
            self.names[loop.var] = position
            self._scoped(loop.body)
        if loop.axis and outside is not None:
            self._place(loop.axis, outside)

    def _scoped(self, body: tuple[Stmt, ...]) -> None:
        """Run an inner body; names that it introduces end with it."""
        before = self.names.keys() | set()
        self._run(body)
        for name in self.names.keys() - before:
            del self.names[name]

    # Expressions

    def _number(self, expr: Expr) -> Number:
        value = self.value(expr)
        assert not isinstance(value, Tensor), f"{expr} spans axes {expr.axes}"
        return value

    def value(self, expr: Expr) -> Value:
        """A tensor with one dimension per axis of `expr`, or a number."""
        values: dict[Expr, Value] = {}
        for node in postorder(expr):
            values[node] = self._node(node, values)
        return values[expr]

    def _node(self, node: Expr, values: Mapping[Expr, Value]) -> Value:
        match node:
            case Const(value):
                return value
            case Var(name):
                return self.names[name]
            case Full(value, spans):
                shape = [self.sizes[axis] for axis in in_order(spans)]
                return torch.full((), value, dtype=self.compute, device=self.device).expand(shape)
            case Call(op, args):
                operands = [values[a] for a in args]
                if not node.axes:
                    return INFO[op].evaluate(*operands)
                tiles = [self._tile(values[a], a, node.axes) for a in args]
                return apply_op(node, tiles, self.compute)
            case Dot(a, b):
                return self._dot(node, self._tile(values[a], a, a.axes), self._tile(values[b], b, b.axes))
            case Reduce(kind, x, axis):
                reduced = _REDUCTION[kind](self._tile(values[x], x, x.axes), dim=x.axes.index(axis))
                return reduced if node.axes else reduced.item()
            case Cast(x, like):
                rounded = self._tile(values[x], x, x.axes).to(_torch_storage(self.params[like].storage))
                return rounded.to(self.compute) if node.axes else rounded.item()
            case Load() | FirstColumns():
                return self._load(node, values)
        raise TypeError(f"{type(node).__name__} does not occur in a tile program")

    def _tile(self, value: Value, of: Expr, axes: tuple[str, ...]) -> Tensor:
        """`value` as a tensor that broadcasts over `axes`."""
        if not isinstance(value, Tensor):
            return torch.tensor(value, dtype=torch_kind(of.dtype, self.compute), device=self.device)
        if of.axes == axes or not of.axes:
            return value
        return value[tuple(slice(None) if axis in of.axes else None for axis in axes)]

    def _dot(self, node: Dot, a: Tensor, b: Tensor) -> Value:
        left = [axis for axis in node.a.axes if axis != node.contracted]
        right = [axis for axis in node.b.axes if axis != node.contracted]
        a = a.movedim(node.a.axes.index(node.contracted), -1)
        b = b.movedim(node.b.axes.index(node.contracted), 0)
        result = torch.tensordot(a, b, dims=1)
        if not node.axes:
            return result.item()
        order = left + right
        return result.permute([order.index(axis) for axis in node.axes])

    # Memory

    def _load(self, node: Load | FirstColumns, values: Mapping[Expr, Value]) -> Value:
        if isinstance(node, FirstColumns):
            whole = self._tile(values[node.x], node.x, node.x.axes)
            return whole.narrow(node.axes.index(node.axis), 0, self.sizes[node.axis])
        tensor = self.tensors[node.tensor]
        clamped = self._captured(node.tensor)
        region = self._region(node.indices, values, tensor, clamped, self.shifts.get(node.tensor))
        if region is not None and not clamped:
            tile = self._read_region(tensor, region)
        elif region is not None and all(r.inside for r in region):
            tile = tensor[tuple(r.positions for r in region)]
        else:
            return self._gather(node, values, tensor, clamped)
        tile = tile.to(torch_kind(node.dtype, self.compute))
        if not node.axes:
            return tile.item()
        order = [r.axis for r in region if r.axis]
        return tile.permute([order.index(axis) for axis in node.axes])

    def _captured(self, name: str) -> bool:
        return any("_size_" in size for size in self.params[name].shape)

    def _region(
        self,
        indices: tuple[Expr, ...],
        values: Mapping[Expr, Value],
        tensor: Tensor,
        clamped: bool,
        shift: tuple[int, int] | None = None,
    ) -> list[Span] | None:
        """The box of the tensor that plain indices (numbers and tile positions) name; None for any other indices."""
        region: list[Span] = []
        axes: set[str] = set()
        for dimension, (index, size) in enumerate(zip(indices, tensor.shape, strict=True)):
            value = values[index]
            moved = shift[1] if shift and shift[0] == dimension else 0
            if not isinstance(value, Tensor):
                position = min(max(int(value), 0), size - 1) if clamped else int(value)
                region.append(Span("", position, 1, size))
                continue
            axis = next((a for a in self.start if isinstance(index, Var) and index.name == f"{a}_idx"), None)
            if axis is None or axis in axes:
                return None
            axes.add(axis)
            region.append(Span(axis, self.start[axis] + moved, self.sizes[axis], size))
        return region

    def _read_region(self, tensor: Tensor, region: list[Span]) -> Tensor:
        if all(r.inside for r in region):
            return tensor[tuple(r.positions for r in region)]
        tile = tensor.new_zeros([r.length for r in region if r.axis])
        if all(r.overlap for r in region):
            part = tensor[tuple(r.positions for r in region)]
            tile[tuple(slice(0, r.overlap) for r in region if r.axis)] = part
        return tile

    def _gather(self, node: Load, values: Mapping[Expr, Value], tensor: Tensor, clamped: bool) -> Value:
        indices = [self._tile(values[i], i, node.axes) for i in node.indices]
        if tensor.numel() == 0:
            result = tensor.new_zeros([self.sizes[axis] for axis in node.axes])
        else:
            inside = [i.clamp(0, size - 1) for i, size in zip(indices, tensor.shape, strict=True)]
            result = tensor[tuple(inside)]
            if not clamped:
                legal = torch.stack(
                    torch.broadcast_tensors(*[i == j for i, j in zip(indices, inside, strict=True)])
                )
                result = torch.where(legal.all(0), result, torch.zeros((), dtype=result.dtype))
        result = result.to(torch_kind(node.dtype, self.compute))
        return result if node.axes else result.item()

    def _write(self, name: str, indices: tuple[Expr, ...], value: Expr, add: bool) -> None:
        tensor = self.tensors[name]
        values = {i: self.value(i) for i in indices}
        stored = self.value(value)
        if name in self.listed:
            dimension, rows = self.listed[name]
            position = values[indices[dimension]]
            assert isinstance(position, Tensor)
            there = torch.where(position < len(rows), rows[position.clamp(max=len(rows) - 1)], -1)
            batch = self.params[name].shape.index("batches")  # all sequences share the rows of one
            values |= {indices[dimension]: there, indices[batch]: 0}
            self._scatter(tensor.narrow(batch, 0, 1), indices, values, value, stored, add)
            return
        region = self._region(indices, values, tensor, clamped=False)
        if region is None or not set(value.axes) <= {r.axis for r in region}:
            self._scatter(tensor, indices, values, value, stored, add)
            return
        if not all(r.overlap for r in region):
            return
        order = tuple(r.axis for r in region if r.axis)
        tile = self._tile(stored, value, in_order(order))
        if isinstance(stored, Tensor):
            tile = tile.permute([in_order(order).index(axis) for axis in order])
            tile = tile.expand([r.length for r in region if r.axis])
            tile = tile[tuple(slice(0, r.overlap) for r in region if r.axis)]
        target = tensor[tuple(r.positions for r in region)]
        target.add_(tile) if add else target.copy_(tile)

    def _scatter(
        self,
        tensor: Tensor,
        indices: tuple[Expr, ...],
        values: Mapping[Expr, Value],
        value: Expr,
        stored: Value,
        add: bool,
    ) -> None:
        """Write through arbitrary indices, which may repeat where the value is added."""
        axes = tuple(a for a in AXES if a in value.axes or any(a in i.axes for i in indices))
        shape = [self.sizes[axis] for axis in axes]
        positions = [self._tile(values[i], i, axes).expand(shape) for i in indices]
        tile = self._tile(stored, value, axes).expand(shape).to(tensor.dtype)
        legal = torch.ones(shape, dtype=torch.bool, device=tensor.device)
        for position, size in zip(positions, tensor.shape, strict=True):
            legal &= (position >= 0) & (position < size)
        tensor.index_put_(tuple(p[legal] for p in positions), tile[legal], accumulate=add)

"""What chunk kernels do token by token, in Triton: rows of tiles from the user's mods, and rows of tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from attn_engine.codegen.backends.triton import TritonRenderer
from attn_engine.codegen.backends.triton_chunk_params import ChunkOptions, ChunkTensor
from attn_engine.codegen.backends.triton_types import TYPES
from attn_engine.codegen.lower.chunk_phases import ChunkPhase
from attn_engine.codegen.lower.emit import Names
from attn_engine.ir.chunk import RowOutput, Rows, Tile
from attn_engine.ir.expr import (
    REDUCE_IDENTITY,
    Call,
    Const,
    Expr,
    Full,
    Load,
    Reduce,
    Var,
    postorder,
    rebuild,
    where,
)
from attn_engine.ir.linear import D_IDX, DV_IDX, LinearProgram
from attn_engine.ir.ops import DType
from attn_engine.ir.tile import Kernel, Let, Param

INSIDE = Var("inside", DType.BOOL, ("q",))
COLUMN_AXES = ("d", "dv")
_INPUTS = {
    "query": "Q",
    "key": "K",
    "value": "V",
    "d_output": "dO",
    "beta": "beta_given",
    "decay": "decay_given",
}


class ChunkRows(TritonRenderer):
    """Prints the rows of one phase; a chunk's tokens are the axis "q" of its tiles."""

    phase: ChunkPhase
    program: LinearProgram
    options: ChunkOptions
    tensors: Mapping[str, ChunkTensor]
    spelled: Mapping[str, str]  # captured names that the file has taken, and what they are called there

    def prepare(self, own: Iterable[str]) -> None:
        """Begin a file. own: names that the user's values must not take."""
        self.element = self.program.element
        columns = self.options.columns_of(self.program)
        whole = self.program.dim_v % columns == 0
        captured = tuple(
            Param(self.spelled[t.name], t.storage, tuple(f"{self.spelled[t.name]}_size_{d}" for d in t.dims))
            for t in self.tensors.values()
            if t.captured
        )
        self.kernel = Kernel(
            name=self.phase.name,
            params=captured,
            scalars=(),
            grid=("head", "batch"),
            order=("q", "d", "dv"),
            tile=(
                ("q", self.options.chunk),
                ("d", self.program.dim_qk),
                ("dv", columns if whole else self.program.dim_v),
            ),
            body=(),
        )
        self.learn(self.kernel)
        self.lowest["t"] = 0
        self.narrowed, self._names_of, self._renamed, self._hoisted = {}, {}, {}, []
        self._reserved = Names(set(own))
        self._taken = self._reserved.copy()
        self.masked = {
            "d": self.program.dim_qk & (self.program.dim_qk - 1) != 0 or self.program.dim_qk < 16,
            "dv": not whole,
        }

    # -- a Rows statement

    def rows(self, s: Rows) -> list[str]:
        self._taken, self._names_of, self._said = self._reserved.copy(), {}, []
        roots = [e for _, e in (*s.values, *s.last)] + [w.value for w in s.writes]
        known: dict[Expr, Expr] = {}
        lines = [*self._inputs(roots), *self._shared(roots, known)]
        tiles = [(t, t.var.axes, t.name) for t, _ in s.values] + [(t, ("q",), t.last.name) for t, _ in s.last]
        for (_, axes, name), root in zip(tiles, roots, strict=False):
            value = where(self._inside(axes), self._spread(self._of(root, known), axes), 0.0)
            lines += self._held(name, value, rounded=len(axes) == 2 and name != "decays")
        for w, root in zip(s.writes, roots[len(tiles) :], strict=True):
            lines += self._write(w, self._of(root, known))
        return lines

    def _held(self, name: str, value: Expr, rounded: bool) -> list[str]:
        """A tile from its rows. Those that products read are held as elements: half the registers of short ones."""
        if not rounded or TYPES[self.element] == self.compute:
            return self.statement(Let(name, value))
        return self.fold(f"{name} = {self.expr(value)}.to(ELEMENT)")

    def _inputs(self, roots: list[Expr]) -> list[str]:
        """Loads of the token's own rows, zero beyond the chunk's tokens and the dimensions."""
        found = [n for n in postorder(*roots) if isinstance(n, Var) and n.name in _INPUTS]
        return [line for var in found for line in self._load(var)]

    def _load(self, var: Var) -> list[str]:
        tensor = self.tensors[_INPUTS[var.name]]
        base, lines = self._base(tensor)
        place, mask = self._offsets(tensor, var.axes), self.mask(var.axes)
        other = f", mask={mask}, other=0.0" if mask else ""
        text = f"{var.name} = tl.load({base}{place}{other}).to(tl.{self.compute})"
        return [*lines, *self.fold(text)]

    def _base(self, tensor: ChunkTensor) -> tuple[str, list[str]]:
        """Where the chunk's first row of a tensor of tokens lies, named on a line of its own."""
        heads = {"Q": "head // q_group", "K": "head // k_group"}.get(tensor.name)
        parts = [tensor.name]
        for dim, stride in zip(tensor.dims, tensor.strides, strict=True):
            if dim != "column":
                index = f"({heads})" if dim == "head" and heads else dim
                parts.append(f"{index} * {stride}")
        name = f"{tensor.name}_rows"
        return name, self.fold(f"{name} = {' + '.join(parts)}")

    def _offsets(self, tensor: ChunkTensor, axes: tuple[str, ...]) -> str:
        found: list[str] = []
        if "q" in axes:
            found.append(f"step{self.broadcast(('q',), axes)} * {tensor.name}_token_stride")
        for axis in COLUMN_AXES:
            if axis in axes:
                found.append(f"{axis}_idx{self.broadcast((axis,), axes)} * {tensor.name}_column_stride")
        joined = " + ".join(found)
        return f" + ({joined})" if len(found) > 1 else f" + {joined}" if found else ""

    def _inside(self, axes: tuple[str, ...]) -> Expr:
        """Whether a tile's element is one of the chunk's tokens and of the dimensions."""
        conditions: list[Expr] = [INSIDE] if "q" in axes else []
        sizes = {"d": (D_IDX, self.program.dim_qk), "dv": (DV_IDX, self.program.dim_v)}
        for axis, (index, size) in sizes.items():
            if axis in axes and self.masked[axis]:
                conditions.append(index < size)
        found: Expr = Const(True)
        for i, condition in enumerate(conditions):
            found = found & condition if i else condition
        return found

    def mask(self, axes: tuple[str, ...]) -> str:
        """The mask of a tile's loads and stores; "" for none."""
        condition = self._inside(axes)
        return "" if isinstance(condition, Const) else self.expr(condition, axes)

    def _rebuilt(self, node: Expr, known: Mapping[Expr, Expr]) -> Expr:
        """A node over what its operands have become: names as in the file, sums of what is inside the dimensions."""
        match node:
            case Load(tensor, kind, indices):
                return Load(self.spelled.get(tensor, tensor), kind, tuple(known[i] for i in indices))
            case Var(name, kind, ()):
                return Var(self.spelled.get(name, name), kind)
            case Reduce(kind, x, axis) if axis in COLUMN_AXES and self.masked[axis]:
                return Reduce(kind, where(self._inside((axis,)), known[x], REDUCE_IDENTITY[kind]), axis)
            case _:
                return rebuild(node, tuple(known[o] for o in node.operands))

    def _shared(self, roots: list[Expr], known: dict[Expr, Expr]) -> list[str]:
        """Lines of what the user named, of loads, of sums over rows, and of what is used more than once."""
        nodes = postorder(*roots)
        uses: dict[Expr, int] = {}
        for node in [*roots, *(o for n in nodes for o in n.operands)]:
            uses[node] = uses.get(node, 0) + 1
        names, lines = self.program.names, list[str]()
        for node in nodes:
            named = isinstance(node, Call) and (
                node in names or (uses[node] > 1 and node.dtype is not DType.BOOL)
            )
            if named or isinstance(node, Load | Reduce):
                name = self._taken.fresh(names.get(node) or self._wish(node))
                for operand in node.operands:
                    self._of(operand, known)
                value = self._rebuilt(node, known)
                lines += self.statement(Let(name, value, self.program.sources.get(node, "")))
                known[node] = Var(name, node.dtype, node.axes)
        return lines

    @staticmethod
    def _wish(node: Expr) -> str:
        match node:
            case Load(tensor):
                return f"{tensor}_value"
            case Reduce(kind, _, _):
                return {"sum": "total", "max": "largest", "min": "smallest"}[kind]
            case Call(op, _):
                return f"{op.value}_value"
            case _:
                return "value"

    def _of(self, e: Expr, known: dict[Expr, Expr]) -> Expr:
        """e in terms of the lines so far."""
        for node in postorder(e):
            if node not in known:
                known[node] = self._rebuilt(node, known)
        return known[e]

    @staticmethod
    def _spread(value: Expr, axes: tuple[str, ...]) -> Expr:
        """A value over all of these axes."""
        missing = tuple(a for a in axes if a not in value.axes)
        return value * Full(1.0, missing) if missing else value

    def _write(self, w: RowOutput, value: Expr) -> list[str]:
        tensor = self.tensors[w.tensor]
        base, lines = self._base(tensor)
        value = self._spread(value, w.axes)
        if "q" not in w.axes:
            every = ("q", *w.axes)
            value = Reduce("sum", where(self._inside(every), self._spread(value, every), 0.0), "q")
        mask = self.mask(w.axes)
        place = f"{base}{self._offsets(tensor, w.axes)}"
        stored = f"tl.store({place}, {self.expr(value, w.axes)}{f', mask={mask}' if mask else ''})"
        return [*lines, *[*self._hoisted], *self.fold(stored)]

    def fold(self, line: str) -> list[str]:
        """A line, broken where it is too long."""
        raise NotImplementedError

    def full(self, e: Full) -> str:
        shape = ", ".join({"q": "CHUNK", "d": "BLOCK_D", "dv": "BLOCK_DV"}[axis] for axis in self.span(e))
        return f"tl.full([{shape}], {self.number(e.value)}, tl.{self.compute})"


def written_by(tiles: Iterable[Tile]) -> set[str]:
    """The names that tiles have in a file."""
    return {name for t in tiles for name in (t.name, t.last.name)}

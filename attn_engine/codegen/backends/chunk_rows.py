"""C++ of what is done token by token: a row's columns in lanes, its sums before what reads them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from attn_engine.codegen.backends.cpu_lanes import LaneRenderer
from attn_engine.ir.chunk import RowOutput, Rows, Tile
from attn_engine.ir.expr import Call, Const, Expr, Full, Load, Reduce, Var, postorder, rebuild, substitute
from attn_engine.ir.linear import D_IDX, DV_IDX, LinearProgram
from attn_engine.ir.ops import DType

DIMS = {"d": "D", "dv": "DV"}
IDENTITY = {"sum": "0", "max": "-INFINITY", "min": "INFINITY"}
COMBINED = {"sum": "{} + {}", "max": "max({}, {})", "min": "min({}, {})"}


class RowRenderer(LaneRenderer):
    """Prints the rows of one kernel.

    inputs: how a token's variable is read, by its name: what it is called in the file, and the text of a number, or of
    the columns from `column` on.
    padded: whether lanes reach beyond an axis of rows. renamed: captured names that C++ or the file has taken.
    """

    def __init__(
        self,
        program: LinearProgram,
        inputs: Mapping[str, tuple[str, str]],
        padded: Mapping[str, bool],
        renamed: Mapping[str, str],
        in_double: bool,
    ) -> None:
        self.program, self.inputs, self.padded, self.renamed = program, inputs, padded, renamed
        self.in_double = in_double
        self.start({}, {})
        self._taken = 0

    @property
    def axis(self) -> str:
        return "d"

    @property
    def number_axes(self) -> set[str]:
        return {"q", "kv"}

    def span(self, e: Expr) -> tuple[str, ...]:
        return e.axes

    def load(self, e: Load, axes: tuple[str, ...]) -> str:
        name = self.renamed.get(e.tensor, e.tensor)
        return f"{name}({', '.join(self.expr(i) for i in e.indices)})"

    # -- a token

    def rows(self, s: Rows, tiles: Mapping[Tile, str]) -> list[str]:
        """The lines inside a loop over `row` that make every value and every write. tiles: how rows are stored to."""
        roots = [e for _, e in (*s.values, *s.last)] + [w.value for w in s.writes]
        known: dict[Expr, Expr] = {}
        lines = self._numbers(roots, known)
        for tile, e in s.values:
            if tile.axes == ("t",):
                lines.append(f"{tiles[tile]}[row] = {self._number(e, known)};")
        lines += [
            line for w in s.writes if not set(w.axes) & set(DIMS) for line in self._write_number(w, known)
        ]
        for axis in DIMS:
            stores = [(f"{tiles[t]}[row]", e) for t, e in s.values if t.var.axes[1:] == (axis,)]
            writes = [w for w in s.writes if axis in w.axes]
            if stores or writes:
                lines += self._columns(axis, stores, writes, known)
        for tile, e in s.last:  # after the columns of v, whose last vector of lanes reaches over it
            lines.append(f"__builtin_memset({tiles[tile]}[row] + DV, 0, (V_COLUMNS - DV) * sizeof(Real));")
            lines.append(f"{tiles[tile]}[row][DV] = {self._number(e, known)};")
        return lines

    def _numbers(self, roots: list[Expr], known: dict[Expr, Expr]) -> list[str]:
        """Numbers of the token: inputs, reduced rows, and what columns read of them; `known` gets their variables."""
        lines: list[str] = []
        nodes = postorder(*roots)
        for node in nodes:
            if isinstance(node, Var) and node.name in self.inputs and not set(node.axes) & set(DIMS):
                name, text = self.inputs[node.name]
                lines.append(f"const Real {name} = {text};")
                known[node] = Var(name, node.dtype, node.axes)
        for node in nodes:
            if isinstance(node, Reduce):
                lines += self._reduce(node, known)
            elif self._is_shared_number(node, nodes):
                name = self._name(node)
                lines += self._noted(node)
                lines.append(f"const auto {name} = {self._number(node, known)};")
                known[node] = Var(name, node.dtype, node.axes)
        return lines

    def _is_shared_number(self, node: Expr, nodes: list[Expr]) -> bool:
        """Whether columns or several places read this computed number."""
        if not isinstance(node, Call | Load) or set(node.axes) & set(DIMS):
            return False
        if isinstance(node, Load) and node.dtype is DType.INT:
            return False
        users = [n for n in nodes if any(o is node for o in n.operands)]
        return any(set(n.axes) & set(DIMS) or isinstance(n, Reduce) for n in users) or len(users) > 1

    def _reduce(self, node: Reduce, known: dict[Expr, Expr]) -> list[str]:
        name, axis = self._name(node), node.axis
        if isinstance(node.x, Full):
            number = Const(node.x.value)
            known[node] = number * Var(DIMS[axis], DType.INT) if node.kind == "sum" else number
            return []
        inner = self._with_columns([node.x], known, axis)
        x = inner[1][0]
        if self.padded[axis]:
            x = f"where({axis}_idx < {DIMS[axis]}, {x}, {self._identity(node.kind)})"
        total = f"{name}_lanes"
        update = f"{total} = {COMBINED[node.kind].format(total, x)};"
        across = f"total_of({total})" if node.kind == "sum" else f"{node.kind}_lanes({total}, LANES)"
        known[node] = Var(name, DType.FLOAT, node.axes)
        return [
            *self._noted(node),
            f"Floats {total} = fill({self._identity(node.kind)});",
            f"for (int column = 0; column < {DIMS[axis]}; column += LANES) {{",
            *(f"  {line}" for line in self._positions(axis, [*inner[0], update])),
            *(f"  {line}" for line in [*inner[0], update]),
            "}",
            f"const Real {name} = {across};",
        ]

    @staticmethod
    def _identity(kind: str) -> str:
        return f"Real({IDENTITY[kind]})"

    def _columns(
        self,
        axis: str,
        stores: list[tuple[str, Expr]],
        writes: list[RowOutput],
        known: dict[Expr, Expr],
    ) -> list[str]:
        """The loop over columns that stores rows and writes them to tensors."""
        made, texts = self._with_columns([e for _, e in stores] + [w.value for w in writes], known, axis)
        lines = list(made)
        for (place, e), text in zip(stores, texts, strict=False):
            text = text if axis in e.axes else f"floats({text})"
            if self.padded[axis]:
                text = f"where({axis}_idx < {DIMS[axis]}, {text}, Real(0))"
            lines.append(f"store({place} + column, {text});")
        for w, text in zip(writes, texts[len(stores) :], strict=True):
            value = text if axis in w.value.axes else f"floats({text})"
            if "q" in w.axes:
                lines.append(f"write_row<{DIMS[axis]}>({w.tensor}_rows, token, column, {value});")
            else:
                lines.append(f"store({w.tensor}_sum + column, load({w.tensor}_sum + column) + {value});")
        head = f"for (int column = 0; column < {DIMS[axis]}; column += LANES) {{"
        return [head, *(f"  {line}" for line in [*self._positions(axis, lines), *lines]), "}"]

    @staticmethod
    def _positions(axis: str, lines: Iterable[str]) -> list[str]:
        if any(f"{axis}_idx" in line for line in lines):
            return [f"const Positions {axis}_idx = positions(column);"]
        return []

    def _with_columns(
        self, roots: list[Expr], known: dict[Expr, Expr], axis: str
    ) -> tuple[list[str], list[str]]:
        """Declarations of what is read or used twice inside a loop over columns, and the text of each root."""
        lines: list[str] = []
        here = dict(known)
        replaced = [substitute(root, dict(known)) for root in roots]
        nodes = postorder(*replaced)
        uses: dict[Expr, int] = {}
        for node in nodes:
            for operand in node.operands:
                uses[operand] = uses.get(operand, 0) + 1
        for root in replaced:
            uses[root] = uses.get(root, 0) + 1
        for node in nodes:
            if isinstance(node, Var) and axis in node.axes and node not in (D_IDX, DV_IDX):
                if node.name in self.inputs:
                    name, text = self.inputs[node.name]
                    lines.append(f"const Floats {name} = {text};")
                    here[node] = Var(name, node.dtype, node.axes)
            elif isinstance(node, Call | Load) and axis in node.axes and self._is_named(node, uses):
                name = self._name(node)
                lines += self._noted(node)
                lines.append(f"const auto {name} = {self.expr(_shallow(node, here))};")
                here[node] = Var(name, node.dtype, node.axes)
        return lines, [self.expr(substitute(root, here)) for root in replaced]

    def _is_named(self, node: Expr, uses: Mapping[Expr, int]) -> bool:
        return uses.get(node, 0) > 1 or node in self.program.names

    def _number(self, e: Expr, known: dict[Expr, Expr]) -> str:
        replaced = known.get(e)
        return self.expr(_shallow(e, known) if replaced is None else replaced)

    def _write_number(self, w: RowOutput, known: dict[Expr, Expr]) -> list[str]:
        value = self._number(w.value, known)
        if "q" in w.axes:
            return [f"write({w.tensor}, 1, Real({value}), batch, head, token);"]
        return [f"{w.tensor}_sum[0] += {value};"]

    def _name(self, node: Expr) -> str:
        """The user's name for a node, made unlike any other in the file."""
        self._taken += 1
        wanted = self.program.names.get(node)
        return f"{wanted}_{self._taken}" if wanted else f"x_{self._taken}"

    def _noted(self, node: Expr) -> list[str]:
        source = self.program.sources.get(node)
        return [self.remark(source)] if source else []


def _shallow(node: Expr, known: Mapping[Expr, Expr]) -> Expr:
    """The node itself over operands that are replaced where they are known."""
    return rebuild(node, tuple(substitute(o, dict(known)) for o in node.operands))

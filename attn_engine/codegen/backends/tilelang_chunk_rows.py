"""What chunk kernels do token by token, in TileLang: loop nests over the rows of tiles, and over rows of tensors."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from attn_engine.codegen.backends.tilelang import TileLangRenderer, wrapped_in
from attn_engine.codegen.backends.tilelang_types import COUNTERS
from attn_engine.codegen.backends.triton_chunk_params import ChunkOptions, ChunkTensor
from attn_engine.codegen.lower.chunk_phases import ChunkPhase
from attn_engine.codegen.lower.emit import Names
from attn_engine.codegen.lower.placed import Buffer, Scope
from attn_engine.ir.chunk import RowOutput, Rows
from attn_engine.ir.expr import REDUCE_IDENTITY, Call, Expr, Full, Load, Reduce, Var, postorder, rebuild
from attn_engine.ir.linear import LinearProgram
from attn_engine.ir.ops import DType

INPUTS = {
    "query": "Q",
    "key": "K",
    "value": "V",
    "d_output": "dO",
    "beta": "beta_given",
    "decay": "decay_given",
}
BLOCKS = {"q": "CHUNK", "kv": "CHUNK", "d": "BLOCK_D", "dv": "BLOCK_DV"}
SIZES = {"d": "DIM_QK", "dv": "DIM_V"}
_TOP = 2  # the depth of a kernel's own statements
_ORDER = ("q", "d", "dv")


class ChunkNests(TileLangRenderer):
    """Prints the rows of one phase; a chunk's tokens are the axis "q" of its tiles."""

    phase: ChunkPhase
    program: LinearProgram
    chunk_options: ChunkOptions
    tensors: Mapping[str, ChunkTensor]
    spelled: Mapping[str, str]  # captured names that the file has taken, and what they are called there
    masked: Mapping[str, bool]  # whether a tile of columns has some that the tensors lack
    reserved: Names  # names that belong to the file
    depth: int

    # -- a Rows statement

    def rows(self, s: Rows) -> list[str]:
        """Reductions first, each a nest of its own, then a nest for each kind of tile or tensor."""
        self._source = ""
        roots = [e for _, e in (*s.values, *s.last)] + [w.value for w in s.writes]
        known: dict[Expr, Expr] = {}
        lines = [line for root in roots for line in self._reduced(root, known)]
        tiles = [(t.name, t.var.axes, e) for t, e in s.values] + [(t.last.name, ("q",), e) for t, e in s.last]
        for axes in dict.fromkeys(axes for _, axes, _ in tiles):
            chosen = [(name, e) for name, own, e in tiles if own == axes]
            lines += self._tile_nest(axes, chosen, known)
        for axes in dict.fromkeys(w.axes for w in s.writes if "q" in w.axes):
            lines += self._output_nest(axes, [w for w in s.writes if w.axes == axes], known)
        for w in s.writes:
            if "q" not in w.axes:
                lines += self._sum_over_tokens(w, known)
        return lines

    def _tile_nest(
        self, axes: tuple[str, ...], tiles: Sequence[tuple[str, Expr]], known: Mapping[Expr, Expr]
    ) -> list[str]:
        inside = " & ".join(self.inside(axes))

        def stores(texts: Sequence[str]) -> list[str]:
            return [
                f"{self.element_of(name)} = {self.rounded(name, f'T.if_then_else({inside}, {text}, 0.0)')}"
                for (name, _), text in zip(tiles, texts, strict=True)
            ]

        return self.nest_of(axes, [e for _, e in tiles], stores, known)

    def _output_nest(
        self, axes: tuple[str, ...], outputs: Sequence[RowOutput], known: Mapping[Expr, Expr]
    ) -> list[str]:
        inside = " & ".join(self.inside(axes))

        def stores(texts: Sequence[str]) -> list[str]:
            places = [self.place_of(self.tensors[w.tensor]) for w in outputs]
            values = [self._stored(w.tensor, t) for w, t in zip(outputs, texts, strict=True)]
            return [
                f"if {inside}:",
                *(f"    {p} = {x}" for p, x in zip(places, values, strict=True)),
            ]

        return self.nest_of(axes, [w.value for w in outputs], stores, known)

    def _stored(self, tensor: str, text: str) -> str:
        storage = self.tensors[tensor].storage.value
        return text if storage == self.compute else f'T.cast({text}, "{storage}")'

    def _sum_over_tokens(self, w: RowOutput, known: Mapping[Expr, Expr]) -> list[str]:
        """One number of each column, or one altogether, for the tokens of the chunk."""
        name = self.buffer(f"{w.tensor}_sum", w.axes, DType.FLOAT)
        total = self.element_of(name)
        axes = w.axes or ("one",)
        begin = self.nest_of(axes, [], lambda _: [f"{total} = 0.0"], {})
        if w.axes:
            (loop,) = [self.counting_nest(w.axes)]
        else:
            loop = "for _ in each(1):"

        def add(texts: Sequence[str]) -> list[str]:
            return [f"{total} = {total} + T.if_then_else(qi < count, {texts[0]}, 0.0)"]

        inner = self._body(("q", *w.axes), [w.value], add, known)
        inside = [c for c in self.inside(w.axes) if c]
        place = self.place_of(self.tensors[w.tensor])
        store = [f"if {' & '.join(inside)}:", f"    {place} = {total}"] if inside else [f"{place} = {total}"]
        positions = self._positions(w.axes, "\n".join(store))
        return [
            *begin,
            loop,
            "    for qi in T.serial(CHUNK):",
            *self._indented(inner, 2),
            *self._indented([*positions, *store], 1),
        ]

    # -- reductions over a row

    def _reduced(self, root: Expr, known: dict[Expr, Expr]) -> list[str]:
        """A buffer for every sum or extremum over a row, in order."""
        lines: list[str] = []
        for node in postorder(root):
            if not isinstance(node, Reduce) or node in known:
                continue
            wish = {"sum": "total", "max": "largest", "min": "smallest"}[node.kind]
            name = self.buffer(wish, node.axes, DType.FLOAT, fresh=True)
            lines += self._reduction(name, node, known)
            known[node] = Var(name, DType.FLOAT, node.axes)
        return lines

    def _reduction(self, name: str, node: Reduce, known: Mapping[Expr, Expr]) -> list[str]:
        target, counter = self.element_of(name), COUNTERS[node.axis]

        start = self.number(float(REDUCE_IDENTITY[node.kind]))
        # A program that has some of the columns of v alone adds up those: what it is used for is linear.
        shared = node.axis == "dv" and self.chunk_options.parts(self.program) > 1

        def join(texts: Sequence[str]) -> list[str]:
            inside = self.inside((node.axis,)) if shared else []
            term = f"T.if_then_else({inside[0]}, {texts[0]}, {start})" if inside else texts[0]
            if node.kind == "sum":
                return [f"{target} = {target} + {term}"]
            return [f"{target} = T.{node.kind}({target}, {term})"]

        outer = self.counting_nest(node.axes) if node.axes else "for _ in each(1):"
        size = BLOCKS["dv"] if shared else SIZES[node.axis]
        return [
            outer,
            f"    {target} = {start}",
            f"    for {counter} in T.serial({size}):",
            *self._indented(self._body((*node.axes, node.axis), [node.x], join, known), 2),
        ]

    # -- loop nests

    def nest_of(
        self,
        axes: tuple[str, ...],
        values: Sequence[Expr],
        stores: Callable[[Sequence[str]], list[str]],
        known: Mapping[Expr, Expr],
    ) -> list[str]:
        """A loop nest over `axes`, in no order, that does with the values' texts what `stores` says."""
        head = "for _ in each(1):" if axes == ("one",) else self.counting_nest(axes)
        return [head, *self._indented(self._body(axes, values, stores, known), 1)]

    def counting_nest(self, axes: tuple[str, ...]) -> str:
        return f"for {', '.join(COUNTERS[a] for a in axes)} in each({', '.join(BLOCKS[a] for a in axes)}):"

    def _body(
        self,
        axes: tuple[str, ...],
        values: Sequence[Expr],
        stores: Callable[[Sequence[str]], list[str]],
        known: Mapping[Expr, Expr],
    ) -> list[str]:
        self.taken, self._loaded, self._source = self.reserved.copy(), {}, ""
        named = dict(known)
        lines = self._shared(values, named)
        self._hoisted = []
        texts = [self.expr(self._of(e, named)) for e in values]
        lines += [*self._hoisted, *stores(texts)]
        return [*self._positions(axes, "\n".join(lines)), *lines]

    def _positions(self, axes: tuple[str, ...], text: str) -> list[str]:
        """Where an element lies in the tensors, as far as a text reads it."""
        step = "-" if self.program.reverse else "+"
        found = {
            "q": ("t", f"token {step} qi"),
            "d": ("d_idx", "di"),
            "dv": ("dv_idx", "part * BLOCK_DV + vi" if self.chunk_options.parts(self.program) > 1 else "vi"),
        }
        chosen = [found[a] for a in axes if a in found]
        return [f"{name} = {value}" for name, value in chosen if re.search(rf"\b{name}\b", text)]

    def _shared(self, roots: Sequence[Expr], named: dict[Expr, Expr]) -> list[str]:
        """Lines of a token's inputs, of what the user named, and of what is used more than once."""
        nodes = _above(roots, named)
        uses: dict[Expr, int] = {}
        for node in [*roots, *(o for n in nodes for o in n.operands)]:
            uses[node] = uses.get(node, 0) + 1
        names, lines = self.program.names, list[str]()
        for node in nodes:
            if isinstance(node, Var) and node.name in INPUTS:
                lines += [f"{node.name} = {self._input(node)}"]
            elif isinstance(node, Call) and node.axes and (node in names or _worth_a_name(node, uses[node])):
                name = self.taken.fresh(names.get(node) or f"{node.op.value}_value")
                value = self._rebuilt(node, named)
                self._hoisted = []
                text = self.expr(value)
                lines += [*self._hoisted, *self._comment(node), f"{name} = {text}"]
                named[node] = Var(name, node.dtype, node.axes)
        return lines

    def _comment(self, node: Expr) -> list[str]:
        source = self.program.sources.get(node, "")
        said, self._source = source == self._source, source or self._source
        return [] if said or not source else [f"# {source}"]

    def _rebuilt(self, node: Expr, named: dict[Expr, Expr]) -> Expr:
        operands = tuple(self._of(o, named) for o in node.operands)
        match node:
            case Load(tensor, kind, _):
                return Load(self.spelled.get(tensor, tensor), kind, operands)
            case Var(name, kind, ()):
                return Var(self.spelled.get(name, name), kind)
            case _:
                return rebuild(node, operands)

    def _of(self, e: Expr, named: dict[Expr, Expr]) -> Expr:
        """e in terms of the lines so far."""
        for node in _above([e], named):
            if node not in named:
                named[node] = self._rebuilt(node, named)
        return named[e]

    def _input(self, var: Var) -> str:
        """An element of the token's own rows, zero beyond the chunk's tokens and the dimensions."""
        tensor = self.tensors[INPUTS[var.name]]
        text, inside = self.place_of(tensor), self.inside(var.axes)
        if tensor.storage.value != self.compute:
            text = f"T.cast({text}, COMPUTE)"
        return f"T.if_then_else({' & '.join(inside)}, {text}, 0.0)" if inside else text

    def place_of(self, tensor: ChunkTensor) -> str:
        """An element of a tensor of tokens, or of sums over them."""
        heads = {"Q": "head // q_group", "K": "head // k_group"}
        column = "dv_idx" if _has_v(tensor, self.phase.outputs) else "d_idx"
        part = "part" if self.chunk_options.parts(self.program) > 1 else "0"
        words = {"head": heads.get(tensor.name, "head"), "token": "t", "column": column, "part": part}
        return f"{tensor.name}[{', '.join(words.get(d, d) for d in tensor.dims)}]"

    def inside(self, axes: tuple[str, ...]) -> list[str]:
        """What holds where an element is one of the chunk's tokens and of the dimensions."""
        found = ["(qi < count)"] if "q" in axes else []
        found += [f"({a}_idx < {SIZES[a]})" for a in ("d", "dv") if a in axes and self.masked[a]]
        return [found[0][1:-1]] if len(found) == 1 else found

    # -- buffers

    def buffer(self, wish: str, axes: tuple[str, ...], dtype: DType, fresh: bool = False) -> str:
        """A buffer besides the tiles; one without axes has one element. fresh: another one where the name is taken."""
        name = self.reserved.fresh(wish) if fresh else wish
        self.buffers[name] = Buffer(name, Scope.SHARED, axes, dtype)
        return name

    def element_of(self, name: str) -> str:
        buffer = self.buffers.get(name)
        if buffer is None:
            return name
        return f"{name}[{', '.join(COUNTERS[a] for a in buffer.axes) or '0'}]"

    def rounded(self, name: str, text: str) -> str:
        """A text for an element of a buffer, in its type."""
        return f"T.cast({text}, ELEMENT)" if self.is_short(name) else text

    def is_short(self, name: str) -> bool:
        """Whether a buffer holds elements that are narrower than what is computed in."""
        buffer = self.buffers.get(name)
        return buffer is not None and buffer.dtype is DType.ELEMENT and self.element.value != self.compute

    def expr(self, e: Expr, axes: tuple[str, ...] | None = None, parent: int = 0) -> str:
        if isinstance(e, Var) and e.name in self.buffers:
            text = self.element_of(e.name)
            return f"T.cast({text}, COMPUTE)" if self.is_short(e.name) else text
        return super().expr(e, axes, parent)

    @staticmethod
    def _indented(lines: Sequence[str], by: int) -> list[str]:
        return ["    " * by + line for line in lines]

    def folded(self, lines: Sequence[str]) -> list[str]:
        """Lines, broken where they are too long."""
        return [piece for line in lines for piece in wrapped_in(line, _TOP + self.depth)]


def _above(roots: Sequence[Expr], named: Mapping[Expr, Expr]) -> list[Expr]:
    """What the roots are made of, without what is below a value that has a name."""
    found: dict[Expr, None] = {}

    def visit(node: Expr) -> None:
        if node in found:
            return
        if node not in named:
            for operand in node.operands:
                visit(operand)
        found[node] = None

    for root in roots:
        visit(root)
    return [node for node in found if node not in named]


def _worth_a_name(node: Call, uses: int) -> bool:
    return uses > 1 and node.dtype is not DType.BOOL and any(not isinstance(o, Full) for o in node.operands)


def _has_v(tensor: ChunkTensor, outputs: Sequence[RowOutput]) -> bool:
    """Whether a tensor's columns are those of v."""
    if tensor.name in ("V", "dO"):
        return True
    return any(w.tensor == tensor.name and "dv" in w.axes for w in outputs)

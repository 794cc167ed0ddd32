"""TileLang of the statements of a chunk program: calls of the macros in include/chunk.tilelang.

A matrix of tokens is held [i][j]: a row for each token that reads. What tiles of v have beyond their columns, where a
normaliser has its sums, are vectors of their own.
"""

from __future__ import annotations

from collections.abc import Sequence

from attn_engine.codegen.backends.chunk_dispatch import ChunkDispatch
from attn_engine.codegen.backends.tilelang_chunk_rows import ChunkNests
from attn_engine.ir.chunk import (
    CarriedGradient,
    Decays,
    Diagonal,
    DiagonalGradient,
    Gram,
    GramGradient,
    Product,
    Scale,
    Solve,
    StateStep,
    Tile,
    Within,
)
from attn_engine.ir.ops import DType


class ChunkCalls(ChunkNests, ChunkDispatch):
    """Prints statements; the file around them is tilelang_chunk.py's."""

    live: set[str]  # tiles that some statement of the phase reads

    def scale(self, s: Scale) -> list[str]:
        def store(texts: Sequence[str]) -> list[str]:
            return [f"{self.element_of(s.to.name)} = {self.rounded(s.to.name, texts[0])}"]

        return self.nest_of(s.to.var.axes, [s.x.var * s.by.var], store, {})

    def diagonal(self, s: Diagonal) -> list[str]:
        return [f"add_diagonal({s.to.name}, {s.x.name}, {s.y.name})"]

    def diagonal_gradient(self, s: DiagonalGradient) -> list[str]:
        names = ", ".join(t.name for t in (s.d_matrix, s.x, s.y, s.d_x, s.d_y))
        return [f"diagonal_gradient({names})"]

    def solve(self, s: Solve) -> list[str]:
        return [f"{'solve_turned' if s.turned else 'solve'}({s.to.name}, {s.matrix.name})"]

    # -- decays

    def decays(self, s: Decays) -> list[str]:
        g, sums = s.decay.name, self._sums(s.sums.name)
        lines = [f"sums_so_far({g}, {sums})"]
        before = sums
        if s.exclusive and (s.reads is not None or f"{sums}_before" in self.live):
            before = self._sums(f"{sums}_before")
            lines.append(f"sums_before({sums}, {g}, {before})")
        if s.reads is not None:
            lines.append(f"left_of({before}, {s.reads.name})")
        if s.erases is not None:
            lines.append(f"left_of({sums}, {s.erases.name})")
        if s.writes.name in self.live:
            lines.append(f"left_at_end({sums}, {s.writes.name})")
        if s.whole.name in self.live:
            lines.append(f"left_in_all({sums}, {s.whole.name})")
        return lines

    def _sums(self, name: str) -> str:
        """A buffer of doubles for each token."""
        self.doubles.add(name)
        return self.buffer(name, ("q",), DType.FLOAT)

    doubles: set[str]  # buffers that hold doubles

    def vector_decays(self, s: Decays) -> list[str]:
        g, lines = s.decay.name, list[str]()
        if s.reads is not None:
            lines.append(f"row_left_of({g}, {s.reads.name}, {s.exclusive})")
        if s.erases is not None:
            lines.append(f"row_left_of({g}, {s.erases.name}, False)")
        if s.writes.name in self.live:
            lines.append(f"row_left_at_end({g}, {s.writes.name})")
        if s.whole.name in self.live:
            lines.append(f"row_left_in_all({g}, {s.whole.name})")
        return lines

    def _decay_pairs(self, to: str, within: Within, strict: bool) -> str:
        before = f"{within.sums.name}_before" if within.exclusive else within.sums.name
        return f"decay_pairs({to}, {before}, {within.sums.name}, {strict})"

    # -- products

    def operand(self, tile: Tile) -> tuple[list[str], str]:
        """A tile as products read it: what makes a rounded copy of one that holds more than elements, and its name."""
        if self.element.value == self.compute or self.is_short(tile.name):
            return [], tile.name
        own = self.buffers[tile.name]
        name = self.buffer(f"{tile.name}_rounded", own.axes, DType.ELEMENT)
        return [f"T.copy({tile.name}, {name})"], name

    def multiplied(
        self,
        to: str,
        a: Tile,
        b: Tile,
        *,
        of_a: bool = False,
        of_b: bool = False,
        sign: float = 1.0,
        add: bool,
    ) -> list[str]:
        """to = sign a b."""
        lines, left = self.operand(a)
        more, right = self.operand(b) if b.name != a.name else ([], left)
        return [*lines, *more, f"product({to}, {left}, {right}, {of_a}, {of_b}, {sign}, {add})"]

    def gram(self, s: Gram) -> list[str]:
        name, sign = s.to.name, -1.0 if s.negative else 1.0
        if s.within is not None and s.within.vector:
            rows = f"{s.x.name}, {s.y.name}, {s.within.decay.name}"
            return [f"vector_gram({name}, {rows}, {s.strict}, {s.within.exclusive}, {sign})"]
        lines = self.multiplied(name, s.x, s.y, of_b=True, sign=sign, add=False)
        if self.has_last(s.x):
            lines.append(f"add_outer({name}, {s.x.last.name}, {s.y.last.name}, {sign})")
        if s.within is not None:
            return [*lines, self._decay_pairs(name, s.within, s.strict)]
        return [*lines, f"read_only({name}, {s.strict})"]

    def gram_gradient(self, s: GramGradient) -> list[str]:
        d, x, y = s.d_matrix.name, s.x.name, s.y.name
        if s.within is not None and s.within.vector:
            assert s.d_decay is not None
            rows = f"{d}, {x}, {y}, {s.within.decay.name}, {s.d_x.name}, {s.d_y.name}, {s.d_decay.name}"
            return [f"vector_gram_gradient({rows}, {s.strict}, {s.within.exclusive})"]
        lines: list[str] = []
        if s.within is None:
            lines.append(f"read_only({d}, {s.strict})")
        else:
            if s.d_decay is not None and s.d_decay.name in self.live:
                pairs = f"{s.d_decay.name}, {d}, {s.matrix.name}, {s.within.exclusive}"
                lines.append(f"between_pairs({pairs})")
            lines.append(self._decay_pairs(d, s.within, s.strict))
        lines += self.multiplied(s.d_x.name, s.d_matrix, s.y, add=True)
        return [*lines, *self.multiplied(s.d_y.name, s.d_matrix, s.x, of_a=True, add=True)]

    def multiply(self, s: Product) -> list[str]:
        turned = s.a.axes == ("t", "t") and s.upper
        sign = -1.0 if s.negative else 1.0
        lines = self.multiplied(s.to.name, s.a, s.b, of_a=turned, of_b=s.turned, sign=sign, add=s.add)
        if self.has_last(s.b) and self.has_last(s.to):  # a number of each token, or of each row of the state
            column = f"{s.to.last.name}, {s.a.name}, {s.b.last.name}, {sign}, {s.add}"
            lines.append(f"times_column({column})")
        elif self.has_last(s.a) and self.has_last(s.b) and s.turned:
            lines.append(f"add_outer({s.to.name}, {s.a.last.name}, {s.b.last.name}, {sign})")
        return lines

    # -- states

    def state_step(self, s: StateStep) -> list[str]:
        state, sign = s.state, -1.0 if s.negative else 1.0
        lines: list[str] = []
        if s.whole is not None:
            decayed = [state.name, state.last.name] if self.has_last(state) else [state.name]
            for name, axes in zip(decayed, (("d", "dv"), ("d",)), strict=False):
                element, whole = self.element_of(name), self.element_of(s.whole.name)

                def store(_: object, element: str = element, whole: str = whole) -> list[str]:
                    return [f"{element} = {element} * {whole}"]

                lines += self.nest_of(axes, [], store, {})
        left, keys = self.operand(s.keys)
        right, values = self.operand(s.values)
        lines += [*left, *right, f"stepped({state.name}, {keys}, {values}, {sign})"]
        if self.has_last(state):
            rows = f"{state.last.name}, {s.keys.name}, {s.values.last.name}, {sign}"
            lines.append(f"stepped_column({rows})")
        return lines

    def carried(self, s: CarriedGradient) -> list[str]:
        d, (keys, d_keys) = s.d_decay.name, s.write
        through = self.buffer("through", ("d",), DType.FLOAT)
        lines = [f"through_state({through}, {s.state.name}, {s.d_state.name})"]
        if self.has_last(s.state):
            lines.append(f"add_products({through}, {s.state.last.name}, {s.d_state.last.name})")
        rows = "rows_" if self.vector else ""
        lines.append(f"{rows}carried({d}, {through}, {s.whole.name}, {keys.name}, {d_keys.name})")
        return lines + [
            f"{rows}carried_reads({d}, {x.name}, {d_x.name}, {exclusive})" for x, d_x, exclusive in s.reads
        ]

"""What the GPU languages of chunk statements share: which method spells which statement."""

from __future__ import annotations

from abc import ABC, abstractmethod

from attn_engine.codegen.lower.chunked import OUT, VALUES
from attn_engine.codegen.lower.chunked_backward import D_OUT
from attn_engine.ir.chunk import (
    D_STATE,
    STATE,
    CarriedGradient,
    ChunkStmt,
    Decays,
    Diagonal,
    DiagonalGradient,
    Gram,
    GramGradient,
    Product,
    Rows,
    Scale,
    Section,
    Solve,
    StateStep,
    Tile,
)
from attn_engine.ir.linear import LinearProgram

_WITH_LAST = (VALUES, OUT, D_OUT, STATE, D_STATE)


class ChunkDispatch(ABC):
    """Prints statements; a language says how each is spelled. Lines are not folded yet."""

    program: LinearProgram

    def lines_of(self, s: ChunkStmt) -> list[str]:
        """The lines of a statement."""
        if isinstance(s, Section):
            return ["", f"# -- {s.title}"]
        return self.folded(self._lines_for(s))

    @property
    def vector(self) -> bool:
        """Whether the decay is one for each dimension."""
        return self.program.decay is not None and "d" in self.program.decay.axes

    def has_last(self, tile: Tile) -> bool:
        """Whether a tile has numbers beyond the columns of v."""
        return self.program.divisor is not None and tile in _WITH_LAST

    def _lines_for(self, s: ChunkStmt) -> list[str]:
        match s:
            case Rows():
                return self.rows(s)
            case Decays():
                return self.vector_decays(s) if self.vector else self.decays(s)
            case Scale():
                return self.scale(s)
            case CarriedGradient():
                return self.carried(s)
            case Gram() | Diagonal() | GramGradient() | DiagonalGradient() | Solve():
                return self._of_tokens(s)
            case Product():
                return self.multiply(s)
            case StateStep():
                return self.state_step(s)
            case _:
                raise AssertionError(f"no spelling for {type(s).__name__}")

    def _of_tokens(self, s: Gram | Diagonal | GramGradient | DiagonalGradient | Solve) -> list[str]:
        """Matrices of a number for each pair of tokens."""
        match s:
            case Gram():
                return self.gram(s)
            case Diagonal():
                return self.diagonal(s)
            case GramGradient():
                return self.gram_gradient(s)
            case DiagonalGradient():
                return self.diagonal_gradient(s)
            case Solve():
                return self.solve(s)

    @abstractmethod
    def folded(self, lines: list[str]) -> list[str]:
        """Lines, broken where they are too long."""

    @abstractmethod
    def rows(self, s: Rows) -> list[str]: ...

    @abstractmethod
    def scale(self, s: Scale) -> list[str]: ...

    @abstractmethod
    def decays(self, s: Decays) -> list[str]: ...

    @abstractmethod
    def vector_decays(self, s: Decays) -> list[str]: ...

    @abstractmethod
    def gram(self, s: Gram) -> list[str]: ...

    @abstractmethod
    def gram_gradient(self, s: GramGradient) -> list[str]: ...

    @abstractmethod
    def diagonal(self, s: Diagonal) -> list[str]: ...

    @abstractmethod
    def diagonal_gradient(self, s: DiagonalGradient) -> list[str]: ...

    @abstractmethod
    def solve(self, s: Solve) -> list[str]: ...

    @abstractmethod
    def multiply(self, s: Product) -> list[str]: ...

    @abstractmethod
    def state_step(self, s: StateStep) -> list[str]: ...

    @abstractmethod
    def carried(self, s: CarriedGradient) -> list[str]: ...

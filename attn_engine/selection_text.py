"""What a SelectionEngine shows a person: kernel texts, and what was understood. Needs no device."""

from __future__ import annotations

from attn_engine.errors import UnknownBackend, UnsupportedOnBackend
from attn_engine.explain import Explanation
from attn_engine.ir.printer import format_expr
from attn_engine.ir.selection import Overlap, Selection
from attn_engine.runtime.selection_cpu import CpuSelection
from attn_engine.runtime.selection_triton import TritonSelection

BACKENDS = ("auto", "cpu", "torch", "triton", "triton-interpreter", "reference")


class SelectionText:
    """The part of SelectionEngine that runs nothing."""

    layout: str
    backend: str
    scale: float

    @property
    def program(self) -> Selection:
        raise NotImplementedError

    def source(self, backend: str | None = None, *, split: bool = False) -> str:
        """What computes the selection: C++ or Triton, or for the backends "torch" and "reference" its formulas.

        backend: None: the engine's own; "auto" is C++. split: the two kernels in C++ that share the keys of few tokens.
        """
        name = checked_backend(self.backend if backend is None else backend)
        if name in ("auto", "cpu"):
            return CpuSelection(self.program).source(split=split)
        if name in ("triton", "triton-interpreter"):
            return TritonSelection(self.program, name == "triton-interpreter").source()
        return formulas(self.program)

    def explain(self) -> Explanation:
        """What was traced, what the candidates are, and how the best are kept. Print it."""
        p = self.program
        return Explanation(
            {
                "Program": formulas(p),
                "Candidates": _candidates(p.pool),
                "Kept": "the topk best of a row and a few that may become them; of equals the lower index",
                "Scale": f"{self.scale:g}",
                "Backend": self.backend,
            }
        )

    def __repr__(self) -> str:
        p = self.program
        return (
            f"SelectionEngine({p.name}, {p.pairs.element.value}, D={p.pairs.dim_qk}, layout={self.layout!r}, "
            f"backend={self.backend!r})"
        )


def formulas(program: Selection) -> str:
    """The selection in a few lines."""
    pairs = program.pairs
    score = "score" if pairs.score is None else format_expr(pairs.score.result)
    lines = ["score = scale * (q_head . k)"]
    if pairs.mask is not None:
        lines.append(f"visible = {format_expr(pairs.mask.result)}")
    lines.append(f"importance = sum over the heads of a group of {score}")
    if program.pool is not None:
        lines.append(f"block importance = {_weights(program.pool)}")
    if program.forced is not None:
        lines.append(f"forced = {format_expr(program.forced.result)}")
    return "\n".join([*lines, "indices = the topk candidates of highest importance, ascending"])


def _weights(pool: Overlap) -> str:
    terms = [f"{w} * importance[{pool.step} * block {o:+d}]" for o, w in pool.taps.items()]
    return " + ".join(terms)


def _candidates(pool: Overlap | None) -> str:
    if pool is None:
        return "keys that a head of the group sees"
    return (
        f"blocks of {pool.block} tokens; a key is the window of {pool.length} tokens that begins at "
        f"{pool.stride} times its index"
    )


def checked_backend(backend: str | None) -> str:
    """The backend; raises UnsupportedOnBackend, UnknownBackend."""
    backend = "auto" if backend is None else backend
    if backend.startswith("tilelang"):
        instead = 'Use backend="triton", or "torch" for tensors on any device.'
        raise UnsupportedOnBackend(backend=backend, feature="selections", instead=instead)
    if backend not in BACKENDS:
        raise UnknownBackend(backend=backend, known=", ".join(map(repr, BACKENDS)))
    return backend

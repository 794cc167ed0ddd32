"""What a LinearAttentionEngine shows a person: kernel texts, and what was understood. Needs no device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from attn_engine.codegen.backends.chunk_params import SEGMENT_TOKENS
from attn_engine.errors import UnknownOption
from attn_engine.explain import Explanation
from attn_engine.ir.chunk import ChunkStmt, Gram, GramGradient, Product, Section, Solve, StateStep, Tile
from attn_engine.ir.linear import LinearProgram, Rank
from attn_engine.ir.ops import Storage
from attn_engine.ir.printer import format_expr
from attn_engine.runtime.linear_cpu import CpuChunks
from attn_engine.runtime.linear_tilelang import TileLangChunks
from attn_engine.runtime.linear_triton import TritonChunks
from attn_engine.traced_linear import TracedLinear

KERNELS = ("forward", "backward", "step")


class LinearText:
    """The part of LinearAttentionEngine that runs nothing."""

    layout: str
    backend: str
    chunk: int | None

    @property
    def shown(self) -> TracedLinear:
        """The program of the last call; before the first, with a decay of each token."""
        raise NotImplementedError

    @property
    def program(self) -> LinearProgram:
        """The program of the last call; before the first, with a decay of each token."""
        return self.shown.program

    def source(self, kernel: str = "forward", backend: str | None = None) -> str:
        """The text of "forward", "backward" (with the gradients of all that can have one) or "step".

        C++, or the Triton or TileLang of the backends that are called so, which have no "step". backend: None: the
        engine's own. Raises UnknownOption.
        """
        traced, name = self.shown, backend or self.backend
        on_gpu = name.startswith(("triton", "tilelang"))
        kernels = KERNELS[:2] if on_gpu else KERNELS
        if kernel not in kernels:
            known = ", ".join(map(repr, kernels))
            raise UnknownOption(option="kernel", value=kernel, where="source", known=known)
        floating = [c.name for c in traced.program.captures if c.storage.floating]
        given = ["q", "k", "v"]
        given += ["decay"] if traced.kind.decay is not Rank.NONE else []
        given += ["beta"] if traced.kind.beta is not None else []
        if name.startswith("tilelang"):
            return TileLangChunks(traced.program, self.chunk, name == "tilelang-cpu").source(
                kernel, (*given, *floating)
            )
        if on_gpu:
            chunks = TritonChunks(traced.program, self.chunk, name == "triton-interpreter")
            return chunks.source(kernel, (*given, *floating))
        return CpuChunks(traced.program, self.chunk).source(kernel, (*given, *floating))

    def explain(self) -> Explanation:
        """What was traced, how tokens decay, what a chunk computes, and what is kept for gradients. Print it."""
        chunks = CpuChunks(self.program, self.chunk)
        wanted = ("q", "k", "v")
        forward, backward = (chunks.kernel(d, wanted) for d in ("forward", "backward"))
        tokens = chunks.tokens("forward"), chunks.tokens("backward")
        return Explanation(
            {
                "Program": _program_text(self.program),
                "Decay": _decay_text(self.program),
                "Chunks": f"{_chunks_text(*tokens)}; a head of a sequence is one task",
                "Forward, multiplications for a token and head": _work(forward.scan, self.program, tokens[0]),
                "Backward, the same": _work((*backward.scan, *backward.gradient), self.program, tokens[1]),
                "State": _state_text(self.program),
                "Backend": self.backend,
            }
        )

    def __repr__(self) -> str:
        p = self.program
        return (
            f"LinearAttentionEngine({p.name}, {p.element.value}, D={p.dim_qk}, Dv={p.dim_v}, "
            f"decay={p.rank.value!r}, delta={p.corrected}, layout={self.layout!r}, backend={self.backend!r})"
        )


def _chunks_text(forward: int, backward: int) -> str:
    return f"{forward} tokens each" if forward == backward else f"{forward} tokens each, {backward} backward"


def _program_text(program: LinearProgram) -> str:
    parts: list[tuple[str, Any]] = [
        ("decay", program.decay), ("query", program.query), ("write", program.write), ("value", program.value),
        ("erase", program.erase), ("bonus", program.bonus), ("divisor", program.divisor),
    ]  # fmt: skip
    lines = [f"{name} = {format_expr(e)}" for name, e in parts if e is not None]
    write = "write (value - erase^T S)^T" if program.corrected else "write value^T"
    decayed = "S" if program.decay is None else "e^decay S"
    read = "query^T S, before the token's own decay and write" if program.exclusive else "query^T S"
    order = "; from the last token to the first" if program.reverse else ""
    return "\n".join([*lines, f"S = {decayed} + {write}", f"o = {read}{order}"])


def _decay_text(program: LinearProgram) -> str:
    match program.rank:
        case Rank.NONE:
            return "none: the weights of a chunk are masked, nothing else"
        case Rank.HEAD | Rank.TOKEN:
            whose = "head" if program.rank is Rank.HEAD else "token"
            return (
                f"one number for each {whose}: weights are multiplied by e^(difference of two sums), which is at "
                "most 1\nthe gradient adds up the pairs of tokens that a decay lies between; nothing cancels"
            )
        case Rank.VECTOR:
            return (
                "one number for each token and dimension: inside blocks of 16 tokens single steps are multiplied out, "
                "blocks meet at the border between them\nno factor is above 1, so a decay of any strength is safe"
            )


def _work(body: Sequence[ChunkStmt], program: LinearProgram, chunk: int) -> str:
    """Multiplications of each phase for one token, counting the pairs of a chunk that see each other once."""
    sizes = {"t": chunk, "d": program.dim_qk, "v": program.state_columns}
    found: dict[str, int] = {}
    title, total = "", 0
    for s in body:
        if isinstance(s, Section):
            title = s.title
        elif count := _multiplications(s, sizes) // chunk:
            found[title] = found.get(title, 0) + count
            total += count
    return "\n".join([*(f"{n:>9,}  {title}" for title, n in found.items()), f"{total:>9,}  in all"])


def multiplications(body: Sequence[ChunkStmt], program: LinearProgram, chunk: int) -> int:
    """For one token, counting the pairs of a chunk that see each other once."""
    sizes = {"t": chunk, "d": program.dim_qk, "v": program.state_columns}
    return sum(_multiplications(s, sizes) // chunk for s in body)


def _multiplications(s: ChunkStmt, sizes: dict[str, int]) -> int:
    pairs = sizes["t"] * (sizes["t"] + 1) // 2

    def columns(x: Tile) -> int:
        return sizes[x.axes[1]]

    match s:
        case Gram(_, x):
            return pairs * columns(x)
        case GramGradient(x=x):
            return 2 * pairs * columns(x)
        case Solve(to):
            return pairs * columns(to)
        case Product(to, a):
            return pairs * columns(to) if a.axes == ("t", "t") else sizes["t"] * columns(a) * columns(to)
        case StateStep():
            return sizes["t"] * sizes["d"] * sizes["v"]
        case _:
            return 0


def _state_text(program: LinearProgram) -> str:
    width = 8 if program.element is Storage.FLOAT64 else 4
    size = program.dim_qk * program.state_columns * width
    name = "float64" if width == 8 else "float32"
    column = ", the last column for the sum of the weights" if program.divisor is not None else ""
    return (
        f"{program.dim_qk} x {program.state_columns} {name} for each head, {size:,} bytes{column}\n"
        f"for gradients one of every {SEGMENT_TOKENS} tokens is kept; the backward pass finds the others again"
    )

"""TileLang spellings: one kernel becomes one readable file that imports only tilelang.

Where tiles live and what is copied when is decided before (`codegen/lower/placement.py`); here placed statements are
written down. The same renderer writes for TileLang's CPU target, which has no threads, no memories but one, and no
copies that run ahead.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

from attn_engine.codegen.backends.tilelang_file import TileLangFile
from attn_engine.codegen.backends.tilelang_sequences import NUMBERS, first_rows, sized
from attn_engine.codegen.backends.tilelang_types import COUNTERS, TileLangOptions, block_sizes
from attn_engine.codegen.backends.triton_layout import wrapped
from attn_engine.codegen.backends.triton_types import TYPES, element_storage, widened
from attn_engine.codegen.lower.paged import with_tables_at_hand
from attn_engine.codegen.lower.placed import (
    Branch,
    Copy,
    CopyIn,
    CopyOut,
    Fill,
    Gemm,
    Map,
    Placed,
    ReduceInto,
    Scope,
    Step,
    Steps,
)
from attn_engine.codegen.lower.placement import place
from attn_engine.codegen.lower.shared import values_from_memory
from attn_engine.ir.expr import Expr, Load, transform
from attn_engine.ir.ops import Op
from attn_engine.ir.tile import (
    Accumulate,
    Kernel,
    Let,
    Section,
    StoreTile,
    map_expressions,
)

TOP = 2  # the depth of a kernel's own statements


def render_tilelang(kernel: Kernel, options: TileLangOptions | None = None) -> str:
    """The text of a Python file that defines the kernel as a `T.prim_func` of the kernel's name."""
    return TileLangRenderer(options or TileLangOptions()).render(kernel)


class TileLangRenderer(TileLangFile):
    """Renders one kernel; use a fresh one for each."""

    functions: ClassVar[Mapping[Op, str]] = {
        Op.MAX: "T.max", Op.MIN: "T.min", Op.WHERE: "T.if_then_else", Op.ABS: "T.abs", Op.FLOOR: "T.floor",
        Op.EXP: "T.exp", Op.EXP2: "T.exp2", Op.LOG: "T.log", Op.LOG2: "T.log2", Op.TANH: "T.tanh",
        Op.SIGMOID: "T.sigmoid", Op.SQRT: "T.sqrt", Op.RSQRT: "T.rsqrt", Op.SIN: "T.sin", Op.COS: "T.cos",
        Op.NOT: "T.Not",
    }  # fmt: skip

    def __init__(self, options: TileLangOptions) -> None:
        self.options = options

    def render(self, kernel: Kernel) -> str:
        self.element = element_storage(kernel)
        self.compute = "float64" if self.element.value == "float64" else "float32"
        rounds = TYPES[self.element] != self.compute
        if rounds:
            kernel = replace(kernel, body=map_expressions(kernel.body, lambda e: transform(e, widened)))
        self.kernel = kernel = self.renamed(sized(_as_read(kernel)))
        self.firsts = first_rows(kernel)
        self.sizes = block_sizes(kernel, self.options.cpu)
        self.placed = place(kernel, rounds=rounds)
        self.buffers = {b.name: b for b in self.placed.buffers}
        body = self.lines(self.placed.body, depth=TOP)
        return self.file([*self.positions(), *self.allocations(), *body])

    # -- statements

    def lines(self, body: tuple[Placed, ...], depth: int) -> list[str]:
        pad, lines, self._source = "    " * depth, list[str](), ""
        for s in body:
            self._in_loop = depth > TOP
            head, inner = self.opened(s)
            lines += [f"{pad}{piece}".rstrip() for line in head for piece in wrapped_in(line, depth) if True]
            if isinstance(s, Steps | Branch):
                lines += self.lines(s.body, depth + 1)
            lines += [f"{pad}    {piece}" for line in inner for piece in wrapped_in(line, depth + 1)]
        return lines or [f"{pad}pass"]

    def opened(self, s: Placed) -> tuple[list[str], list[str]]:
        """The lines of a statement at its own depth and those one deeper, without those of its body."""
        match s:
            case Section(title):
                return ["", f"# -- {title}"], []
            case Steps(var, first, stop, _, pipelined):
                return [self.counting(var, first, stop, pipelined)], []
            case Branch(condition):
                return [f"if {self.expr(condition)}:"], []
            case Let():
                return self.number_let(s), []
            case Map(axes, steps):
                return [self.nest(axes)], self.steps(axes, steps)
            case _:
                return [self.call_of(s)], []

    def call_of(self, s: Fill | CopyIn | CopyOut | Copy | Gemm | ReduceInto) -> str:
        match s:
            case Fill(buffer, value):
                return f"T.fill({buffer}, {self.number(value)})"
            case CopyIn(buffer, Load(tensor, _, indices), ahead):
                # Before a loop that may run no trip nothing waits for a bulk copy, and a block must not end with one
                # under way: the threads copy themselves.
                shared = self.buffers[buffer].scope is Scope.SHARED and not self.options.cpu
                how = ", disable_tma=True" if shared and not ahead and not self.placed.waits else ""
                return f"T.copy({self.corner(tensor, indices)}, {buffer}{how})"
            case CopyOut(tensor, indices, buffer):
                return f"T.copy({buffer}, {self.corner(tensor, indices)})"
            case Copy(target, source):
                return f"T.copy({source}, {target})"
            case Gemm(target, left, right, transpose_left, transpose_right, clear):
                flags = ["transpose_A=True"] * transpose_left + ["transpose_B=True"] * transpose_right
                flags += ["clear_accum=True"] * clear
                policy = [] if self.options.cpu else ["policy=FULL_ROW"]
                return f"T.gemm({', '.join([left, right, target, *flags, *policy])})"
            case ReduceInto(target, kind, source, axis):
                return f"T.reduce_{kind}({source}, {target}, dim={self.buffers[source].axes.index(axis)})"

    def counting(self, var: str, first: Expr, stop: Expr, pipelined: bool) -> str:
        ends = f"{self.expr(first)}, {self.expr(stop)}"
        if pipelined and not self.options.cpu and self.stages:
            return f"for {var} in T.Pipelined({ends}, num_stages={self.stages}):"
        return f"for {var} in T.serial({ends}):"

    def nest(self, axes: tuple[str, ...]) -> str:
        counters = ", ".join(COUNTERS[a] for a in axes)
        loop = "T.Parallel" if not self.options.cpu else "T.serial" if len(axes) == 1 else "T.grid"
        return f"for {counters} in {loop}({', '.join(self.extent(a) for a in axes)}):"

    def corner(self, tensor: str, indices: tuple[Expr, ...]) -> str:
        """The first element of a tile: the buffer at the other end of the copy says how large it is."""
        first = (
            self.expr(i) if not i.axes else f"{i.axes[0]}_start" if i.axes[0] in ("q", "kv") else "0"
            for i in indices
        )  # fmt: skip
        return f"{tensor}[{', '.join(first)}]"

    def number_let(self, s: Let) -> list[str]:
        text = self.loaded(s.value) if isinstance(s.value, Load) else self.expr(s.value)
        said, self._source = s.source == self._source, s.source
        if self.firsts and s.name in NUMBERS and not self._in_loop and not self.options.cpu:
            text = f'T.alloc_var("int32", init={text})'
        return [*([] if said or not s.source else [f"# {s.source}"]), f"{s.name} = {text}"]

    # -- loop nests

    def steps(self, axes: tuple[str, ...], steps: tuple[Step, ...]) -> list[str]:
        """The body of a loop nest: positions that it reads, then a line or two for each step."""
        self._loaded: dict[Expr, str] = {}
        lines: list[str] = []
        self._source = ""
        for s in steps:
            self._hoisted: list[str] = []
            made = self.step(s)
            lines += [*self._hoisted, *made]
        text = "\n".join(lines)
        positions = [
            f"{a}_idx = {f'{a}_start + ' if a in ('q', 'kv') else ''}{COUNTERS[a]}"
            for a in axes
            if re.search(rf"\b{a}_idx\b", text)
        ]
        return [*positions, *lines]

    def step(self, s: Step) -> list[str]:
        match s:
            case Let(name, value, source):
                said, self._source = source == self._source, source
                comment = [] if said or not source else [f"# {source}"]
                text = self.loaded(value) if isinstance(value, Load) else self.expr(value)
                return [*comment, f"{self.element_of(name)} = {text}"]
            case StoreTile(tensor, indices, value) | Accumulate(tensor, indices, value):
                inside = self.conditions(tensor, indices)
                sizes = self.kernel.param(tensor).shape
                places = (self.place(tensor, i, n) for i, n in zip(indices, sizes, strict=True))
                place = f"{tensor}[{', '.join(places)}]"
                old = f"{place} + " if isinstance(s, Accumulate) else ""
                line = f"{place} = {old}{self.expr(value, None, 6 if old else 0)}"
                return [f"if {' & '.join(inside)}:", f"    {line}"] if inside else [line]

    def element_of(self, name: str) -> str:
        buffer = self.buffers.get(name)
        return name if buffer is None else f"{name}[{', '.join(COUNTERS[a] for a in buffer.axes)}]"


def _as_read(kernel: Kernel) -> Kernel:
    """The kernel whose elements say where they lie: each in its page, values in memory."""
    return values_from_memory(with_tables_at_hand(kernel, within_tiles=True))


def wrapped_in(line: str, depth: int) -> list[str]:
    """The lines of one statement, which may itself be indented."""
    inner = len(line) - len(line.lstrip())
    pad = " " * inner
    return [pad + piece for piece in wrapped(line.strip(), depth + inner // 4)] if line else [""]

"""Chunk programs carried out by torch, statement by statement: the definition of what the statements mean.

All heads, and all sequences that are equally long, at once. Nothing is changed in place, so a forward pass is
differentiable by torch autograd too. See ir/chunk.py for the statements.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from attn_engine.ir.chunk import (
    D_STATE,
    STATE,
    CarriedGradient,
    ChunkKernel,
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
    TokenStep,
    Within,
)
from attn_engine.ir.expr import Var
from attn_engine.ir.linear import LinearProgram
from attn_engine.runtime.decay_faults import check_decays
from attn_engine.runtime.linear_inputs import LinearInputs
from attn_engine.runtime.token_rows import TokenRows

BLOCK = 16  # rows of a diagonal block whose decays are multiplied out, where a decay is a vector


@dataclass(frozen=True, eq=False)
class ChunkRun:
    """One pass: the kernel, what the call brings, the tokens of a chunk, and where rows are written.

    given: further rows by variable, (B, H, T, dim), such as the gradient of the output.
    """

    kernel: ChunkKernel
    inputs: LinearInputs
    chunk: int
    dtype: torch.dtype
    outputs: dict[str, Tensor] = field(default_factory=dict)
    given: Mapping[Var, Tensor] = field(default_factory=dict)

    def forward(self, batches: slice, first: int, length: int, state: Tensor) -> Tensor:
        """The state after the sequences."""
        for tokens in self._chunks(first, length):
            machine = self._machine(batches, tokens)
            machine.tiles[STATE] = state
            machine.run(self.kernel.scan)
            state = machine.tiles[STATE]
        return state

    def backward(self, batches: slice, first: int, length: int, state: Tensor, d_state: Tensor) -> Tensor:
        """The gradient of the state before the sequences, from that of the state after them."""
        chunks, states = self._chunks(first, length), [state]
        for tokens in chunks[:-1]:
            machine = self._machine(batches, tokens)
            machine.tiles[STATE] = states[-1]
            machine.run(self.kernel.scan)
            states.append(machine.tiles[STATE])
        for tokens, before in reversed(list(zip(chunks, states, strict=False))):
            machine = self._machine(batches, tokens)
            machine.tiles |= {STATE: before, D_STATE: d_state}
            machine.run(self.kernel.gradient)
            d_state = machine.tiles[D_STATE]
        return d_state

    def _chunks(self, first: int, length: int) -> list[Tensor]:
        tokens = torch.arange(first, first + length)
        tokens = tokens.flip(0) if self.kernel.program.reverse else tokens
        return list(tokens.split(self.chunk)) if length else []

    def _machine(self, batches: slice, tokens: Tensor) -> _Machine:
        rows = TokenRows(self.kernel.program, self.inputs, batches, tokens, self.dtype)
        for var, x in self.given.items():
            rows.give(var, x[batches].index_select(2, tokens.to(x.device)))
        return _Machine(self.kernel.program, rows, batches, tokens, self.outputs)


class _Machine:
    """The tiles of one chunk."""

    def __init__(
        self,
        program: LinearProgram,
        rows: TokenRows,
        batches: slice,
        tokens: Tensor,
        outputs: dict[str, Tensor],
    ) -> None:
        self.program, self.rows, self.batches, self.tokens = program, rows, batches, tokens
        self.outputs = outputs
        self.tiles: dict[Tile, Tensor] = {}

    def run(self, body: tuple[ChunkStmt, ...]) -> None:
        for statement in body:
            self._statement(statement)

    def _statement(self, s: ChunkStmt) -> None:
        match s:
            case Section():
                pass
            case Rows():
                self._rows(s)
            case Decays():
                self._decays(s)
            case Scale(to, x, by):
                self.tiles[to] = self.tiles[x] * _across(self.tiles[by], by)
            case CarriedGradient():
                self._carried(s)
            case GramGradient():
                self._gram_gradient(s)
            case DiagonalGradient(d_matrix, x, y, d_x, d_y):
                d = self.tiles[d_matrix].diagonal(dim1=-2, dim2=-1)[..., None]
                self.tiles[d_x] = self.tiles[d_x] + d * self.tiles[y]
                self.tiles[d_y] = d * self.tiles[x]
            case _:
                self._matrices(s)

    def _matrices(self, s: Gram | Diagonal | Product | Solve | StateStep | TokenStep) -> None:
        match s:
            case Gram():
                self._gram(s)
            case Diagonal(to, x, y):
                self.tiles[to] = self.tiles[to] + torch.diag_embed((self.tiles[x] * self.tiles[y]).sum(-1))
            case Product():
                self._product(s)
            case Solve(to, matrix, turned):
                lower = self.tiles[matrix].mT
                lower = lower + torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device)
                triangle = lower.mT if turned else lower
                self.tiles[to] = torch.linalg.solve_triangular(
                    triangle, self.tiles[to], upper=turned, unitriangular=True
                )
            case StateStep(state, keys, values, whole, negative):
                before = self.tiles[state]
                if whole is not None:
                    factor = self.tiles[whole]
                    before = before * (factor[..., None] if whole.axes else factor[..., None, None])
                step = self.tiles[keys].mT @ self.tiles[values]
                self.tiles[state] = before - step if negative else before + step

            case TokenStep():
                self._token_step(s)

    def _token_step(self, s: TokenStep) -> None:
        tiles = self.tiles
        before = state = tiles[s.state]
        if s.decay is not None:
            factor = tiles[s.decay][:, :, 0].exp()
            state = state * (factor[..., None] if len(s.decay.axes) == 2 else factor[..., None, None])
        value = tiles[s.value]
        if s.eraser is not None:
            value = value - tiles[s.eraser] @ state
        state = state + tiles[s.key].mT @ value
        out = tiles[s.query] @ (before if s.exclusive else state)
        if s.bonus is not None:
            out = out + (tiles[s.query] * tiles[s.bonus]).sum(-1, keepdim=True) * value
        tiles[s.to], tiles[s.state] = out, state

    def _rows(self, s: Rows) -> None:
        dims = self.program.dim_v
        for tile, x in self.tiles.items():
            if tile.axes in (("t", "d"), ("t",)):
                self.rows.give(tile.var, x)
            elif tile.axes == ("t", "v"):
                self.rows.give(tile.var, x[..., :dims])
                if x.shape[-1] > dims:
                    self.rows.give(tile.last, x[..., dims])
        made = self.rows.values([(e, tile.var.axes) for tile, e in s.values])
        self.tiles |= {tile: x for (tile, _), x in zip(s.values, made, strict=True)}
        if s.fault is not None:
            check_decays(self.tiles[s.fault], self.batches, self.tokens)
        for tile, e in s.last:
            (column,) = self.rows.values(((e, ("q",)),))
            self.tiles[tile] = torch.cat([self.tiles[tile], column[..., None]], -1)
        for w in s.writes:
            (x,) = self.rows.values(((w.value, tuple(dict.fromkeys(("q", *w.axes)))),))
            to = self.outputs[w.tensor]
            if "q" in w.axes:
                to[self.batches, :, self.tokens.to(to.device)] = x.detach() if not x.requires_grad else x
            else:
                to[self.batches] += x.sum(2)

    def _decays(self, s: Decays) -> None:
        steps = self.tiles[s.decay]
        sums = steps.cumsum(2)
        self.tiles[s.sums] = sums
        end = sums[:, :, -1:]
        self.tiles[s.writes] = (end - sums).exp()
        self.tiles[s.whole] = end[:, :, 0].exp()
        if s.steps is not None:
            self.tiles[s.steps] = steps.exp()
        if s.reads is not None:
            self.tiles[s.reads] = (sums - steps if s.exclusive else sums).exp()
        if s.erases is not None:
            self.tiles[s.erases] = sums.exp()

    def _gram(self, s: Gram) -> None:
        x, y = self.tiles[s.x], self.tiles[s.y]
        if s.within is None:
            found = torch.where(_pairs(x, s.strict), x @ y.mT, 0.0)
        elif s.within.vector:
            found = torch.einsum("bhid,bhjd,bhijd->bhij", x, y, self._between(s.within, s.strict))
        else:
            found = (x @ y.mT) * self._between(s.within, s.strict)
        self.tiles[s.to] = -found.mT if s.negative else found.mT

    def _between(self, within: Within, strict: bool) -> Tensor:
        """e^{G_i - G_j} where token i may read token j, else 0."""
        sums, steps = self.tiles[within.sums], self.tiles[within.decay]
        before = sums - steps if within.exclusive else sums
        visible = _pairs(sums, strict)
        if within.vector:
            return (
                (before[:, :, :, None] - sums[:, :, None]).masked_fill(~visible[..., None], -math.inf).exp()
            )
        return (before[:, :, :, None] - sums[:, :, None]).masked_fill(~visible, -math.inf).exp()

    def _product(self, s: Product) -> None:
        a, b = self.tiles[s.a], self.tiles[s.b]
        a = a.mT if s.a.axes == ("t", "t") and not s.upper else a
        found = a @ (b.mT if s.turned else b)
        found = -found if s.negative else found
        self.tiles[s.to] = self.tiles[s.to] + found if s.add else found

    def _carried(self, s: CarriedGradient) -> None:
        vector = len(s.d_decay.axes) == 2

        def terms(x: Tile, d_x: Tile) -> Tensor:
            product = self.tiles[x] * self.tiles[d_x]
            return product if vector else product.sum(-1)

        through = self.tiles[s.state] * self.tiles[s.d_state]
        whole = self.tiles[s.whole]
        total = (through.sum(-1) if vector else through.sum((-1, -2))) * whole
        found = total[:, :, None] + _before(terms(*s.write))
        for x, d_x, exclusive in s.reads:
            found = found + _after(terms(x, d_x), exclusive)
        self.tiles[s.d_decay] = found

    def _gram_gradient(self, s: GramGradient) -> None:
        d, x, y = self.tiles[s.d_matrix].mT, self.tiles[s.x], self.tiles[s.y]
        if s.within is None:
            d = torch.where(_pairs(x, s.strict), d, 0.0)
            d_x, d_y = d @ y, d.mT @ x
        elif s.within.vector:
            weighted = d[..., None] * self._between(s.within, s.strict)
            d_x = torch.einsum("bhijd,bhjd->bhid", weighted, y)
            d_y = torch.einsum("bhijd,bhid->bhjd", weighted, x)
            pairs = weighted * x[:, :, :, None] * y[:, :, None]
            self._add(s.d_decay, _crossing(pairs, s.within.exclusive))
        else:
            weighted = d * self._between(s.within, s.strict)
            d_x, d_y = weighted @ y, weighted.mT @ x
            pairs = torch.where(_pairs(x, True), d * self.tiles[s.matrix].mT, 0.0)
            self._add(s.d_decay, _crossing(pairs[..., None], s.within.exclusive)[..., 0])
        self.tiles[s.d_x] = self.tiles[s.d_x] + d_x
        self.tiles[s.d_y] = self.tiles[s.d_y] + d_y

    def _add(self, to: Tile | None, x: Tensor) -> None:
        assert to is not None
        self.tiles[to] = self.tiles[to] + x


def _across(factor: Tensor, tile: Tile) -> Tensor:
    return factor if len(tile.axes) == 2 else factor[..., None]


def _pairs(x: Tensor, strict: bool) -> Tensor:
    """Which token i (rows) may read which token j."""
    position = torch.arange(x.shape[2], device=x.device)
    return position[:, None] > position if strict else position[:, None] >= position


def _after(x: Tensor, exclusive: bool) -> Tensor:
    """For each token the sum over the tokens from it on; exclusive: after it."""
    found = x.flip(2).cumsum(2).flip(2)
    return torch.cat([found[:, :, 1:], torch.zeros_like(found[:, :, :1])], 2) if exclusive else found


def _before(x: Tensor) -> Tensor:
    """For each token the sum over the tokens before it."""
    return torch.cat([torch.zeros_like(x[:, :, :1]), x.cumsum(2)[:, :, :-1]], 2)


def _crossing(pairs: Tensor, exclusive: bool) -> Tensor:
    """pairs (B, H, i, j, d), zero unless j <= i -> for each t the sum over j < t <= i; exclusive: t < i."""
    nothing = torch.zeros_like(pairs[:, :, :, :1])
    earlier = torch.cat([nothing, pairs.cumsum(3)[:, :, :, :-1]], 3)  # [i, t]: the sum over j < t
    return _after(earlier, exclusive).diagonal(dim1=2, dim2=3).movedim(-1, 2)

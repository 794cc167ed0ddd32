"""A program on a backend: kernels compiled when first needed, tensors allocated, kernels launched in order.

All tensors here are in logical order, (batch, head, row, dimension), with any strides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from attn_engine.codegen.lower.capture import (
    CaptureGradient,
    Route,
    added_beside_keys,
    capture_gradients,
    shared_axes,
)
from attn_engine.codegen.lower.decode import PARTIAL_OUT, partial_state
from attn_engine.codegen.lower.row_values import row_gradient_param
from attn_engine.codegen.lower.shares import DK_PARTS
from attn_engine.codegen.lower.values import saved_param
from attn_engine.codegen.pipeline import lower
from attn_engine.codegen.schedule import (
    Gradients,
    Schedule,
    few_rows_schedule,
    short_query_schedule,
    tile_of_few_rows,
)
from attn_engine.errors import GradientNotSupported
from attn_engine.ir.ops import Number
from attn_engine.ir.passes.pack_heads import Packing, pack_heads
from attn_engine.ir.passes.pooled_gradient import backward_program
from attn_engine.ir.passes.rule_analysis import saved_of_empty_row
from attn_engine.ir.program import GROUP, Attention, OnlineRule
from attn_engine.ir.tile import Kernel, Module, TileTable
from attn_engine.runtime.backend import Backend, Launchable, Scalars, Tensors
from attn_engine.runtime.backward_shares import key_shares, query_shares, shares_fewer_queries
from attn_engine.runtime.capture_sums import captured_gradient
from attn_engine.runtime.few_rows import PackedHeads, choose_packing, choose_splits
from attn_engine.runtime.gradient_parts import gradient_parts
from attn_engine.runtime.parameter_sums import row_sums
from attn_engine.runtime.pools import empty_pools, joined_pools
from attn_engine.runtime.query_parts import ROOM, QueryParts
from attn_engine.runtime.sequence_rows import with_padded_rows
from attn_engine.runtime.sequences import (
    OverSequences,
    SequenceTables,
    fill_other_rows,
    grouped,
    sequences_of_call,
)
from attn_engine.runtime.shared_values import values_in_keys
from attn_engine.runtime.storage import compute_dtype
from attn_engine.runtime.tile_tables import tile_tables

_NO_TENSORS: Tensors = {}


@dataclass(frozen=True, slots=True, eq=False)
class Direction:
    """The kernels of the forward or the backward pass in order, the tables that each of them reads, and the captured
    gradients that they compute. rule: with the gradients of row values that this direction has.
    with_query_parts: which kernel adds to parts of dQ. shares_queries: one stores parts of dK and dV."""

    rule: OnlineRule
    kernels: tuple[Launchable, ...]
    tables: tuple[tuple[TileTable, ...], ...]
    captures: tuple[CaptureGradient, ...]
    with_query_parts: int | None
    adjoints: tuple[str, ...] = ()  # rows that the first of them leave for the others
    shares_queries: bool = False


@dataclass(eq=False)
class CompiledAttention:
    """The kernels of one program on one backend. Thread-safe: a race compiles twice and keeps one."""

    program: Attention
    backend: Backend
    schedule: Schedule
    _directions: dict[tuple[str, tuple[str, ...], tuple[str, ...]], Direction] = field(default_factory=dict)
    _variants: dict[tuple[Packing, int], CompiledAttention] = field(default_factory=dict)

    def module(self, direction: str, learned: tuple[str, ...] = (), rows: tuple[str, ...] = ()) -> Module:
        return lower(self.program, self.schedule, direction, learned, rows)

    def supported(self, learned: tuple[str, ...]) -> tuple[str, ...]:
        """Those of the captured tensors whose gradients the backend can compute."""
        return tuple(n for n in learned if self._accepts(n))

    def _accepts(self, name: str) -> bool:
        try:
            self.backend.refuse(self.program, capture_gradients(self.program, (name,)))
        except GradientNotSupported:
            return False
        return True

    def kernels(self, direction: str, learned: tuple[str, ...] = (), rows: tuple[str, ...] = ()) -> Direction:
        """Lowered and compiled kernels of a direction, from this object's cache; `rows` have gradients of their own."""
        found = self._directions.get((direction, learned, rows))
        if found is None:
            program = backward_program(self.program, rows)
            captures = capture_gradients(program, learned)
            self.backend.refuse(self.program, captures)
            kernels = self.module(direction, learned, rows).kernels
            compiled = tuple(self._compiled(k) for k in kernels)
            query = (i for i, k in enumerate(kernels) if any(p.name == "dQ_parts" for p in k.params))
            between = tuple(p.name for k in kernels if k.name == "adjoints" for p in k.params if p.output)
            tables = tuple(k.tables for k in kernels)
            shares = any(p.name == DK_PARTS for k in kernels for p in k.params)
            found = Direction(program.rule, compiled, tables, captures, next(query, None), between, shares)
            self._directions[direction, learned, rows] = found
        return found

    def _compiled(self, kernel: Kernel) -> Launchable:
        compiled = self.backend.compile(kernel, self.schedule)
        return compiled if self.program.sequences is None else OverSequences(kernel, compiled)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, captured: Tensors, scalars: Scalars, out: Tensor
    ) -> list[Tensor]:
        """Fill `out` (B, H, Sq, Dv); returns the saved row values (B, H, Sq), in order, and pooled weights."""
        if (compiled := self.of_values(k, v, captured)) is not self:
            return compiled.forward(q, k, v, captured, scalars, out)
        if self.schedule.folded and scalars["scale"] <= 0:
            return self.unfolded.forward(q, k, v, captured, scalars, out)
        tables = sequences_of_call(self.program, captured)
        rows = q.shape[2] if tables is None else tables.longest["q"]
        packing = choose_packing(self.program, self.schedule, q, k, rows)
        if packing is Packing.NONE:
            return self.of_rows(packing, rows)._forward(q, k, v, captured, scalars, out, tables)
        packed = PackedHeads(q, k, out)
        compiled = self.of_rows(packing, rows * packed.group)
        numbers = {**scalars, GROUP.name: packed.group}
        if tables is not None:
            captured, tables = grouped(captured, tables, packed.group)
        return packed.finish(compiled._forward(packed.q, k, v, captured, numbers, packed.out, tables))

    @cached_property
    def unfolded(self) -> CompiledAttention:
        """The kernels for a scale that is not positive: it cannot be taken out of a maximum."""
        return CompiledAttention(self.program, self.backend, replace(self.schedule, folded=False))

    def of_values(self, k: Tensor, v: Tensor, tensors: Tensors) -> CompiledAttention:
        """The kernels of a forward pass over such values: those that load tiles once where v lies in k."""
        return self._sharing if not self.program.values_in_keys and values_in_keys(k, v, tensors) else self

    @cached_property
    def _sharing(self) -> CompiledAttention:
        program, schedule = replace(self.program, values_in_keys=True), self.schedule
        if program.listed is None and schedule == self.backend.schedule(self.program):
            schedule = self.backend.schedule(program)  # one tile less to hold
        return CompiledAttention(program, self.backend, schedule)

    def of_rows(self, packing: Packing, rows: int) -> CompiledAttention:
        """The kernels of a forward pass whose heads have this many query rows each."""
        tile = 0 if self.program.rule.pooled else tile_of_few_rows(self.schedule, rows)
        kv_block = self.program.listed.kv if self.program.listed else 0
        schedule = (
            few_rows_schedule(tile, self.schedule.block_q, kv_block)
            if tile
            else short_query_schedule(self.schedule, rows)
        )
        if packing is Packing.NONE and schedule is self.schedule:
            return self
        found = self._variants.get((packing, schedule.block_q))
        if found is None:
            found = CompiledAttention(pack_heads(self.program, packing), self.backend, schedule)
            self._variants[packing, schedule.block_q] = found
        return found

    def _forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        captured: Tensors,
        scalars: Scalars,
        out: Tensor,
        tables: SequenceTables | None = None,
    ) -> list[Tensor]:
        """The forward pass as this object's schedule says, in one piece or with the keys split."""
        rows, sizes = q.shape[:3], sizes_of_call(q, k, tables)
        saved = {name: q.new_empty(rows, dtype=self.compute) for name in self.saved_names}
        if tables is not None:
            fill_other_rows(tables, "q", {"O": out, **saved}, self._empty_row)
        tensors = {"Q": q, "K": k, "V": v, "O": out, **captured, **saved}
        splits = choose_splits(self.program, self.schedule, q, k, captured, sizes["kv_len"])
        if splits > 1:
            sizes["splits"] = splits
            scalars = {**scalars, "splits": splits}
            tensors.update(self._partials(q, splits))
        pools = empty_pools(self.program, self.schedule, sizes, self.compute, q.device)
        tensors.update(pools)
        self._launch(self.kernels("forward" if splits == 1 else "decode"), tensors, captured, scalars, sizes)
        return [*saved.values(), *joined_pools(self.program, self.schedule, pools, saved)]

    def _launch(
        self,
        direction: Direction,
        tensors: dict[str, Tensor],
        captured: Tensors,
        scalars: Scalars,
        sizes: Mapping[str, int],
        parts: QueryParts | None = None,
    ) -> None:
        """The kernels in order, each with its tables; the one that makes parts of dQ once for each piece of them."""
        for i, (kernel, tables) in enumerate(zip(direction.kernels, direction.tables, strict=True)):
            if tables:
                tensors.update(tile_tables(tables, captured, scalars, sizes, self.compute))
            if parts is not None and i == direction.with_query_parts:
                for more in parts.pieces(tensors, scalars["scale"]):
                    kernel.launch(tensors, {**scalars, **more}, sizes)
            else:
                kernel.launch(tensors, scalars, sizes)

    def _partials(self, q: Tensor, splits: int) -> dict[str, Tensor]:
        """Where the splits leave their outputs and row states."""
        shapes = self.partial_shapes(q, splits)
        return {n: torch.empty(x, dtype=self.compute, device=q.device) for n, x in shapes.items()}

    def partial_shapes(self, q: Tensor, splits: int) -> dict[str, tuple[int, ...]]:
        """Of the outputs and row states that splits leave, by the kernels' names."""
        shape = (splits, *q.shape[:3])
        states = {partial_state(s.name): shape for s in self.program.rule.states}
        return {**states, PARTIAL_OUT: (*shape, self.program.dim_v)}

    def backward(
        self,
        d_out: Tensor,
        inputs: tuple[Tensor, Tensor, Tensor],
        out: Tensor,
        saved: Sequence[Tensor],
        captured: Tensors,
        scalars: Scalars,
        gradients: tuple[Tensor, Tensor, Tensor],
        learned: tuple[str, ...],
        d_rows: Tensors = _NO_TENSORS,
        d_pools: Tensors = _NO_TENSORS,
    ) -> dict[str, Tensor]:
        """Fill dq, dk, dv; returns the gradients of the tensors in `learned`, in their own shapes and dtypes.

        d_rows: gradients (B, H, Sq) of saved row values by name, of those that have one. d_pools: what the kernels
        read of the gradient of pooled sums (`pools.pooled_gradients`).
        """
        if self.schedule.folded and scalars["scale"] <= 0:
            return self.unfolded.backward(
                d_out, inputs, out, saved, captured, scalars, gradients, learned, d_rows, d_pools
            )
        q, k, v = inputs
        dq, dk, dv = gradients
        tables = sequences_of_call(self.program, captured)
        sizes = sizes_of_call(q, k, tables)
        if not learned and (compiled := self.of_shares(gradients, sizes)) is not self:
            return compiled.backward(
                d_out, inputs, out, saved, captured, scalars, gradients, learned, d_rows, d_pools
            )
        rows = (*d_rows, *(p.name for p in self.program.rule.pooled if d_pools and p.kind == "sum"))
        direction = self.kernels("backward", learned, rows)
        numbers = dict(scalars)
        tensors: dict[str, Tensor] = {
            "Q": q,
            "K": k,
            "V": v,
            "O": out,
            "dO": d_out,
            "dK": dk,
            "dV": dv,
            **captured,
            **d_pools,
            **dict(zip(self.saved_names, saved, strict=True)),
            **{row_gradient_param(name): x for name, x in d_rows.items()},
            **{n: q.new_empty(q.shape[:3], dtype=self.compute) for n in ("Delta", *direction.adjoints)},
        }
        if tables is not None:
            fill_other_rows(tables, "kv", {"dK": dk, "dV": dv}, {})
        splits, parts, of_keys = 1, None, None
        if direction.shares_queries:
            splits = numbers["splits"] = sizes["splits"] = query_shares(sizes, self.schedule.backward_q)
            of_keys = gradient_parts(True, gradients, splits, self.compute, self.program.sequences is None)
            tensors.update(of_keys.tensors())
        elif self.schedule.gradients is Gradients.ONE_KERNEL:
            parts = self._query_parts(dq, sizes, direction.captures, captured)
            splits = numbers["splits"] = sizes["splits"] = parts.splits
        else:
            tensors["dQ"] = dq
            if tables is not None:
                fill_other_rows(tables, "q", {"dQ": dq}, {})
        tensors.update(
            {c.buffer: self._buffer(c, sizes, captured, splits, q.device) for c in direction.captures}
        )
        self._launch(direction, tensors, captured, numbers, sizes, parts)
        if of_keys is not None:
            of_keys.finish(scalars["scale"])
        numbers.update(sizes)
        self._order_diagonals(direction.captures, tensors)
        if tables is not None and self.program.sequences is not None and learned:
            tensors = with_padded_rows(self.program.sequences, tables, direction.rule, tensors)
        per_row = row_sums(direction.rule, learned, tensors, numbers)
        return {
            name: captured_gradient(name, direction.captures, tensors, numbers, per_row) for name in learned
        }

    @cached_property
    def compute(self) -> torch.dtype:
        return compute_dtype(self.program.element)

    @cached_property
    def saved_names(self) -> tuple[str, ...]:
        """The kernels' names of the saved row values."""
        return tuple(saved_param(name) for name, _ in self.program.rule.saved)

    @cached_property
    def _empty_row(self) -> dict[str, Number]:
        """The saved row values where no key is seen, by the kernels' names."""
        return {saved_param(name): x for name, x in saved_of_empty_row(self.program.rule).items()}

    def of_shares(
        self, gradients: tuple[Tensor, Tensor, Tensor], sizes: Mapping[str, int]
    ) -> CompiledAttention:
        """The kernels of a backward pass to dq, dk and dv of these sizes: those that leave fewer parts."""
        schedule, listed = self.schedule, self.program.listed
        if schedule.gradients is not Gradients.ONE_KERNEL or schedule.shared_queries or listed is not None:
            return self
        shares = key_shares(sizes, schedule.backward_kv), query_shares(sizes, schedule.backward_q)
        return self._sharing_queries if shares_fewer_queries(*gradients, *shares) else self

    @cached_property
    def _sharing_queries(self) -> CompiledAttention:
        return CompiledAttention(self.program, self.backend, replace(self.schedule, shared_queries=True))

    def _query_parts(
        self, dq: Tensor, sizes: Mapping[str, int], captures: Sequence[CaptureGradient], captured: Tensors
    ) -> QueryParts:
        """How dQ is added up: which axes a program instance runs over, and how much of them in a launch."""
        beside_keys = [c for c in captures if added_beside_keys(c)]
        shared = shared_axes(beside_keys)
        pairs = [captured[c.load.tensor].numel() for c in beside_keys if c.route is Route.PAIR]
        group, room = dq.shape[1] // max(1, sizes["kv_heads"]), max(ROOM, dq.numel(), *pairs)
        packed = self.program.sequences is not None and self.program.sequences.packed
        batches = sizes["batches"] if packed else None
        splits = key_shares(sizes, self.schedule.backward_kv, shared)
        return QueryParts(dq, splits, group, shared, self.compute, room, batches)

    def _order_diagonals(self, captures: Sequence[CaptureGradient], tensors: dict[str, Tensor]) -> None:
        """Sums per diagonal in order of q_idx - kv_idx, as `scatter_sums` wants them."""
        for c in captures:
            if c.route is Route.DIAGONAL and self.schedule.backward_lanes.axis == "kv":
                tensors[c.buffer] = tensors[c.buffer].flip(-1)

    def _buffer(
        self,
        c: CaptureGradient,
        sizes: Mapping[str, int],
        captured: Tensors,
        splits: int,
        device: torch.device,
    ) -> Tensor:
        """Where the kernels put a captured gradient; zeros, because they add to it."""
        batches, heads, q_len, kv_len = (sizes[n] for n in ("batches", "heads", "q_len", "kv_len"))
        parts = (splits,) if self.schedule.gradients is Gradients.ONE_KERNEL else ()
        shape = {
            Route.ROW: (*parts, batches, heads, q_len),
            Route.COLUMN: (batches, heads, kv_len),
            Route.DIAGONAL: (*parts, batches, heads, max(0, q_len + kv_len - 1)),
            Route.PAIR: tuple(captured[c.load.tensor].shape),
        }[c.route]
        return torch.zeros(shape, dtype=self.compute, device=device)


def sizes_of(q: Tensor, k: Tensor) -> dict[str, int]:
    batches, heads, q_len, _ = q.shape
    _, kv_heads, kv_len, _ = k.shape
    return {"batches": batches, "heads": heads, "kv_heads": kv_heads, "q_len": q_len, "kv_len": kv_len}


def sizes_of_call(q: Tensor, k: Tensor, tables: SequenceTables | None) -> dict[str, int]:
    """The sizes that kernels see: those of sequences, where the call brings some."""
    sizes = sizes_of(q, k)
    return sizes if tables is None else tables.sizes(sizes)

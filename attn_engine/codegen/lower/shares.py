"""How a backward pass in one kernel is cut into program instances, and what each of them writes.

KeyShares: an instance owns kv tiles. It stores their dK and dV, and adds to a part of dQ that is its own; the parts are
summed afterwards, as many numbers as there are instances times queries.

QueryShares: an instance owns queries. It adds to their dQ in place, and stores a part of dK and dV for each kv tile.
That is the better cut where little is computed for each query, as with blocks that a call gives, and where many query
heads read few kv heads or keys (`Schedule.shared_queries`).
"""

from __future__ import annotations

from dataclasses import dataclass

from attn_engine.codegen.lower.capture import CaptureGradient
from attn_engine.codegen.lower.forward import later_rows_see_more
from attn_engine.codegen.lower.ranges import split_bounds
from attn_engine.codegen.lower.values import (
    D_IDX,
    DV_IDX,
    GROUP_OF_HEADS,
    KV_LEN,
    KV_ROW,
    Q_LEN,
    Q_ROW,
    SCALE,
    SPLIT,
    compute_storage,
    indices,
    scalar,
    tile,
    wide,
)
from attn_engine.codegen.schedule import Schedule
from attn_engine.ir.expr import Const, Expr, Var
from attn_engine.ir.passes.mask_range import plan_mask
from attn_engine.ir.program import BATCH, HEAD, Q_IDX, Attention
from attn_engine.ir.tile import Loop, Param, Section, Stmt, StoreTile

D_KEY, D_VALUE = tile("d_key", "kv", "d"), tile("d_value", "kv", "dv")
DQ_PARTS, DQ_SUMS, DK_PARTS, DV_PARTS = "dQ_parts", "dQ_sums", "dK_parts", "dV_parts"
SHARE = scalar("split_begin"), scalar("split_end")


def shares_queries(program: Attention, schedule: Schedule, captures: tuple[CaptureGradient, ...]) -> bool:
    """Whether the queries are shared out. Not where sums over queries are wanted that have no parts."""
    wanted = schedule.shared_queries if program.listed is None else program.listed.tested
    return wanted and not captures


def d_key_value(program: Attention) -> tuple[Param, ...]:
    return wide(program, "dK", output=True), wide(program, "dV", output=True)


def d_key_value_stores() -> list[Stmt]:
    return [StoreTile("dK", indices("dK"), D_KEY * SCALE), StoreTile("dV", indices("dV"), D_VALUE)]


@dataclass(frozen=True, slots=True)
class KeyShares:
    """tiles: rows of a tile. shared: axes over which every instance runs (`capture.shared_axes`)."""

    program: Attention
    tiles: dict[str, int]
    shared: tuple[str, ...]

    @property
    def queries(self) -> None:
        """Every instance meets all queries."""

    @property
    def grid(self) -> tuple[str, ...]:
        return ("split", *(axis for axis in ("kv_head", "batch") if axis not in self.shared))

    @property
    def numbers(self) -> tuple[Var, ...]:
        ends = (scalar(f"{axis}_{end}") for axis in self.shared for end in ("begin", "end"))
        return (scalar("splits"), *ends)

    def outputs(self) -> tuple[Param, ...]:
        shape = ("splits", "batches", "heads", "q_len", "dim_qk")
        return (*d_key_value(self.program), Param(DQ_PARTS, compute_storage(self.program), shape, True))

    def query_part(self) -> tuple[str, tuple[Expr, ...]]:
        """Where dQ is added to: a slice of the split, from the first of the batches and heads of this launch on."""
        batch = BATCH - scalar("batch_begin") if "batch" in self.shared else BATCH
        head = HEAD - scalar("kv_head_begin") * GROUP_OF_HEADS if "kv_head" in self.shared else HEAD
        return DQ_PARTS, (SPLIT, batch, head, Q_IDX, D_IDX)

    def stores(self) -> list[Stmt]:
        return d_key_value_stores()

    def over(self, body: list[Stmt]) -> list[Stmt]:
        """The kernel's body around that of a kv tile."""
        n = self.tiles["kv"]
        bounds = split_bounds(n, Const(0), scalar("kv_tiles") * n, (KV_LEN + (n - 1)) // n)
        for axis in self.shared:
            body = [Loop(axis, scalar(f"{axis}_begin"), scalar(f"{axis}_end"), None, tuple(body))]
        loop = Loop("kv_start", *SHARE, "kv", tuple(body), "kv_tile")
        return [Section("kv tiles of this split"), *bounds, loop]


@dataclass(frozen=True, slots=True)
class QueryShares:
    """tiles: rows of a tile. shared: must be empty."""

    program: Attention
    tiles: dict[str, int]
    shared: tuple[str, ...] = ()

    @property
    def queries(self) -> tuple[Expr, Expr]:
        return SHARE

    @property
    def grid(self) -> tuple[str, ...]:
        return ("split", "kv_head", "batch")

    @property
    def numbers(self) -> tuple[Var, ...]:
        return (scalar("splits"),)

    def outputs(self) -> tuple[Param, ...]:
        storage, keys = compute_storage(self.program), ("splits", "batches", "kv_heads", "kv_len")
        return (
            Param(DK_PARTS, storage, (*keys, "dim_qk"), True),
            Param(DV_PARTS, storage, (*keys, "dim_v"), True),
            Param(DQ_SUMS, storage, ("batches", "heads", "q_len", "dim_qk"), True),
        )

    def query_part(self) -> tuple[str, tuple[Expr, ...]]:
        """Where dQ is added to."""
        return DQ_SUMS, (*Q_ROW, D_IDX)

    def stores(self) -> list[Stmt]:
        return [
            StoreTile(DK_PARTS, (SPLIT, *KV_ROW, D_IDX), D_KEY * SCALE),
            StoreTile(DV_PARTS, (SPLIT, *KV_ROW, DV_IDX), D_VALUE),
        ]

    def over(self, body: list[Stmt]) -> list[Stmt]:
        """The kernel's body around that of a kv tile."""
        n, kv = self.tiles["q"], self.tiles["kv"]
        plan = plan_mask(self.program.mask.result if self.program.mask else None, "kv")
        tiles = (Q_LEN + (n - 1)) // n
        heavy_last = self.program.listed is None and later_rows_see_more(plan)
        bounds = split_bounds(n, Const(0), scalar("q_tiles") * n, tiles, "q", last_first=heavy_last)
        end = (KV_LEN + (kv - 1)) // kv * kv
        loop = Loop("kv_start", Const(0), end, "kv", tuple(body), "kv_tile")
        return [Section("q tiles of this split"), *bounds, loop]

"""Schedules: how a program is cut into tiles. Data only; lowering takes a schedule and never chooses one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from functools import lru_cache

from attn_engine.ir.program import ListedBlocks
from attn_engine.ir.tile import Lanes


class Edges(Enum):
    """How loop tiles that the mask cuts are told from those that it does not."""

    SPLIT = "split"  # a loop for each: left edge, full, right edge (a CPU prints the two bodies once each)
    BRANCH = "branch"  # one loop, the mask under an `if` (fewest registers on a GPU, one pipeline)


class Gradients(Enum):
    """Which kernels make up the backward pass."""

    ONE_KERNEL = (
        "one"  # kv outer, q inner; dQ accumulated in memory, one part per split (five products a tile)
    )
    TWO_KERNELS = "two"  # dQ (q outer) and dK/dV (kv outer), nothing shared (seven products, no buffers)


@dataclass(frozen=True, slots=True)
class Launch:
    """How one kernel is cut and launched: rows of its tiles, warps of a program instance, stages of its loads."""

    q: int
    kv: int
    num_warps: int = 4
    num_stages: int = 2

    def __str__(self) -> str:
        return f"{self.q} x {self.kv} ({self.num_warps} warps, {self.num_stages} stages)"


@dataclass(frozen=True, slots=True)
class Schedule:
    """Tile sizes and loop structure.

    block_q, block_kv: rows of a tile. backward_q, backward_kv: the same for dK/dV (and the one-kernel backward).
    few_row_kernels: heads of few query rows get forward kernels of their own, with keys in lanes.
    folded: normalisers in powers of two, the scale of the scores folded in; for elements of 16 bits and scales > 0.
    short_tiles: forward kernels for heads of few query rows have tiles of 16, 32 or 64 rows.
    shared_queries: instances of a one-kernel backward pass own queries, not keys, where both can be (lower/shares.py).
    sections: where the mask gives tiles different work, heavy tiles of many heads are handed out before light ones.
    descriptors: tiles that loops read are loaded through tensor descriptors, where a target has what runs them.
    split_tasks: the forward pass splits the keys of few query tiles into up to this many tasks; 0: never.
    num_warps, num_stages: GPU launch options of forward and dQ; backward_* those of dK/dV.
    lanes: what lies across a CPU's vectors in the forward kernel; backward_lanes: in the one-kernel backward pass.
    d_query: tiles and launch options of dQ; None: those of the forward pass. delta_rows: query rows of a program of the
    kernel of row sums; 0: block_q.
    """

    block_q: int
    block_kv: int
    backward_q: int
    backward_kv: int
    edges: Edges
    gradients: Gradients
    num_warps: int = 4
    num_stages: int = 2
    backward_warps: int = 8
    backward_stages: int = 2
    lanes: Lanes = Lanes.QUERIES
    backward_lanes: Lanes = Lanes.QUERIES
    few_row_kernels: bool = False
    split_tasks: int = 0
    folded: bool = False
    descriptors: bool = False
    sections: bool = False
    d_query: Launch | None = None
    delta_rows: int = 0
    short_tiles: bool = False
    shared_queries: bool = False

    @property
    def forward_launch(self) -> Launch:
        return Launch(self.block_q, self.block_kv, self.num_warps, self.num_stages)

    @property
    def d_query_launch(self) -> Launch:
        return self.d_query or self.forward_launch

    @property
    def d_key_value_launch(self) -> Launch:
        return Launch(self.backward_q, self.backward_kv, self.backward_warps, self.backward_stages)

    def launch(self, kernel: str) -> Launch:
        """Of the kernel of that name."""
        if kernel in ("dq", "adjoints"):
            return self.d_query_launch
        if kernel == "delta" and self.delta_rows:
            return Launch(self.delta_rows, self.block_kv)
        return self.forward_launch if kernel in FORWARD_KERNELS else self.d_key_value_launch

    def __str__(self) -> str:
        kernels = "one kernel" if self.gradients is Gradients.ONE_KERNEL else "two kernels (dQ; dK and dV)"
        edges = "loops of their own" if self.edges is Edges.SPLIT else "a branch in the loop"
        if self.d_query is not None:
            kernels = f"dK and dV, {self.d_query.q} x {self.d_query.kv} in dQ"
        return (
            f"forward {self.block_q} x {self.block_kv} (queries x keys), "
            f"backward {self.backward_q} x {self.backward_kv} in {kernels}, masked tiles in {edges}"
        )


FORWARD_KERNELS = ("forward", "decode", "merge", "delta")
# What may differ between schedules of one program and backend: tiles and launch options, by direction.
FORWARD_FIELDS = ("block_q", "block_kv", "num_warps", "num_stages")
BACKWARD_FIELDS = ("backward_q", "backward_kv", "backward_warps", "backward_stages", "d_query")


def cpu_schedule(lanes: int, *, masked: bool = True) -> Schedule:
    """One query row per lane; kv tiles of 64 rows follow a mask closely, without one 128 rows are 1 to 4 % faster.

    The backward pass owns keys: a key per lane lets it read every q tile in place. With narrow vectors it would go over
    the queries too often.
    """
    backward_kv, backward_lanes = (lanes, Lanes.KEYS) if lanes >= WIDE else (64, Lanes.QUERIES)
    one = Gradients.ONE_KERNEL
    return Schedule(
        lanes,
        64 if masked else 128,
        lanes,
        backward_kv,
        Edges.SPLIT,
        one,
        backward_lanes=backward_lanes,
        few_row_kernels=True,
        split_tasks=64,
    )


WIDE = 32
FEW_ROWS = (1, 2, 4, 8, 16)
MOST_FEW_ROWS = FEW_ROWS[-1]  # beyond, a query row per lane is faster (measured: between 16 and 32)


@lru_cache(maxsize=256)
def few_rows_schedule(rows: int, lanes: int = 32, kv_block: int = 0) -> Schedule:
    """A forward pass in tiles of FEW_ROWS query rows, keys in lanes; the backward pass of `cpu_schedule(lanes)`.

    kv_block: the size of listed kv blocks; 0: there are no lists.
    """
    assert rows in FEW_ROWS, rows
    return replace(
        cpu_schedule(lanes), block_q=rows, block_kv=tile_within(kv_block, 128), lanes=Lanes.FEW_ROWS
    )


def tile_of_few_rows(schedule: Schedule, rows: int) -> int:
    """The rows of a tile of `few_rows_schedule` where that suits heads of this many query rows, else 0."""
    if not schedule.few_row_kernels or not 0 < rows <= MOST_FEW_ROWS:
        return 0
    return next(n for n in FEW_ROWS if rows <= n)


SMALLEST_BLOCK = 16  # listed blocks are multiples of this many positions
SMALLEST_ROWS = 8  # of a block of queries that a call gives, on a CPU


def tile_within(block: int, most: int) -> int:
    """The largest tile of `most`, most / 2, ... rows that a listed block is a multiple of; any where it is 0.

    >>> [tile_within(block, 64) for block in (128, 64, 96, 48, 0)]
    [64, 64, 32, 16, 64]
    """
    while block % most:
        most //= 2
    return most


def within_blocks(schedule: Schedule, listed: ListedBlocks | None) -> Schedule:
    """The schedule in tiles that listed blocks can be cut into."""
    if listed is None:
        return schedule
    d_query = schedule.d_query
    if d_query is not None:
        q, kv = tile_within(listed.q, d_query.q), tile_within(listed.kv, d_query.kv)
        d_query = replace(d_query, q=q, kv=kv)
    tiles = replace(
        schedule,
        d_query=d_query,
        block_q=tile_within(listed.q, schedule.block_q),
        block_kv=tile_within(listed.kv, schedule.block_kv),
        backward_q=tile_within(listed.q, schedule.backward_q),
        backward_kv=tile_within(listed.kv, schedule.backward_kv),
    )
    if 0 < listed.q < SMALLEST_BLOCK:  # one token's rows: too few for lanes
        kv = tile_within(listed.kv, 128)
        return replace(
            tiles, block_kv=kv, lanes=Lanes.FEW_ROWS, delta_rows=schedule.delta_rows or schedule.block_q
        )
    # Whichever axis keeps more lanes; keys where both do, for they leave the queries in place.
    if schedule.backward_lanes is Lanes.KEYS and tiles.backward_q > tiles.backward_kv:
        return replace(tiles, backward_lanes=Lanes.QUERIES, backward_kv=tile_within(listed.kv, 64))
    return tiles


def torch_schedule() -> Schedule:
    """Large tiles, so that the cost of a torch call disappears (128 x 256 measured best of four sizes)."""
    return Schedule(128, 256, 128, 256, Edges.SPLIT, Gradients.ONE_KERNEL)


def short_query_schedule(schedule: Schedule, rows: int) -> Schedule:
    """A GPU's forward pass for heads of few query rows: the smallest tile that holds them, of 16, 32 or 64 rows.

    Half the warps and tiles of 64 or more keys: such calls wait for keys and values, not for products.
    """
    tile = next((n for n in _SHORT_TILES if rows <= n < schedule.block_q), None)
    return (
        schedule if tile is None or not schedule.short_tiles else replace(schedule, block_q=tile, num_warps=4)
    )


_SHORT_TILES = (16, 32, 64)
MULTIPROCESSORS = 128  # program instances that a large GPU runs at once, roughly
TENSOR_MEMORY = ("sm_90", "sm_100")  # targets that load tiles through tensor descriptors

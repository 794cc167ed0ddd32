"""How much a direction computes and moves: what its products cost after the mask plan's skipping, and its tensors.

Counted in whole tiles, as they are visited. Where a bound of the plan depends on a tensor's values, or blocks are
listed by the call, every tile counts and `exact` is False.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from attn_engine.codegen.schedule import Gradients, Schedule
from attn_engine.ir.evaluate import evaluate
from attn_engine.ir.expr import Expr
from attn_engine.ir.ops import Number, Storage
from attn_engine.ir.passes.mask_range import plan_mask
from attn_engine.ir.passes.mask_tiles import classify_tiles
from attn_engine.ir.program import Attention

_BYTES = {Storage.FLOAT64: 8, Storage.FLOAT32: 4, Storage.FLOAT16: 2, Storage.BFLOAT16: 2}
MOST_TILES = 65536  # of one axis that are looked at one by one


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of one call."""

    batches: int
    heads: int
    kv_heads: int
    q_len: int
    kv_len: int

    def __str__(self) -> str:
        heads = (
            f"{self.heads} heads" if self.heads == self.kv_heads else f"{self.heads}:{self.kv_heads} heads"
        )
        batches = "1 batch" if self.batches == 1 else f"{self.batches} batches"
        lengths = f"{self.q_len} queries and keys"
        if self.q_len != self.kv_len:
            lengths = f"{self.q_len} queries, {self.kv_len} keys"
        return f"{batches}, {heads}, {lengths}"


@dataclass(frozen=True, slots=True)
class Work:
    """flops: of the products, on visited tiles. visited: their share of all pairs. read, written: bytes of the tensors,
    each once; captured tensors are not counted. exact: False where every tile counts because nothing more is known."""

    flops: float
    visited: float
    read: int
    written: int
    exact: bool

    @property
    def intensity(self) -> float:
        """FLOP per byte that has to move."""
        return self.flops / max(1, self.read + self.written)


def forward_work(program: Attention, schedule: Schedule, sizes: Sizes, numbers: Mapping[str, Number]) -> Work:
    """Scores in every pass, the output in the last."""
    tiles = (schedule.block_q, schedule.block_kv)
    visited, exact = visited_share(program, "kv", tiles, sizes, numbers)
    scores = (1 + len(program.rule.earlier)) * program.dim_qk
    flops = 2.0 * visited * _pairs(sizes) * (scores + program.dim_v)
    q, k, v, o, rows = tensor_bytes(program, sizes)
    return Work(flops, visited, q + k + v, o + rows, exact)


def backward_work(
    program: Attention, schedule: Schedule, sizes: Sizes, numbers: Mapping[str, Number]
) -> Work:
    """Five products a pair in one kernel; with dQ by itself seven, for scores and dP are made twice."""
    shared = program.dim_qk + program.dim_v
    own = {"kv": program.dim_qk, "q": program.dim_qk + program.dim_v}
    backward_tiles = (schedule.backward_q, schedule.backward_kv)
    visited, exact = visited_share(program, "q", backward_tiles, sizes, numbers)
    flops = visited * (shared + own["q"])
    if schedule.gradients is Gradients.ONE_KERNEL:
        flops += visited * own["kv"]
    else:
        launch = schedule.d_query_launch
        of_query, exact_too = visited_share(program, "kv", (launch.q, launch.kv), sizes, numbers)
        flops += of_query * (shared + own["kv"])
        exact = exact and exact_too
    flops += len(program.rule.adjoints) * visited * shared
    q, k, v, o, rows = tensor_bytes(program, sizes)
    return Work(2.0 * _pairs(sizes) * flops, visited, q + k + v + 2 * o + rows, q + k + v, exact)


def _pairs(s: Sizes) -> float:
    return float(s.batches * s.heads * s.q_len * s.kv_len)


def tensor_bytes(program: Attention, s: Sizes) -> tuple[int, int, int, int, int]:
    """Of q, k, v, o and the saved row values."""
    width = _BYTES[program.element]
    queries, keys = s.batches * s.heads * s.q_len, s.batches * s.kv_heads * s.kv_len
    rows = queries * max(4, width if program.element is Storage.FLOAT64 else 4) * len(program.rule.saved)
    return (
        queries * program.dim_qk * width,
        keys * program.dim_qk * width,
        keys * program.dim_v * width,
        queries * program.dim_v * width,
        rows,
    )


def visited_share(
    program: Attention, loop: str, tiles: tuple[int, int], sizes: Sizes, numbers: Mapping[str, Number]
) -> tuple[float, bool]:
    """The share of all pairs in the tiles that the loop over `loop` visits, and whether that is all that is known.

    tiles: rows of a tile of queries and of keys.
    """
    mask = program.mask.result if program.mask else None
    lengths = {"q": sizes.q_len, "kv": sizes.kv_len}
    own, (n_own, n) = ("q", tiles) if loop == "kv" else ("kv", tiles[::-1])
    exact = program.listed is None and classify_tiles(mask, loop) is None
    plan = plan_mask(mask, loop)
    count = -(-lengths[own] // n_own)
    if program.listed is not None or not plan.bounded or not 0 < count <= MOST_TILES or not lengths[loop]:
        return 1.0, exact
    known = {"q_len": sizes.q_len, "kv_len": sizes.kv_len, "heads": sizes.heads, "kv_heads": sizes.kv_heads}
    visited = 0
    try:
        for start in range(0, lengths[own], n_own):
            last = min(start + n_own, lengths[own]) - 1
            at = {**numbers, **known, f"{own}_start": start, f"{own}_last": last}
            lo = max(_bound(plan.hull.lo, at, 0) // n * n, 0)
            hi = -(-min(_bound(plan.hull.hi, at, lengths[loop]), lengths[loop]) // n) * n
            visited += max(0, min(hi, lengths[loop]) - lo) * (last + 1 - start)
    except (KeyError, TypeError):
        return 1.0, False
    return visited / (lengths["q"] * lengths["kv"]), exact


def _bound(e: Expr | None, at: Mapping[str, Number], unbounded: int) -> int:
    return unbounded if e is None else int(evaluate(e, at))

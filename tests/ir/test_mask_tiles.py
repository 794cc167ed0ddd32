"""Classes of tiles are sound for any mask: no visible pair is dropped, no tile seen in part is called whole."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from attn_engine.ir.evaluate import evaluate
from attn_engine.ir.expr import Const, Expr, Load, Var, call, substitute, variables, where
from attn_engine.ir.ops import DType, Number, Op
from attn_engine.ir.passes.mask_range import Interval, plan_mask
from attn_engine.ir.passes.mask_tiles import TileClass, classify_tiles
from attn_engine.ir.program import BATCH, KV_IDX, Q_IDX

LENGTH = 24  # positions that have an element in every captured tensor


@dataclass(frozen=True)
class Data:
    """Captured tensors: sorted and unsorted ids, flags, floats with a NaN, a number per batch."""

    documents: tuple[int, ...]
    ids: tuple[int, ...]
    flags: tuple[bool, ...]
    floats: tuple[float, ...]

    def load(self, tensor: str, indices: tuple[int, ...]) -> Number:
        if tensor == "grid":  # of blocks, as large as the flags allow
            row, column = (min(max(i, 0), 4) for i in indices)
            return self.flags[(5 * row + column) % len(self.flags)]
        values: tuple[Number, ...] = {"lengths": (7,), **vars(self)}[tensor]
        return values[min(max(indices[-1], 0), len(values) - 1)]


def listed(elements: st.SearchStrategy[Number]) -> st.SearchStrategy[tuple[Number, ...]]:
    return st.lists(elements, min_size=LENGTH, max_size=LENGTH).map(tuple)


data = st.builds(
    Data,
    listed(st.integers(0, 4)).map(lambda x: tuple(sorted(x))),
    listed(st.integers(-6, 6)),
    listed(st.booleans()),
    listed(st.sampled_from([-1.5, 0.0, 0.5, math.inf, -math.inf, math.nan])),
)

positions = st.sampled_from([Q_IDX, KV_IDX])
divisors = st.sampled_from([-3, 1, 2, 5, 8])
loaded = st.builds(
    lambda tensor, index: Load(tensor, DType.INT, (index,)), st.sampled_from(["documents", "ids"]), positions
)
floats = st.builds(lambda index: Load("floats", DType.FLOAT, (index,)), positions)
scalars = st.sampled_from([Const(0), Const(3), Const(-2), BATCH, Load("lengths", DType.INT, (BATCH,))])
ints = st.recursive(
    positions | loaded | scalars,
    lambda inner: st.one_of(
        st.builds(call, st.sampled_from([Op.ADD, Op.SUB, Op.MUL, Op.MAX, Op.MIN]), inner, inner),
        st.builds(call, st.sampled_from([Op.FLOORDIV, Op.MOD]), inner, divisors),
        st.builds(call, st.sampled_from([Op.NEG, Op.ABS]), inner),
        st.builds(lambda c, a, b: where(call(Op.LT, c, 2), a, b), inner, inner, inner),
        st.builds(lambda a: Load("ids", DType.INT, (a,)), inner),
    ),
    max_leaves=5,
)
blocks = st.builds(lambda i, n: i // n, ints, st.sampled_from([1, 4, 16, 24]))
comparisons = st.sampled_from([Op.LE, Op.LT, Op.EQ, Op.NE])
masks = st.recursive(
    st.one_of(
        st.builds(call, comparisons, ints, ints),
        st.builds(call, comparisons, ints, ints),
        st.builds(call, comparisons, floats, floats),
        st.builds(call, comparisons, floats, st.just(Const(0.5))),
        st.builds(call, comparisons, floats, positions),
        st.builds(lambda index: Load("flags", DType.BOOL, (index,)), positions),
        st.builds(lambda q, kv: Load("grid", DType.BOOL, (q, kv)), blocks, blocks),
        st.just(KV_IDX <= Q_IDX),
    ),
    lambda inner: st.one_of(
        st.builds(lambda a, b: a & b, inner, inner),
        st.builds(lambda a, b: a | b, inner, inner),
        st.builds(lambda a: ~a, inner),
        st.builds(lambda a, b: a.equals(b), inner, inner),
        st.builds(where, inner, inner, inner),
    ),
    max_leaves=5,
)


@dataclass(frozen=True)
class Tiles:
    """A tile of queries and one of keys."""

    q: range
    kv: range

    def environment(self) -> dict[str, Number]:
        ends = {f"{a}_start": r.start for a, r in (("q", self.q), ("kv", self.kv))}
        ends |= {f"{a}_last": r.stop - 1 for a, r in (("q", self.q), ("kv", self.kv))}
        return {**ends, "batch": 0, "q_len": LENGTH, "kv_len": LENGTH}


def held(found: TileClass, tiles: Tiles, captured: Data) -> tuple[bool, bool]:
    """The two conditions, with every reduction computed from its definition."""
    known: dict[Expr, Number] = {BATCH: 0}
    extremes: dict[Expr, Expr] = {}
    for node in found.reductions:
        extremes[node] = extreme = Var(f"extreme_{len(extremes)}", node.dtype)
        index, over = (Q_IDX, tiles.q) if node.axis == "q" else (KV_IDX, tiles.kv)
        values = [evaluate(node.x, {index: i, BATCH: 0}, captured.load) for i in over]
        spoiled = any(v != v for v in values)
        known[extreme] = math.nan if spoiled else (min if node.kind == "min" else max)(values)
    known |= {Var(name, DType.INT): value for name, value in tiles.environment().items()}
    conditions = (substitute(e, extremes) for e in (found.may_hold, found.must_hold))
    may, must = (bool(evaluate(e, known, captured.load)) for e in conditions)
    return may, must


@settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(masks, data, st.sampled_from(["kv", "q"]), *[st.integers(0, 16)] * 2, *[st.integers(1, 8)] * 2)
def test_classes_are_sound(
    mask: Expr, captured: Data, loop: str, q: int, kv: int, block_q: int, block_kv: int
) -> None:
    found = classify_tiles(mask, loop)
    if found is None:
        return
    tiles = Tiles(range(q, q + block_q), range(kv, kv + block_kv))
    may, must = held(found, tiles, captured)
    hull = plan_mask(mask, loop).hull
    for i in tiles.q:
        for j in tiles.kv:
            visible = evaluate(mask, {Q_IDX: i, KV_IDX: j, BATCH: 0}, captured.load)
            if visible:
                assert may, "a visible pair is dropped"
                assert inside(hull, i if loop == "q" else j, tiles, captured)
            elif must and may:
                assert not inside(hull, i if loop == "q" else j, tiles, captured), "called whole"


def inside(hull: Interval, position: int, tiles: Tiles, captured: Data) -> bool:
    lo = -math.inf if hull.lo is None else evaluate(hull.lo, tiles.environment(), captured.load)
    hi = math.inf if hull.hi is None else evaluate(hull.hi, tiles.environment(), captured.load)
    return lo <= position < hi


DOCUMENT_Q, DOCUMENT_KV = (Load("documents", DType.INT, (i,)) for i in (Q_IDX, KV_IDX))
GRID = Load("grid", DType.BOOL, (Q_IDX // 16, KV_IDX // 16))
FLOAT_Q, FLOAT_KV = (Load("floats", DType.FLOAT, (i,)) for i in (Q_IDX, KV_IDX))
FLAG_Q, FLAG_KV = (Load("flags", DType.BOOL, (i,)) for i in (Q_IDX, KV_IDX))
SAMPLE = Data(
    tuple(i // 8 for i in range(LENGTH)),
    tuple(range(LENGTH)),
    tuple(i < 8 for i in range(LENGTH)),
    (math.nan, *(float(i) for i in range(1, LENGTH))),
)
FIRST, SECOND, ACROSS = range(0, 8), range(8, 16), range(4, 12)


@pytest.mark.parametrize(
    ("mask", "q", "kv", "expected"),
    [
        (DOCUMENT_Q.equals(DOCUMENT_KV), FIRST, FIRST, (True, True)),
        (DOCUMENT_Q.equals(DOCUMENT_KV), FIRST, SECOND, (False, False)),
        (DOCUMENT_Q.equals(DOCUMENT_KV), FIRST, ACROSS, (True, False)),
        (~DOCUMENT_Q.equals(DOCUMENT_KV), FIRST, SECOND, (True, True)),
        (DOCUMENT_Q.equals(DOCUMENT_KV) & (KV_IDX <= Q_IDX), FIRST, FIRST, (True, False)),
        (DOCUMENT_Q.equals(DOCUMENT_KV) & (KV_IDX <= Q_IDX), range(6, 8), range(0, 6), (True, True)),
        ((Q_IDX // 8 % 3).equals(KV_IDX // 8 % 3), FIRST, FIRST, (True, True)),
        ((Q_IDX // 8 % 3).equals(KV_IDX // 8 % 3), FIRST, SECOND, (False, False)),
        ((Q_IDX % 8 < 4) | (KV_IDX % 8 < 4), range(0, 4), range(4, 8), (True, True)),
        ((Q_IDX % 8 < 4) & (KV_IDX % 8 < 4), range(0, 4), range(4, 8), (False, False)),
        (FLAG_Q & FLAG_KV, FIRST, SECOND, (False, False)),
        (FLAG_Q.equals(FLAG_KV), FIRST, FIRST, (True, True)),
        (FLAG_Q.equals(FLAG_KV), FIRST, SECOND, (False, False)),
        (Q_IDX - KV_IDX < Load("ids", DType.INT, (KV_IDX,)), range(0, 2), range(4, 8), (True, True)),
        (FLOAT_KV <= FLOAT_Q, SECOND, range(1, 8), (True, True)),
        (FLOAT_KV <= FLOAT_Q, SECOND, range(16, 24), (False, False)),
        (FLOAT_KV <= FLOAT_Q, SECOND, FIRST, (True, False)),  # a NaN among the keys
        (~(FLOAT_Q <= FLOAT_KV), FIRST, SECOND, (True, False)),
        (GRID, range(16, 24), range(0, 8), (True, True)),
        (~GRID, range(16, 24), range(0, 8), (False, False)),
        (GRID, range(12, 20), range(0, 8), (True, False)),  # across two blocks
    ],
)
def test_what_a_class_says(mask: Expr, q: range, kv: range, expected: tuple[bool, bool]) -> None:
    found = classify_tiles(mask, "kv")
    assert found is not None
    assert held(found, Tiles(q, kv), SAMPLE) == expected


@pytest.mark.parametrize(
    "mask",
    [
        None,
        KV_IDX <= Q_IDX,
        (KV_IDX <= Q_IDX) & (Q_IDX - KV_IDX < 512),
        Load("pairs", DType.BOOL, (Q_IDX, KV_IDX)),
        Load("pairs", DType.BOOL, (Q_IDX, KV_IDX)) & (KV_IDX <= Q_IDX),
        Load("pairs", DType.BOOL, (Q_IDX, KV_IDX)) | (KV_IDX <= Q_IDX),
        FLOAT_Q * 2.0 <= FLOAT_KV,  # float arithmetic rounds
    ],
)
@pytest.mark.parametrize("loop", ["q", "kv"])
def test_nothing_is_asked_where_nothing_is_gained(mask: Expr | None, loop: str) -> None:
    assert classify_tiles(mask, loop) is None


def test_the_loops_bounds_are_not_asked_again() -> None:
    found = classify_tiles((KV_IDX <= Q_IDX) & DOCUMENT_Q.equals(DOCUMENT_KV), "kv")
    assert found is not None and found.tensors == ("documents",)
    assert not any(v.name.endswith(("_start", "_last")) for v in variables(found.may_hold))


def test_arithmetic_that_could_overflow_where_the_mask_does_not_is_unknown() -> None:
    """min over q of `a - b` is no element of the tile: adding to it may leave 32 bits though no pair does."""
    a, b = (Load(n, DType.INT, (KV_IDX,)) for n in ("ids", "documents"))
    spread = Load("ids", DType.INT, (Q_IDX,)) - a
    assert classify_tiles(call(Op.LT, spread + b, 3), "kv") is None


def test_reductions_span_one_tile() -> None:
    found = classify_tiles(DOCUMENT_Q.equals(DOCUMENT_KV), "q")
    assert found is not None and len(found.reductions) == 4
    assert all(not r.axes for r in found.reductions)

"""What explain() counts: visited pairs, FLOPs, bytes, bounds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from attn_engine import AttentionEngine, meta_tensor
from attn_engine.codegen.schedule import Edges, Gradients, Schedule, cpu_schedule
from attn_engine.codegen.work import Sizes, backward_work, forward_work, visited_share
from attn_engine.explain_work import ASSUMED, sizes_of_call
from attn_engine.library import causal, prefix, sliding_window

SIZES, SQUARE = Sizes(2, 8, 2, 300, 200), Sizes(2, 8, 2, 300, 300)
FEW = Schedule(64, 32, 16, 64, Edges.BRANCH, Gradients.TWO_KERNELS)


def engine(mask: Callable[..., Any] | None = None, backend: str = "triton", **sizes: Any) -> AttentionEngine:
    b, h, s = (sizes.get(name) for name in ("batch", "heads", "length"))
    metas = [meta_tensor(b, h, s, d, dtype=torch.bfloat16) for d in (64, 64, 32)]
    return AttentionEngine(metas, mask_mod=mask, backend=backend)


def counted(mask: Callable[..., Any], tiles: tuple[int, int]) -> float:
    """The share of pairs in tiles between the first and the last visible one of each row of tiles."""
    q, kv = torch.arange(SQUARE.q_len)[:, None], torch.arange(SQUARE.kv_len)[None, :]
    seen = torch.as_tensor(mask(0, 0, q, kv)).expand(SQUARE.q_len, SQUARE.kv_len)
    total = 0
    for start in range(0, SQUARE.q_len, tiles[0]):
        rows = seen[start : start + tiles[0]].any(0).nonzero().flatten()
        if len(rows):
            lo = int(rows[0]) // tiles[1] * tiles[1]
            hi = min(-(-(int(rows[-1]) + 1) // tiles[1]) * tiles[1], SQUARE.kv_len)
            total += (hi - lo) * min(tiles[0], SQUARE.q_len - start)
    return total / (SQUARE.q_len * SQUARE.kv_len)


@pytest.mark.parametrize(
    "mask", [causal(), sliding_window(40), prefix(70)], ids=["causal", "window", "prefix"]
)
def test_visited_pairs_are_those_of_the_tiles_in_sight(mask: Callable[..., Any]) -> None:
    program = engine(mask).program
    for tiles in ((64, 32), (16, 128)):
        found, exact = visited_share(program, "kv", tiles, SQUARE, {"window": 40, "length": 70})
        assert exact
        assert found == pytest.approx(counted(mask, tiles))


def test_the_other_loop_visits_the_same_pairs_in_tiles_of_one() -> None:
    program = engine(causal()).program
    by_q, _ = visited_share(program, "kv", (1, 1), SQUARE, {})
    by_kv, _ = visited_share(program, "q", (1, 1), SQUARE, {})
    assert by_q == pytest.approx(by_kv)
    assert by_q == pytest.approx(counted(causal(), (1, 1)))


def test_flops_and_bytes_without_a_mask() -> None:
    program, pairs = engine().program, 2 * 8 * 300 * 200
    forward = forward_work(program, FEW, SIZES, {})
    assert forward.flops == 2 * pairs * (64 + 32)
    assert (forward.visited, forward.exact) == (1.0, True)
    q, k, v, o = 2 * 8 * 300 * 64 * 2, 2 * 2 * 200 * 64 * 2, 2 * 2 * 200 * 32 * 2, 2 * 8 * 300 * 32 * 2
    rows = 4 * 2 * 8 * 300 * len(program.rule.saved)
    assert (forward.read, forward.written) == (q + k + v, o + rows)
    two = backward_work(program, FEW, SIZES, {})
    assert two.flops == 2 * pairs * (3 * 64 + 2 * 32 + 64 + 32)  # scores and dP twice
    one = backward_work(program, cpu_schedule(32), SIZES, {})
    assert one.flops == 2 * pairs * (3 * 64 + 2 * 32)
    assert (one.read, one.written) == (q + k + v + 2 * o + rows, q + k + v)


def test_what_depends_on_data_is_an_upper_bound() -> None:
    ids = torch.arange(512) // 100
    built = engine(lambda b, h, q, kv: ids[q] == ids[kv], backend="cpu")
    text = built.explain(q_len=512, kv_len=512).sections["Work"]
    assert "at most" in text and "all pairs" in text
    unknown_number = visited_share(engine(sliding_window(40)).program, "kv", (64, 64), SIZES, {})
    assert unknown_number == (1.0, False)
    known = engine(sliding_window(40)).explain(q_len=4096).sections["Work"]
    assert "at most" not in known and "% of pairs" in known


def test_sizes_are_given_fixed_or_assumed() -> None:
    free = ((None, None, None),) * 3
    assert sizes_of_call(free, {})[0] == ASSUMED
    some, assumed = sizes_of_call(((2, 8, None), (2, 4, 100), (2, 4, 100)), {})
    assert some == Sizes(2, 8, 4, 100, 100)
    assert assumed == ()
    sizes, assumed = sizes_of_call(free, {"heads": 64, "kv_heads": 8, "q_len": 1})
    assert sizes == Sizes(1, 64, 8, 1, 1)
    assert assumed == ("batches",)


def test_sections_read_well() -> None:
    text = engine(causal(), length=8192, heads=16).explain(batches=2, target="sm_90")
    assert list(text.sections)[-5:] == ["Tiles", "Occupancy", "Work", "Bound", "Backend"]
    assert text.sections["Work"].startswith("for 2 batches, 16 heads, 8192 queries and keys\nforward: 2")
    assert "% of pairs in visited tiles" in text.sections["Work"]
    assert "H200: forward " in text.sections["Bound"] and "by products" in text.sections["Bound"]
    assert "not a measurement" in text.sections["Bound"]
    assert text.sections["Occupancy"].startswith("predicted for sm_90\nforward in ")
    decoding = engine(length=4096).explain(q_len=1, target="gfx942").sections
    assert "MI300X: forward " in decoding["Bound"] and "by memory" in decoding["Bound"]
    on_cpu = engine(causal(), "cpu").explain().sections
    assert "Work" in on_cpu and "Bound" not in on_cpu and "Occupancy" not in on_cpu

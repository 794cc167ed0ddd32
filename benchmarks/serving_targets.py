"""What serving on the CPU is to reach, and what it does: every row in one run of less than three minutes.

    python -m benchmarks.serving_targets [--rounds 5] [--only 'paged|mods']

One thread, processor time, contenders in turns; printed is the median of the rounds' ratios.
paged: time over that of the same keys in rows. mods: time over plain softmax. indexer: share of the rate of the
multiply-add loop of benchmarks/peak.py. dsa: times as fast as the dense step (benchmarks/dsa.py), with the indexer.
float8: time of a cache in e4m3 over that in bfloat16. call: microseconds of Python for 64 keys, where nothing is new.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product

import torch

from attn_engine import AttentionEngine, meta_tensor
from attn_engine.library import lightning_indexer, to_fp8
from benchmarks import dsa, serving
from benchmarks.measure import Contender
from benchmarks.peak import peak

TOKENS = 65536


@dataclass(frozen=True, slots=True)
class Row:
    """A ratio to be reached: of the last contender's time to the first one's, or the other way round."""

    name: str
    target: float
    contenders: Callable[[], dict[str, Contender]]
    faster: bool = False  # the first one's time over the last one's, which is to be at least the target
    calls: int = 3  # of a contender, one after the other

    def reached(self, rounds: int) -> float:
        first, *_, last = self.contenders().values()
        ratios: list[float] = []
        for contender in (first, last):
            for _ in range(3):  # made, planned, warm
                contender.run()
        for _ in range(rounds):
            a, b = (self._seconds(x) for x in (first, last))
            ratios.append(a / b * last.weight if self.faster else b / a)
        return statistics.median(ratios)

    def _seconds(self, contender: Contender) -> float:
        start = time.process_time()
        for _ in range(self.calls):
            contender.run()
        return time.process_time() - start


def rows() -> Iterator[Row]:
    for page, dtype, (heads, kv_heads) in product(serving.PAGES, serving.DTYPES, serving.HEADS):
        case = serving.Case("paged", str(page), dtype, heads, kv_heads, serving.KEYS)
        yield Row(str(case), 1.10, lambda case=case: serving.paged(case))
    for name, dtype in product(serving.mods(1), serving.DTYPES):
        case = serving.Case("mods", name, dtype, *serving.HEADS[-1], serving.KEYS)
        yield Row(str(case), 1.15, lambda case=case: serving.with_mod(case))
    for dtype in serving.DTYPES:
        yield Row(f"indexer {dtype} keys={TOKENS}", 0.60, lambda dtype=dtype: indexer(dtype), True, 1)
    yield Row(f"dsa float32 H=128 keys={TOKENS} k={dsa.CHOSEN}", 6.0, sparse_step, True, 1)
    yield Row(f"float8 over bfloat16 H=8/8 keys={serving.KEYS}", 1.0, float8)


def indexer(dtype: str) -> dict[str, Contender]:
    """The loop at its peak, and choosing among all keys; its weight makes the ratio of times one of rates."""
    kind, heads, dim = getattr(torch, dtype), dsa.INDEX_HEADS, dsa.INDEX_DIM
    q, k = torch.randn(1, 1, heads, dim).to(kind), torch.randn(1, TOKENS, 1, dim).to(kind)
    weights, loop = torch.randn(1, 1, heads), peak(dtype)
    assert loop is not None, "a C++ compiler"
    operations = 2.0 * heads * TOKENS * dim
    return {
        "peak": Contender(lambda: loop.run(1)),
        "ours": Contender(
            lambda: lightning_indexer(q, k, weights, sparse_count=dsa.CHOSEN),
            weight=operations / loop.operations(1),
        ),
    }


def sparse_step() -> dict[str, Contender]:
    named = dsa.calls(TOKENS, torch.float32)
    return {name: Contender(named[name]) for name in ("all tokens", "indexer and chosen tokens")}


def float8() -> dict[str, Contender]:
    case = serving.Case("float8", "e4m3", "bfloat16", 8, 8, serving.KEYS)
    q, k, v = serving.rows(case)
    engine = AttentionEngine([meta_tensor(None, None, None, serving.DIM, dtype=case.kind)] * 3, backend="cpu")
    (_, k8, k_scale), (_, v8, v_scale) = (to_fp8(x.float()) for x in (k, v))
    return {
        "bfloat16": Contender(lambda: engine(q, k, v)),
        "e4m3": Contender(lambda: engine(q, k8, v8, k_scale=k_scale, v_scale=v_scale)),
    }


def seconds_of_a_call() -> dict[str, float]:
    """Microseconds of calls so small that Python is all there is to them."""
    case = serving.Case("call", "16", "float32", 8, 8, 64)
    q, k, v = serving.rows(case)
    engine = AttentionEngine([meta_tensor(None, None, None, serving.DIM, dtype=case.kind)] * 3, backend="cpu")
    found = {"call, rows": Contender(lambda: engine(q, k, v))}
    found |= {f"call, {name} of sequences": x for name, x in serving.paged(case).items()}
    times: dict[str, float] = {}
    for name, x in found.items():
        for _ in range(20):
            x.run()
        start = time.process_time()
        for _ in range(200):
            x.run()
        times[name] = (time.process_time() - start) / 200 * 1e6
    return times


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="rows whose name matches")
    given = parser.parse_args()
    torch.set_num_threads(1)
    missed = 0
    with torch.no_grad():
        for row in (x for x in rows() if re.search(given.only, x.name)):
            reached = row.reached(given.rounds)
            good = reached >= row.target if row.faster else reached <= row.target
            missed += not good
            sign = ">=" if row.faster else "<="
            print(
                f"{row.name:<56} {sign} {row.target:.2f}  {reached:.2f}{'' if good else '  missed'}",
                flush=True,
            )
        for name, x in seconds_of_a_call().items():
            if re.search(given.only, name):
                print(f"{name:<56} <= 100   {x:.0f} us{'' if x <= 100 else '  missed'}", flush=True)
    print(f"{missed} missed")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Packed sequences on the CPU: equal ones against a dense batch, skewed ones against what their pairs cost.

    python -m benchmarks.packed [--threads N] [--length 1024] [--repeats 9]

Each ratio is of medians of interleaved runs in one process: of equal lengths near 1, of skewed ones near the share of
visible pairs that they have. One thread is measured in processor time, which a busy machine disturbs less.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from attn_engine import AttentionEngine, meta_tensor
from attn_engine.library import causal

HEADS, KV_HEADS, DIM = 8, 4, 64


def lengths_of(kind: str, total: int) -> list[int]:
    """Lengths that add up to `total`."""
    if kind == "equal":
        return [total // 4] * 4
    if kind == "one long, many short":
        return [total // 2, *[total // 64] * 32]
    halves = [total >> (i + 1) for i in range(6)]
    return [*halves, total - sum(halves)]


def pairs(lengths: list[int]) -> int:
    """Visible pairs of a causal mask."""
    return sum(n * (n + 1) // 2 for n in lengths)


def interleaved(calls: list[Callable[[], object]], repeats: int, clock: Callable[[], float]) -> list[float]:
    """The median seconds of each."""
    for call in calls:
        call()
    found: list[list[float]] = [[] for _ in calls]
    for _ in range(repeats):
        for call, times in zip(calls, found, strict=True):
            start = clock()
            call()
            times.append(clock() - start)
    return [statistics.median(times) for times in found]


def forward_of(engine: AttentionEngine, inputs: list[Tensor], **given: Any) -> Callable[[], object]:
    q, k, v = inputs

    def run() -> object:
        with torch.no_grad():
            return engine(q, k, v, **given)

    return run


def backward_of(engine: AttentionEngine, inputs: list[Tensor], **given: Any) -> Callable[[], object]:
    leaves = [x.clone().requires_grad_() for x in inputs]
    q, k, v = leaves
    o: Tensor = engine(q, k, v, **given)
    weights = torch.randn_like(o)
    return lambda: torch.autograd.grad(o, leaves, weights, retain_graph=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--length", type=int, default=1024, help="of each of four sequences of the dense batch"
    )
    parser.add_argument("--repeats", type=int, default=9)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    clock = time.process_time if given.threads == 1 else time.perf_counter
    total = 4 * given.length
    metas = [meta_tensor(None, None, None, DIM, dtype=torch.float32)] * 3
    engine = AttentionEngine(metas, mask_mod=causal(), backend="cpu")
    rows = [torch.randn(total, heads, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    batch = [x.view(4, given.length, *x.shape[1:]) for x in rows]
    print(
        f"{HEADS} heads, {KV_HEADS} kv heads, dim {DIM}, float32, causal, {total} rows, {given.threads} thread(s)"
    )
    print(
        f"{'lengths':<24}{'pairs':>8}{'forward':>10}{'backward':>10}   (time, both relative to the dense batch)"
    )
    for kind in ("equal", "one long, many short", "halves"):
        lengths = lengths_of(kind, total)
        cu_len = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        share = pairs(lengths) / pairs([given.length] * 4)
        ratios: list[float] = []
        for make in (forward_of, backward_of):
            dense, packed = interleaved(
                [make(engine, batch), make(engine, rows, cu_len_q=cu_len)], given.repeats, clock
            )
            ratios.append(packed / dense)
        print(f"{kind:<24}{share:>8.2f}{ratios[0]:>10.2f}{ratios[1]:>10.2f}")


if __name__ == "__main__":
    main()

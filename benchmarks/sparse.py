"""Sparse attention of the library against dense attention, on the CPU: does the time fall with the visible pairs?

    python -m benchmarks.sparse                         everything (fifteen minutes), a report and figures
    python -m benchmarks.sparse --quick                 length 2048 alone
    python -m benchmarks.sparse --only 'hash.*8192'     some cases; they join the results of the day
    python -m benchmarks.sparse --report                no measurement: report and figures of what is there

For every case the contenders run in turns, round after round, and each round gives a ratio to ours; printed are
medians. "dense" is our own dense causal attention, heads first in memory. Its time over ours, times the share of pairs
that are visible, is the share of the bound: 100 % where a pair costs what it costs in dense attention. Sorting and
gathering count. One thread is measured in processor time, which other processes disturb less. Freed memory is
the C library's business, unless it is asked to keep it.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import re
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import sparse_report
from benchmarks.measure import measure, rounded
from benchmarks.results import FOLDER, ResultNotUsable, Results, commit, go_on, machine
from benchmarks.sparse_cases import CASES, QUICK_LENGTH, Case, Peers, contenders


@dataclass(frozen=True, slots=True)
class Found:
    """Quartiles of each contender's time over ours, seconds of a call, the density, and other processes' load."""

    ratios: dict[str, list[float]]
    seconds: dict[str, float]
    density: float
    others: float | None


def keep_freed_memory() -> bool:
    """Ask the C library to keep what is freed for later calls: fresh pages cost up to half of a short call, by luck of
    what was freed before it. False where it cannot be asked."""
    trim_threshold, mmap_threshold, most = -1, -3, 2**31 - 1
    try:
        option = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(option(trim_threshold, most)) and bool(option(mmap_threshold, 2**30))


def measured(case: Case, rounds: int, peers: Peers) -> Found:
    found, density = contenders(case, peers)
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    outcome = measure(found, rounds=rounds, clock=clock)
    return Found(outcome.ratios, outcome.seconds, rounded(density), outcome.others)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help=f"length {QUICK_LENGTH} alone, three rounds")
    parser.add_argument("--only", default="", help="cases whose name matches, such as 'hash 16, 8192'")
    parser.add_argument("--report", action="store_true", help="no measurement: draw what is there again")
    parser.add_argument(
        "--no-flex", action="store_true", help="without flex_attention, which compiles for a minute"
    )
    parser.add_argument("--no-sdpa", action="store_true", help="without torch's attention with a mask")
    parser.add_argument("--peer-rounds", type=int, help="rounds with either of them at most")
    parser.add_argument("--keep-freed-memory", action="store_true", help="in the process, for all alike")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=FOLDER / f"sparse-{datetime.date.today()}.json")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    try:
        results = go_on(given.output, machine()) if given.output.exists() else Results(machine())
    except ResultNotUsable as problem:
        print(problem)
        return 1
    kept = given.keep_freed_memory and keep_freed_memory()
    results.machine["freed memory"] = "kept" if kept else "as the C library likes"
    chosen = [] if given.report else [c for c in CASES if re.search(given.only, str(c))]
    chosen = [c for c in chosen if not given.quick or c.length == QUICK_LENGTH]
    if chosen:
        results.commands.append(
            f"{shlex.join(['python', '-m', 'benchmarks.sparse', *sys.argv[1:]])}  # {commit()}"
        )
    peers = Peers(not given.no_sdpa, not given.no_flex, given.peer_rounds)
    for case in chosen:
        found = measured(case, 3 if given.quick else given.rounds, peers)
        results.add(case, found)
        results.save(given.output)
        print(sparse_report.line(results.entries[-1]), flush=True)
    for path in sparse_report.write(results, given.output):
        print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

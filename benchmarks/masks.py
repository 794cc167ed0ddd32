"""What block masks cost: ours against torch's create_block_mask, eager and compiled.

    python -m benchmarks.masks                      all cases (ten minutes) and the table
    python -m benchmarks.masks --only 'window.*16384'    some, added to the results of the day
    python -m benchmarks.masks --table              table and figure of the results of the day

One call plans anew and makes the exact lists of both sides. "new function" also traces a mask_mod that was made for
this call; "again" is a further step of one mask whose tensors have changed in place (no work where it reads none).
Torch's compiled function was compiled before, as ours was traced before. Everything runs on one core. At 16384 the
contenders take turns and ratios are torch's processor time over ours. Where torch's eager function would need 80 GB
(32 heads), one head's time counts 32 times. At both lengths ours is also measured in a process of its own, with the
growth of its memory over what was there before.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import masks_report
from benchmarks.measure import rounded
from benchmarks.memory import ROOT, forget_peak, peak_bytes
from benchmarks.results import machine

NAMES = ("causal", "window", "documents", "documents & window", "prefix")
LENGTHS, HEADS = (16384, 131072), (1, 32)
COMPARED = LENGTHS[0]  # the length at which torch is measured, too
WINDOW, DOCUMENT = 1024, 2048
ROUNDS = 5
RESULTS = ROOT / "benchmarks" / "results"
# torch's time over ours at COMPARED; ours at the other length where all heads share one mask.
TARGETS = masks_report.TARGETS


@dataclass(frozen=True, slots=True)
class Case:
    """A mask at a length; with more than one head every head has its own."""

    name: str
    length: int
    heads: int

    def __str__(self) -> str:
        return f"{self.name}, {self.length}, {self.heads} head{'s' if self.heads > 1 else ''}"


CASES = tuple(Case(name, length, heads) for length in LENGTHS for heads in HEADS for name in NAMES)


@dataclass(frozen=True, slots=True)
class Data:
    """What the masks read: documents of about 2048 positions with sorted ids, and a number per head."""

    ids: Tensor  # (heads, length)
    numbers: Tensor  # (heads,)


def data(case: Case, seed: int = 0) -> Data:
    generator = torch.Generator().manual_seed(seed)
    count = max(1, case.length // DOCUMENT)
    ids = torch.randint(0, count, (case.heads, case.length), generator=generator).sort(-1).values
    return Data(ids, torch.arange(case.heads) * 32)


def mask_of(case: Case, read: Data) -> Callable[..., Any]:
    """A new mask_mod; that of one head reads no tensor where it need not."""
    window, prefix, numbers = WINDOW, case.length // 8, read.numbers
    ids = read.ids if case.heads > 1 else read.ids[0]
    if case.heads == 1:
        masks = {
            "causal": lambda b, h, q, k: k <= q,
            "window": lambda b, h, q, k: (k <= q) & (q - k <= window),
            "documents": lambda b, h, q, k: ids[q] == ids[k],
            "documents & window": lambda b, h, q, k: (ids[q] == ids[k]) & (k <= q) & (q - k <= window),
            "prefix": lambda b, h, q, k: (k < prefix) | (k <= q),
        }
    else:
        masks = {
            "causal": lambda b, h, q, k: k <= q + numbers[h],
            "window": lambda b, h, q, k: (k <= q) & (q - k <= window + numbers[h]),
            "documents": lambda b, h, q, k: ids[h, q] == ids[h, k],
            "documents & window": lambda b, h, q, k: (ids[h, q] == ids[h, k]) & (k <= q) & (q - k <= window),
            "prefix": lambda b, h, q, k: (k < prefix + numbers[h]) | (k <= q),
        }
    return masks[case.name]


def ours(case: Case, mask_mod: Callable[..., Any]) -> Any:
    from attn_engine import create_block_mask

    return create_block_mask(mask_mod, None, case.heads, case.length, case.length, "cpu").lists()


def again(case: Case) -> Callable[[], Any]:
    """Steps of one mask whose tensors change in place before each."""
    from attn_engine import create_block_mask

    read = data(case)
    mask = create_block_mask(mask_of(case, read), None, case.heads, case.length, case.length, "cpu")

    def step() -> Any:
        read.ids.add_(0)
        read.numbers.add_(0)
        return mask.lists()

    return step


def torch_eager(case: Case, read: Data) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    return create_block_mask(mask_of(case, read), None, 1, case.length, case.length, "cpu")


def torch_compiled(case: Case, read: Data) -> Callable[[], Any]:
    from torch.nn.attention.flex_attention import create_block_mask

    function, mask = torch.compile(create_block_mask), mask_of(case, read)
    return lambda: function(mask, None, case.heads, case.length, case.length, "cpu")


def one_core() -> None:
    """This process from now on, so that other processes disturb it little."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)


def ratios(case: Case) -> dict[str, float]:
    """torch's processor time over ours, medians over rounds in which all take turns, and milliseconds of each."""
    one_core()
    mask_mod = mask_of(case, read := data(case))
    contenders: dict[str, tuple[Callable[[], Any], int]] = {
        "ours": (lambda: ours(case, mask_mod), 30 if case.heads == 1 else 5),
        "compiled": (torch_compiled(case, read), 1),
        "eager": (lambda: torch_eager(case, read), 1),
    }
    rounds: list[dict[str, float]] = []
    for _ in range(ROUNDS + 1):
        rounds.append({name: seconds(run, n) for name, (run, n) in contenders.items()})
        rounds[-1]["eager"] *= case.heads
    del rounds[0]  # compiles and warms up
    times = {name: statistics.median(r[name] for r in rounds) for name in contenders}
    kept = {
        f"{n} ratio": rounded(statistics.median(r[n] / r["ours"] for r in rounds))
        for n in ("eager", "compiled")
    }
    return kept | {f"{name} ms": rounded(1e3 * t) for name, t in times.items()}


def seconds(run: Callable[[], Any], repeats: int) -> float:
    """Processor time of a call."""
    start = time.process_time()
    for _ in range(repeats):
        run()
    return (time.process_time() - start) / repeats


def alone(case: Case) -> dict[str, float]:
    """Milliseconds and growth in megabytes of ours on one core, in this process."""
    one_core()
    small = Case(case.name, 2048, case.heads)
    ours(small, mask_of(small, data(small)))
    read = data(case)
    mask_mod = mask_of(case, read)
    forget_peak()
    before = peak_bytes()
    ours(case, mask_mod)
    grown = peak_bytes() - before
    timed = {
        "ms on one core": lambda: ours(case, mask_mod),
        "new function ms on one core": lambda: ours(case, mask_of(case, read)),
        "again ms on one core": again(case),
    }
    kept = {"MB": rounded(grown / 1e6)}
    for name, run in timed.items():
        times: list[float] = []
        for _ in range(9):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        kept[name] = rounded(1e3 * statistics.median(times))
    return kept


def in_own_process(part: str, case: Case) -> dict[str, float]:
    command = [
        sys.executable,
        "-m",
        "benchmarks.masks",
        "--part",
        part,
        case.name,
        str(case.length),
        str(case.heads),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=280, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{case}: the process failed.\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="cases whose name matches, such as 'window, 16384'")
    parser.add_argument("--table", action="store_true", help="no measurement: the table of what is there")
    parser.add_argument("--part", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULTS / f"masks-{datetime.date.today()}.json")
    given = parser.parse_args()
    if given.part:
        part, name, length, heads = given.part
        print(json.dumps({"alone": alone, "ratios": ratios}[part](Case(name, int(length), int(heads)))))
        return
    known = json.loads(given.out.read_text()) if given.out.exists() else {"machine": machine(), "cases": {}}
    for case in () if given.table else CASES:
        if not re.search(given.only, str(case)):
            continue
        found = in_own_process("alone", case)
        if case.length == COMPARED:
            found |= in_own_process("ratios", case)
        print(f"{case}: {found}", flush=True)
        known["cases"][str(case)] = found
        given.out.write_text(json.dumps(known | {"targets": TARGETS}, indent=1) + "\n")
    written = masks_report.write(known, given.out.with_suffix(""))
    print(masks_report.markdown(known), f"written: {', '.join(map(str, written))}", sep="\n")


if __name__ == "__main__":
    main()

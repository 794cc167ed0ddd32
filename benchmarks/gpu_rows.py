"""What the smaller GPU benchmarks share: contenders of a case in turns, and the command that measures cases."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from attn_engine.gpu_check.machine import machine
from benchmarks.gpu_measure import Timer, difference, in_turns, reason
from benchmarks.results import FOLDER

MOST_DIFFERENCE = 0.03
Case = TypeVar("Case")
Measured = tuple[dict[str, list[float]], dict[str, str]]


def measured(makers: Mapping[str, Callable[[], Callable[[], Tensor]]], device: str) -> Measured:
    """Quartiles of the seconds of a call, by contender, and why others have none. Results must be as the first's."""
    runs: dict[str, Callable[[], Tensor]] = {}
    left_out: dict[str, str] = {}
    wanted: Tensor | None = None
    for name, maker in makers.items():
        try:
            run = maker()
            result = run().detach().clone()
        except Exception as error:
            left_out[name] = reason(error)
            continue
        wanted = result if wanted is None else wanted
        if (off := difference(result, wanted)) > MOST_DIFFERENCE:
            left_out[name] = f"its result differs from that of {next(iter(runs))} by {off:.2f} of its size"
            continue
        runs[name] = run
    return in_turns(runs, Timer(device)), left_out


def command(
    name: str,
    table: Iterable[Case],
    measure: Callable[[Case, str], Measured],
    arguments: list[str] | None = None,
) -> int:
    """`python -m benchmarks.NAME`: measures the cases that are asked for, and writes the file after each."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}")
    parser.add_argument("--only", default="", help="regular expression that a case's name must match")
    parser.add_argument("--list", action="store_true", help="show the cases and measure nothing")
    parser.add_argument("--output", type=Path, help=f"default: {FOLDER}/{name.replace('_', '-')}-DATE.json")
    options = parser.parse_args(arguments)
    cases = [case for case in table if re.search(options.only, str(case))]
    if options.list:
        print(*cases, sep="\n")
        return 0
    if not torch.cuda.is_available():
        print("No GPU that torch can use: nothing to measure.")
        return 0
    here, rows = machine(), list[dict[str, Any]]()
    path: Path = options.output or FOLDER / f"{name.replace('_', '-')}-{here['date']:.10}.json"
    for case in cases:
        seconds, left_out = measure(case, "cuda")
        rows.append({"case": str(case), "seconds": seconds, "left out": left_out})
        times = "  ".join(f"{n} {q[1] * 1e3:.2f} ms" for n, q in seconds.items())
        print(f"{case!s:52}", times, *(f"[{n}: {why}]" for n, why in left_out.items()), flush=True)
        path.write_text(json.dumps({"machine": here, "rows": rows}, indent=1))
    print(f"written: {path}")
    return 0

"""Speed of the GPU backends on this machine, beside every peer that is there, in one process.

    python -m benchmarks.gpu                     everything, the cases that have goals first (hours)
    python -m benchmarks.gpu --quick             those cases alone, without flex's max-autotune (minutes)
    python -m benchmarks.gpu --only 'causal S=8192 .*forward'
    python -m benchmarks.gpu --minutes 9 --resume    go on where the last run of today stopped, for nine minutes

Peers: PyTorch's SDPA (flash, cuDNN, efficient), compiled flex_attention (default and max-autotune), and flash-attn,
FA3, FlashInfer and fla where they are installed. The file is written after each case, with its page.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
import time
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch

from attn_engine.gpu_check.machine import machine
from benchmarks import gpu_report
from benchmarks.gpu_cases import GpuCase, is_quick, table
from benchmarks.gpu_contenders import OURS, PEERS, Maker
from benchmarks.gpu_measure import Functions, Timer, matmul_rate, measure
from benchmarks.results import FOLDER, ResultNotUsable, Results, go_on

# A run goes on only where these are as they were.
SAME = ("device", "driver", "torch", "triton", "tilelang", "cuda of torch")
RECOMPILATIONS = 256


def selected(options: argparse.Namespace) -> list[GpuCase]:
    return [
        case
        for case in table()
        if (not options.quick or is_quick(case)) and re.search(options.only, str(case))
    ]


def contenders(options: argparse.Namespace) -> dict[str, Maker]:
    """Peers first: results are compared with those of the first that computes the case."""
    autotune = not options.quick if options.autotune is None else options.autotune
    peers = {name: maker for name, maker in PEERS.items() if autotune or name != "flex, max-autotune"}
    return {**peers, **OURS}


def measure_all(
    cases: list[GpuCase],
    makers: Mapping[str, Maker],
    results: Results,
    path: Path,
    minutes: float,
    device: str = "cuda",
) -> bool:
    """Measure the cases, saving after each; False where the time ran out before the end."""
    end = time.monotonic() + 60 * minutes
    timer, functions = Timer(device), Functions(makers, device)
    for case in cases:
        if time.monotonic() > end:
            return False
        outcome = measure(case, makers, functions, timer)
        results.add(case, outcome)
        results.save(path)
        gpu_report.write(path)
        print(line(case, results), flush=True)
    return True


def line(case: GpuCase, results: Results) -> str:
    """A case as printed while measuring: everybody's TFLOP/s."""
    times: dict[str, list[float]] = results.entries[-1]["seconds"]
    rates = "  ".join(f"{name} {gpu_report.rate(case, q[1]):.0f}" for name, q in times.items())
    return f"{case!s:58} {rates or 'nobody computes it'}"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="only the cases that have goals, and one short one")
    add("--only", default="", help="regular expression that a case's name must match")
    add("--list", action="store_true", help="show the cases and measure nothing")
    add("--autotune", action=argparse.BooleanOptionalAction, help="flex with max-autotune: a minute a case")
    add("--resume", action="store_true", help="keep what the result file has and measure only what it lacks")
    add("--minutes", type=float, default=float("inf"), help="stop after so long; --resume goes on")
    add("--output", type=Path, help="the result's path; default: benchmarks/results/gpu-DATE.json")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    cases = selected(options)
    if options.list:
        print(*cases, sep="\n")
        return 0
    here = machine()
    print(*(f"{key}: {value}" for key, value in here.items()), sep="\n")
    if not torch.cuda.is_available():
        print("\nNo GPU that torch can use: nothing to measure.")
        return 0
    warnings.filterwarnings("ignore", module="torch")
    torch._dynamo.config.recompile_limit = RECOMPILATIONS
    path: Path = options.output or FOLDER / f"gpu-{here['date']:.10}{'-quick' * options.quick}.json"
    try:
        results = go_on(path, here, SAME) if path.exists() else Results(here)
    except ResultNotUsable as problem:
        print(problem)
        return 1
    words = shlex.join(sys.argv[1:] if arguments is None else arguments)
    results.commands.append(f"{here['date']} {here['commit']} python -m benchmarks.gpu {words}")
    results.machine["matmul rate"] = matmul_rate(Timer("cuda"))
    missing = [case for case in cases if not (options.resume and results.has(case))]
    if not measure_all(missing, contenders(options), results, path, options.minutes):
        print("\nStopped because the time is over; --resume goes on.")
    results.save(path)
    print(f"\nwritten: {path}\nwritten: {gpu_report.write(path)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

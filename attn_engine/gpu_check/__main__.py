"""Try the GPU backends on this machine, and measure them.

    python -m attn_engine.gpu_check                every check, then the benchmark: below nine minutes
    python -m attn_engine.gpu_check --list         what would be checked
    python -m attn_engine.gpu_check --only causal --no-benchmark
    python -m attn_engine.gpu_check --ahead        only the kernels compiled ahead of time, for every target

On a machine without a GPU the kernels are compiled ahead of time and nothing is run. --backend triton-interpreter tries
the checks themselves there, in small sizes. The exit status is 1 where a check failed.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

import torch

from attn_engine.gpu_check.catalogue import CHECKS
from attn_engine.gpu_check.machine import machine
from attn_engine.gpu_check.report import Report
from attn_engine.gpu_check.run import CHECKOUT, GPU_BACKENDS, Options, comparisons, run
from attn_engine.runtime.backends import DEVICES
from attn_engine.runtime.gpu_device import missing_gpu


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m attn_engine.gpu_check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--minutes", type=float, default=8.5, help="after which it ends; what is left is listed as not run")
    add("--only", default="", help="regular expression that a check's name must match")
    add("--backend", default="", choices=["", *DEVICES], help="this backend alone")
    add("--workers", type=int, default=0, help="processes at a time; default: by the number of cores")
    add("--no-benchmark", action="store_true", help="only the checks")
    add("--ahead", action="store_true", help="only compile ahead of time, for every target")
    add("--list", action="store_true", help="show the checks in the order of their importance")
    add("--output", type=Path, help="folder for the results; default: benchmarks/results in a checkout")
    return parser.parse_args(arguments)


def default_folder() -> Path:
    results = CHECKOUT / "benchmarks" / "results"
    return results if results.exists() else Path("attn_engine_gpu_check")


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.list:
        print(*(f"{check.kind:9} {check.name}" for check in CHECKS), sep="\n")
        print(*dict.fromkeys(f"compared  {row.name}" for row in comparisons(GPU_BACKENDS, "cuda")), sep="\n")
        return 0
    facts = machine()
    print(*(f"{key}: {value}" for key, value in facts.items()), sep="\n")
    if not torch.cuda.is_available():
        print(
            f"\nThis machine has no GPU that torch can use: nothing is run on one.\n{missing_gpu('triton')}"
        )
    folder = options.output or default_folder()
    path = folder / f"gpu-check-{facts['date']:.10}.json"
    words = sys.argv[1:] if arguments is None else arguments
    report = Report(facts, shlex.join(["python", "-m", "attn_engine.gpu_check", *words]))
    if not torch.cuda.is_available():
        report.notes.append("No GPU: kernels were compiled ahead of time, and none was run on a device.")
        report.notes.append(" ".join(str(missing_gpu("triton")).split()))
    asked = Options(
        options.minutes, folder, options.backend, options.only, options.workers,
        not options.no_benchmark, options.ahead,
    )  # fmt: skip
    run(asked, report, path)
    print(f"\n{report.counts()}\nwritten: {path}\nwritten: {path.with_suffix('.md')}")
    for failure in report.failures:
        print(f"FAILED: {failure.place}: {failure.name}: {failure.outcome.detail}")
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())

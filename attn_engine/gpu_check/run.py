"""A run: the checks, then kernels compiled ahead of time, then the benchmark, each as far as the time goes."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import attn_engine
from attn_engine.gpu_check import ahead, chosen, linear, selection, serving
from attn_engine.gpu_check.catalogue import CHECKS
from attn_engine.gpu_check.checks import Place
from attn_engine.gpu_check.jobs import CheckJob, Comparison
from attn_engine.gpu_check.outcome import Done, Job, Outcome
from attn_engine.gpu_check.pool import run_jobs
from attn_engine.gpu_check.report import Report
from attn_engine.runtime.aot_report import TARGETS
from attn_engine.runtime.backends import DEVICES, NAMES

GPU_BACKENDS = ("triton", "tilelang")
CHECKOUT = Path(attn_engine.__file__).resolve().parents[1]
# Of the whole time: what checks may take before the benchmark begins, and what is kept for the end.
SHARE_OF_CHECKS = 0.65
SECONDS_AT_THE_END = 15.0
SECONDS_OF_A_JOB = 150.0
MOST_WORKERS = 8


@dataclass(frozen=True, slots=True)
class Options:
    """What a run is asked for. backend "": all that are installed. only: what a check's name must match."""

    minutes: float
    folder: Path
    backend: str = ""
    only: str = ""
    workers: int = 0
    benchmark: bool = True
    ahead_only: bool = False

    @property
    def worker_count(self) -> int:
        return self.workers or max(1, min(MOST_WORKERS, (os.cpu_count() or 1) // 2))


def target_of_device() -> str | None:
    """The target among those of ahead-of-time compilation that this machine's device belongs to."""
    if not torch.cuda.is_available():
        return None
    if torch.version.hip:
        name = str(torch.cuda.get_device_properties(0).gcnArchName).partition(":")[0]
    else:
        name = f"sm_{torch.cuda.get_device_capability(0)[0]}0"
    return name if name in TARGETS else None


def installed_backends(report: Report) -> tuple[str, ...]:
    """The GPU backends that can be tried here; a note for each of the others."""
    found: list[str] = []
    for name in GPU_BACKENDS:
        if name not in NAMES:
            report.notes.append(f"{name}: this version of attn_engine has no such backend")
        elif importlib.util.find_spec(name) is None:
            report.notes.append(f"{name}: not tried, the package is not installed (pip install {name})")
        else:
            found.append(name)
    return tuple(found)


def check_jobs(options: Options, backends: Sequence[str], device: str) -> list[CheckJob]:
    """The catalogue for every backend, in the order of importance."""
    places = [Place(b, device, small=DEVICES[b] == "cpu") for b in backends]
    return [
        CheckJob(check, place) for check in CHECKS for place in places if re.search(options.only, check.name)
    ]


def comparisons(backends: Sequence[str], device: str) -> list[Comparison]:
    """What is checked beside the catalogue: what is not one attention call."""
    rows: list[Comparison] = []
    for backend in backends:
        place = backend, device, DEVICES[backend] == "cpu"
        for of in (selection, chosen, serving) if _is_triton(backend) else ():
            rows += of.checks(*place)
        rows += linear.checks(*place) if _has_linear(backend) else []
    return rows


def run(options: Options, report: Report, path: Path) -> None:
    """Fill the report, saved after each job."""
    begin = time.monotonic()
    end = begin + 60 * options.minutes - SECONDS_AT_THE_END
    on_gpu = torch.cuda.is_available()

    def save() -> None:
        report.seconds = time.monotonic() - begin
        report.save(path)

    def carry_out(section: str, jobs: Sequence[Job], until: float) -> None:
        def done(job: Job, outcome: Outcome) -> None:
            place = job.place.backend if isinstance(job, CheckJob | Comparison) else _place_of(job)
            report.done.append(Done("checks" if section == "checks" else "ahead", job.name, place, outcome))
            print(_line(report.done[-1]), flush=True)
            save()

        print(f"\n{section}: {len(jobs)}", flush=True)
        # Compiling does not hang, but a busy machine takes its time: that is no failure.
        seconds = SECONDS_OF_A_JOB if section == "checks" else float("inf")
        run_jobs(jobs, options.worker_count, until, seconds, done)

    backends = (options.backend,) if options.backend else installed_backends(report)
    until = begin + SHARE_OF_CHECKS * (end - begin) if options.benchmark and on_gpu else end
    device = "cpu" if all(DEVICES[b] == "cpu" for b in backends) else "cuda"
    if (on_gpu or device == "cpu") and not options.ahead_only and backends:
        asked = [c for c in comparisons(backends, device) if re.search(options.only, c.name)]
        carry_out("checks", [*check_jobs(options, backends, device), *asked], until)
    found = target_of_device()
    compilers = tuple(b for b in backends if b in ahead.COMPILERS)
    targets = TARGETS if found is None or options.ahead_only else (found,)
    kernels = [
        *ahead.jobs(compilers, targets),
        *(j for of in (selection, chosen, serving) if "triton" in compilers for j in of.ahead_jobs(targets)),
        *linear.ahead_jobs(compilers, targets),
    ]
    carry_out("ahead of time", [job for job in kernels if re.search(options.only, job.name)], until)
    if on_gpu and options.benchmark and not options.ahead_only:
        report.benchmark = run_benchmark(path, end - time.monotonic(), report)
    save()


def _place_of(job: Job) -> str:
    assert isinstance(job, ahead.KernelsAhead)
    return f"{job.backend}, {job.target}"


def _has_linear(backend: str) -> bool:
    return backend in ("triton", "triton-interpreter", "tilelang", "tilelang-cpu")


def _is_triton(backend: str) -> bool:
    return backend in ("triton", "triton-interpreter")


def _line(done: Done) -> str:
    outcome = done.outcome
    text = " ".join(outcome.detail.split())
    return f"{outcome.verdict:8} {outcome.seconds:6.1f} s  {done.place}: {done.name}: {text}"


def run_benchmark(path: Path, seconds: float, report: Report) -> str:
    """The quick part of benchmarks/gpu.py in a process of its own; its page, for the end of ours."""
    if not (CHECKOUT / "benchmarks" / "gpu.py").exists():
        report.notes.append("benchmark: not run, benchmarks/ is not beside the package")
        return ""
    output = path.with_name(path.stem.replace("gpu-check", "gpu-quick") + ".json")
    minutes = max(0.0, seconds - SECONDS_AT_THE_END) / 60
    command = [sys.executable, "-m", "benchmarks.gpu", "--quick", "--minutes", f"{minutes:.2f}"]
    print("\nbenchmark:", " ".join(command[1:]), flush=True)
    try:
        done = subprocess.run([*command, "--output", str(output)], cwd=CHECKOUT, timeout=max(1.0, seconds))
        if done.returncode != 0:
            report.notes.append(f"benchmark: ended with exit code {done.returncode}")
    except subprocess.TimeoutExpired:
        report.notes.append("benchmark: stopped because the time was over; what was measured is kept")
    page = output.with_suffix(".md")
    return page.read_text().replace("\n# ", "\n## ") if page.exists() else ""

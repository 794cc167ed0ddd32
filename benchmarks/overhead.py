"""What a small call costs besides its kernels, and how it compares with PyTorch's own attention.

    python benchmarks/overhead.py                        the table (a minute)
    python benchmarks/overhead.py --only 'alibi.*forward$'

Inputs are B=1, H=4, S=64, D=64 in float32, where kernels take a few ten microseconds. The contenders run in turns,
round after round. Per case: microseconds of a call, those of them inside the compiled kernels, the rest, and the time
of PyTorch's scaled_dot_product_attention over ours (above 1: attn_engine is faster); medians over the rounds. A bias
or a mask is made beforehand for PyTorch. The last lines are about the first call: the import, and one kernel from the
compiler and from the cache on disk.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from attn_engine import AttentionEngine, meta_tensor
from attn_engine.runtime import cpu_launch

HEADS, LENGTH, DIM = 4, 64, 64
DIRECTIONS = ("forward", "forward, recorded", "forward+backward")
NAMES = ("plain", "causal", "alibi", "learned bias")
Run = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Contenders:
    """Two functions of q, k, v that compute the same, and what they learn besides."""

    ours: Callable[..., Tensor]
    sdpa: Callable[..., Tensor]
    learned: tuple[Tensor, ...] = ()


def contenders(name: str) -> Contenders:
    slopes = 2.0 ** -torch.arange(1.0, HEADS + 1)
    bias = torch.randn(HEADS, LENGTH, LENGTH, requires_grad=True)
    q_idx, kv_idx = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)

    def causal(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return kv_idx <= q_idx

    def alibi(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return score - slopes[h] * (q_idx - kv_idx)

    def learned_bias(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return score + bias[h, q_idx, kv_idx]

    def engine(**options: Any) -> AttentionEngine:
        meta = [meta_tensor(None, None, None, DIM, dtype=torch.float32)] * 3
        return AttentionEngine(meta, layout="bhsd", scale=DIM**-0.5, **options)

    sdpa = F.scaled_dot_product_attention
    match name:
        case "plain":
            return Contenders(engine(), sdpa)
        case "causal":
            return Contenders(engine(mask_mod=causal), functools.partial(sdpa, is_causal=True))
        case "alibi":
            mask = -slopes[:, None, None] * (q_idx - kv_idx)
            mask = mask.masked_fill(kv_idx > q_idx, float("-inf"))[None]
            ours = engine(score_mod=alibi, mask_mod=causal)
            return Contenders(ours, functools.partial(sdpa, attn_mask=mask))
        case _:
            ours = engine(score_mod=learned_bias)
            return Contenders(ours, lambda q, k, v: sdpa(q, k, v, attn_mask=bias[None]), (bias,))


def runs_of(name: str, direction: str) -> dict[str, Run]:
    """What one call of each contender is, on the same tensors."""
    found = contenders(name)
    q, k, v, d_out = torch.randn(4, 1, HEADS, LENGTH, DIM).unbind(0)
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]

    def both(function: Callable[..., Tensor]) -> object:
        return torch.autograd.grad(function(*inputs), (*inputs, *found.learned), d_out)

    def one(function: Callable[..., Tensor]) -> Run:
        match direction:
            case "forward":
                return torch.no_grad()(functools.partial(function, q, k, v))
            case "forward, recorded":
                return functools.partial(function, *inputs)
            case _:
                return functools.partial(both, function)

    return {"ours": one(found.ours), "sdpa": one(found.sdpa)}


# ---- measuring


@contextmanager
def kernel_time() -> Iterator[list[float]]:
    """The seconds that kernels run inside; measuring them costs a microsecond, so it is done in rounds of its own."""
    spent = [0.0]
    run = cpu_launch.run_on_threads

    def timed(function: Callable[[int], None], address: int, count: int) -> None:
        start = time.perf_counter()
        run(function, address, count)
        spent[0] += time.perf_counter() - start

    cpu_launch.run_on_threads = timed
    try:
        yield spent
    finally:
        cpu_launch.run_on_threads = run


def microseconds(run: Run, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - start) / repeats * 1e6


def measure(runs: dict[str, Run], rounds: int, repeats: int = 60) -> dict[str, float]:
    """Medians: "call" and "kernel" in microseconds, "rest" their difference, "ratio" to PyTorch."""
    for run in runs.values():
        microseconds(run, 10)  # compiles, and warms up
    ours, kernel, ratios = list[float](), list[float](), list[float]()
    for _ in range(rounds):
        ours.append(microseconds(runs["ours"], repeats))
        ratios.append(microseconds(runs["sdpa"], repeats) / ours[-1])
        with kernel_time() as spent:
            microseconds(runs["ours"], repeats)
        kernel.append(spent[0] / repeats * 1e6)
    rest = [a - b for a, b in zip(ours, kernel, strict=True)]
    found = {"call": ours, "kernel": kernel, "rest": rest, "ratio": ratios}
    return {name: round(statistics.median(values), 2) for name, values in found.items()}


FIRST_CALL = """
import sys, time, torch
start = time.perf_counter()
import attn_engine
print(time.perf_counter() - start)

def kernel(**options):
    from attn_engine.runtime.cpu_compile import compile_cpu

    meta = [attn_engine.meta_tensor(None, None, None, 64, dtype=torch.float32)] * 3
    built = attn_engine.AttentionEngine(meta, backend="cpu", **options)
    compiled = built._call(built._present, "cpu")[0].compiled
    (forward,) = compiled.module("forward").kernels
    source = compiled.backend.source(forward, compiled.schedule)
    start = time.perf_counter()
    compile_cpu(forward, source)
    return time.perf_counter() - start

kernel()  # finds the compiler, and has it read the headers
print(kernel(mask_mod=lambda b, h, q_idx, kv_idx: kv_idx <= q_idx))
"""


def first_call(rounds: int = 3) -> dict[str, float]:
    """Seconds in a fresh process: the import beside torch's, a kernel from the compiler, and from the disk cache."""
    found: dict[str, list[float]] = {"import": [], "compile a kernel": [], "load a kernel": []}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            environment = {**os.environ, "ATTN_ENGINE_CACHE": folder}
            for name in ("compile a kernel", "load a kernel"):
                command = [sys.executable, "-c", FIRST_CALL]
                done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
                imported, kernel = map(float, done.stdout.split())
                found["import"].append(imported)
                found[name].append(kernel)
    return {name: round(statistics.median(values), 4) for name, values in found.items()}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="regular expression that a case's name must match")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--no-first-call", action="store_true", help="leave out import, compiler and cache")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/overhead-DATE.json")
    options = parser.parse_args(arguments)
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    machine = {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "load before": os.getloadavg()[0]}
    described = {**machine, "python": platform.python_version(), "torch": torch.__version__, "date": date}
    path: Path = options.output or Path(__file__).parent / "results" / f"overhead-{date:.10}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    print(f"{'microseconds':32}{'call':>9}{'kernel':>9}{'rest':>9}{'sdpa/ours':>11}")
    results: dict[str, dict[str, float]] = {}
    for name in NAMES:
        for direction in DIRECTIONS:
            case = f"{name} {direction}"
            if re.search(options.only, case):
                found = results[case] = measure(runs_of(name, direction), options.rounds)
                cells = f"{found['call']:9.1f}{found['kernel']:9.1f}{found['rest']:9.1f}"
                print(f"{case:32}{cells}{found['ratio']:11.2f}", flush=True)
    seconds = {} if options.no_first_call else first_call()
    print(*(f"{name:32}{value * 1000:9.1f} ms" for name, value in seconds.items()), sep="\n")
    written = {"machine": described, "microseconds": results, "seconds": seconds}
    path.write_text(json.dumps(written, indent=1) + "\n")
    print(f"written to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

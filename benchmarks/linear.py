"""Linear attention on one core of a CPU: against chunked torch code and the processor's peak, long, and by steps.

    python -m benchmarks.linear                        all cases and the table (ten minutes)
    python -m benchmarks.linear --only 'gla.*64'       some, added to the results of the day
    python -m benchmarks.linear --only share           the matrix parts against the micro-kernel (half a minute)
    python -m benchmarks.linear --table                table and figure of the results of the day

B = 1, H = 8, T = 4096, scale 1/sqrt(D). Contenders take turns; a ratio is theirs over our processor time, the median of
the rounds; its bound is what it would be if all multiplications of ours ran as fast as the micro-kernel and nothing
else took time. "plain" is chunked torch code of this file, in float32; "fla" is the naive_chunk of fla-core and "hf"
the torch_chunk_gated_delta_rule of transformers, where they are installed. Forward and backward: autograd through them.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import importlib
import json
import re
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attn_engine import LinearAttentionEngine, meta_tensor
from benchmarks import linear_report, linear_share
from benchmarks.measure import rounded
from benchmarks.memory import ROOT, forget_peak, peak_bytes
from benchmarks.peak import peak
from benchmarks.results import machine

HEADS, TOKENS, ROUNDS = 8, 4096, 5
CHUNK = 64  # of the contenders; ours is the engine's default
VARIANTS = ("none", "simple gla", "gated delta net", "kda")
DIMS, DTYPES = (64, 128), ("float32", "bfloat16")
LENGTHS = (4096, 16384, 65536)
SLOW = 0.8  # seconds
RESULTS = ROOT / "benchmarks" / "results"


def rows(variant: str, dim: int, dtype: str, tokens: int = TOKENS) -> dict[str, Tensor]:
    """q, k, v, and the decay and beta that the variant has."""
    torch.manual_seed(0)
    found = {name: torch.randn(1, tokens, HEADS, dim) for name in "qkv"}
    found["k"] = torch.nn.functional.normalize(found["k"], dim=-1)
    found = {n: x.to(getattr(torch, dtype)) for n, x in found.items()}
    if variant in ("simple gla", "gated delta net"):
        found["decay"] = -torch.rand(1, tokens, HEADS)
    if variant == "kda":
        found["decay"] = -torch.rand(1, tokens, HEADS, dim)
    if variant in ("gated delta net", "kda"):
        found["beta"] = torch.rand(1, tokens, HEADS)
    return found


def engine(variant: str, dim: int, dtype: str) -> LinearAttentionEngine:
    meta = meta_tensor(None, None, None, dim, dtype=getattr(torch, dtype))
    return LinearAttentionEngine(
        [meta] * 3, delta=variant in ("gated delta net", "kda"), scale=dim**-0.5, backend="cpu"
    )


def plain_simple_gla(q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None = None) -> Tensor:
    """The chunked form of the papers in plain torch: within a chunk a masked product, from chunk to chunk a state."""
    q, k, v = (x.float().transpose(1, 2).unflatten(2, (-1, CHUNK)) for x in (q, k, v))
    g = torch.zeros(q.shape[:-1]) if decay is None else decay.transpose(1, 2).unflatten(2, (-1, CHUNK))
    g = g.cumsum(-1)
    past = torch.ones(CHUNK, CHUNK, dtype=torch.bool).tril()
    left = (g[..., :, None] - g[..., None, :]).masked_fill(~past, -torch.inf).exp()
    weights = (q @ k.mT) * q.shape[-1] ** -0.5 * left
    state, found = q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1]), []
    for i in range(q.shape[2]):
        read = (q[:, :, i] * g[:, :, i, :, None].exp()) @ state * q.shape[-1] ** -0.5
        found.append(read + weights[:, :, i] @ v[:, :, i])
        end = g[:, :, i, -1:]
        written = (k[:, :, i] * (end - g[:, :, i]).exp()[..., None]).mT @ v[:, :, i]
        state = state * end[..., None].exp() + written
    return torch.stack(found, 2).flatten(2, 3).transpose(1, 2)


def naive(module: str, name: str) -> Callable[..., Any] | None:
    """A function of an installed package, else None."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError):
            return None
    return getattr(found, "__wrapped__", found)


def contenders(variant: str) -> dict[str, Callable[..., Tensor]]:
    """What is compared with ours, on the same rows."""
    found: dict[str, Callable[..., Tensor]] = {}
    if variant in ("none", "simple gla"):
        found["plain"] = plain_simple_gla
    fla = {
        "simple gla": ("simple_gla", "naive_chunk_simple_gla"),
        "gated delta net": ("gated_delta_rule", "naive_chunk_gated_delta_rule"),
        "kda": ("kda", "naive_chunk_kda"),
    }.get(variant)
    if fla is not None and (function := naive(f"fla.ops.{fla[0]}.naive", fla[1])) is not None:
        found["fla"] = lambda **x: function(x["q"], x["k"], x["v"], x["decay"], *_beta(x))[0]
    if variant == "gated delta net":
        module = "transformers.models.qwen3_next.modeling_qwen3_next"
        if (hf := naive(module, "torch_chunk_gated_delta_rule")) is not None:
            found["hf"] = lambda **x: hf(x["q"], x["k"], x["v"], g=x["decay"], beta=x["beta"])[0]
    return found


def _beta(x: dict[str, Tensor]) -> tuple[Tensor, ...]:
    return (x["beta"],) if "beta" in x else ()


def seconds(run: Callable[[], object], repeats: int = 1) -> float:
    """Processor time of a call."""
    start = time.process_time()
    for _ in range(repeats):
        run()
    return (time.process_time() - start) / repeats


def in_turns(runs: dict[str, tuple[Callable[[], object], int]]) -> dict[str, float]:
    """Median seconds of each. What takes long takes part in two rounds."""
    slow = {n for n, (run, _) in runs.items() if seconds(run) > SLOW}  # which also compiles and warms up
    found: dict[str, list[float]] = {n: [] for n in runs}
    for i in range(ROUNDS):
        for n, (run, repeats) in runs.items():
            if n not in slow or i in (0, ROUNDS - 1):
                found[n].append(seconds(run, repeats))
    return {n: statistics.median(times) for n, times in found.items()}


def trained(function: Callable[..., Tensor], x: dict[str, Tensor]) -> Callable[[], object]:
    """Forward and backward, with gradients of everything."""
    leaves = {n: t.detach().clone().requires_grad_() for n, t in x.items()}

    def run() -> None:
        o = function(**leaves)
        torch.autograd.grad(o, list(leaves.values()), x["v"].to(o.dtype))

    return run


def untrained(function: Callable[..., Tensor], x: dict[str, Tensor]) -> Callable[[], object]:
    def run() -> None:
        with torch.no_grad():
            function(**x)

    return run


def compared(variant: str, dim: int, dtype: str) -> dict[str, float]:
    """Milliseconds, ratios with their bounds, and our part of the peak of the processor's multiply-adds."""
    x, ours = rows(variant, dim, dtype), engine(variant, dim, dtype)
    others = contenders(variant)
    kept: dict[str, float] = {}
    parts = linear_share.parts(ours)
    for direction, make in (("forward", untrained), ("forward and backward", trained)):
        if variant == "kda" and direction != "forward":
            others = {}  # autograd through the naive function would keep many gigabytes
        runs = {"ours": (make(ours, x), 3)} | {n: (make(f, x), 1) for n, f in others.items()}
        runs["micro-kernel"] = (parts.micro_kernel, 1)
        operations = linear_share.all_operations(ours, TOKENS, HEADS, backward=direction != "forward")
        loop = peak(dtype) if direction == "forward" else None
        if loop is not None:
            runs["peak"] = (functools.partial(loop.run, 1), 1)
        times = in_turns(runs)
        kept |= {f"{direction}: {n} ms": rounded(1e3 * times[n]) for n in ("ours", *others)}
        kept |= {f"{direction}: {n} ratio": rounded(times[n] / times["ours"]) for n in others}
        bound = operations * times["micro-kernel"] / parts.micro_kernel()
        kept |= {f"{direction}: {n} bound": rounded(times[n] / bound) for n in others}
        if loop is not None:
            rate = operations / times["ours"]
            kept["share of peak"] = rounded(rate * times["peak"] / loop.operations(1))
    return kept


def shared(variant: str, dim: int, dtype: str) -> dict[str, float]:
    """The micro-kernel's GFLOP/s, and the part of it that the matrix parts of each direction reach."""
    kept: dict[str, float] = {}
    for direction in linear_share.STEPS:
        parts = linear_share.parts(engine(variant, dim, dtype), direction)
        times = in_turns({"matrices": (parts.matrices, 1), "micro-kernel": (parts.micro_kernel, 1)})
        rates = {n: getattr(parts, n.replace("-", "_"))() / t for n, t in times.items()}
        kept["micro-kernel"] = rounded(rates["micro-kernel"] / 1e9)
        kept[f"{direction}: share"] = rounded(rates["matrices"] / rates["micro-kernel"])
    return kept


def long(variant: str, dtype: str) -> dict[str, float]:
    """Nanoseconds for a token and head at each length, and how far the process grew beyond what it returns."""
    kept: dict[str, float] = {}
    ours = engine(variant, 64, dtype)
    for tokens in LENGTHS:
        x = rows(variant, 64, dtype, tokens)
        run = untrained(ours, x)
        run()
        kept[f"ns for a token at {tokens}"] = rounded(
            1e9 * statistics.median(seconds(run) for _ in range(5)) / (tokens * HEADS)
        )
        forget_peak()
        before = peak_bytes()
        run()
        kept[f"MB beside o at {tokens}"] = rounded(max(0, peak_bytes() - before - x["v"].nbytes) / 1e6)
    return kept


def stepped(variant: str, dtype: str) -> dict[str, float]:
    """Microseconds of a step: H = 8, 64 x 64."""
    ours = engine(variant, 64, dtype)
    x = {n: t[:, 0] for n, t in rows(variant, 64, dtype, 1).items()}
    q, k, v, decay, beta = (x.get(n) for n in ("q", "k", "v", "decay", "beta"))
    state = torch.zeros(1, HEADS, 64, 64)

    def run() -> None:
        ours.step(q, k, v, decay, state, beta=beta)  # pyright: ignore[reportArgumentType]

    with torch.no_grad():
        run()
        found = statistics.median(seconds(run, 500) for _ in range(9))
    return {"microseconds": rounded(1e6 * found)}


def cases() -> dict[str, Callable[[], dict[str, float]]]:
    """Every case by its name."""
    found: dict[str, Callable[[], dict[str, float]]] = {}
    for variant in VARIANTS:
        for dim in DIMS:
            for dtype in DTYPES:
                found[f"{variant}, {dim} x {dim}, {dtype}"] = lambda v=variant, d=dim, t=dtype: compared(
                    v, d, t
                )
    for variant in ("none", "simple gla", "gated delta net"):
        for dim in DIMS:
            for dtype in DTYPES:
                found[f"share: {variant}, {dim} x {dim}, {dtype}"] = lambda v=variant, d=dim, t=dtype: shared(
                    v, d, t
                )
    for variant in ("simple gla", "kda"):
        found[f"long: {variant}, float32"] = lambda v=variant: long(v, "float32")
    for variant in VARIANTS:
        found[f"step: {variant}, float32"] = lambda v=variant: stepped(v, "float32")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="cases whose name matches")
    parser.add_argument("--table", action="store_true", help="no measurement: the table of what is there")
    parser.add_argument("--out", type=Path, default=RESULTS / f"linear-{datetime.date.today()}.json")
    given = parser.parse_args()
    torch.set_num_threads(1)
    known = json.loads(given.out.read_text()) if given.out.exists() else {"machine": {}, "cases": {}}
    for name, run in {} if given.table else cases().items():
        if not re.search(given.only, name):
            continue
        found = run()
        print(f"{name}: {found}", flush=True)
        known["cases"][name] = found
        known["machine"] = machine() | {"fla-core": linear_report.version("fla-core")} | {
            "transformers": linear_report.version("transformers")
        }  # fmt: skip
        given.out.write_text(json.dumps(known, indent=1) + "\n")
    written = linear_report.write(known, given.out.with_suffix(""))
    print(linear_report.markdown(known), f"written: {', '.join(map(str, written))}", sep="\n")


if __name__ == "__main__":
    main()

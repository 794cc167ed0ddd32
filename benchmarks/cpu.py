"""Speed on this machine's CPU, as ratios to other implementations of the same attention.

    ./run benchmark              the whole table (half an hour on two cores)
    ./run benchmark --quick      a part of it (two minutes)
    ./run benchmark --only 'window.*float32.*forward$'

For every case the contenders run in turns, round after round, and each round gives one ratio: the contender's time over
ours, above 1 where we are faster. Printed is the median over the rounds; the file under benchmarks/results has the
quartiles as well, and the machine. No times are kept: they say more about a machine than about a program.

Contenders: `sdpa`, PyTorch's scaled_dot_product_attention, with a mask tensor made beforehand where the pattern
needs one; `flex`, torch.compile of flex_attention, forward only because it has no backward on a CPU; `eager`, the
formula in plain PyTorch operators. A dash: that contender cannot compute the case.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from attn_engine import AttentionEngine, meta_tensor

BATCH, HEADS = 1, 8
CONTENDERS = ("sdpa", "flex", "eager")
Run = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Pattern:
    """A score_mod and a mask_mod in the form that flex_attention and attn_engine both take; sdpa: can it do this?"""

    score_mod: Callable[..., Any] | None = None
    mask_mod: Callable[..., Any] | None = None
    sdpa: bool = True


@dataclass(frozen=True, slots=True)
class Case:
    """One line of the table."""

    pattern: str
    dtype: torch.dtype
    length: int
    dim: int
    backward: bool

    def __str__(self) -> str:
        direction = "forward+backward" if self.backward else "forward"
        return f"{self.pattern} {str(self.dtype)[6:]} S={self.length} D={self.dim} {direction}"


def pattern(name: str, length: int) -> Pattern:
    slopes = 2.0 ** -torch.arange(1.0, HEADS + 1)
    ends = torch.tensor([0.05, 0.2, 0.3, 0.55, 0.6, 0.85]) * length
    document = torch.bucketize(torch.arange(length).float(), ends).int()

    def causal(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return kv_idx <= q_idx

    def window(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return (kv_idx <= q_idx) & (q_idx - kv_idx < 512)

    def same_document(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return document[q_idx] == document[kv_idx]

    def soft_cap(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return 20 * torch.tanh(score / 20)

    def alibi(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return score - slopes[h] * (q_idx - kv_idx)

    return {
        "full": Pattern(),
        "causal": Pattern(mask_mod=causal),
        "window 512": Pattern(mask_mod=window),
        "documents": Pattern(mask_mod=same_document),
        "soft-cap": Pattern(soft_cap, causal, sdpa=False),
        "alibi": Pattern(alibi, causal),
    }[name]


def table(quick: bool) -> list[Case]:
    names = ("full", "causal", "window 512", "documents", "soft-cap", "alibi")
    dtypes, lengths, dims = (torch.float32, torch.bfloat16), (1024, 4096), (64, 128)
    cases = [Case(*c) for c in product(names, dtypes, lengths, dims, (False, True))]
    return [c for c in cases if c.length == 1024 and c.dim == 64] if quick else cases


# ---- the contenders: each gives a function of q, k, v (batch, heads, length, dim)


def indices(length: int) -> tuple[Tensor, ...]:
    sizes = (BATCH, HEADS, length, length)
    return tuple(
        torch.arange(n).reshape([-1 if i == j else 1 for j in range(4)]) for i, n in enumerate(sizes)
    )


def ours(case: Case, p: Pattern) -> Callable[..., Any]:
    meta = (meta_tensor(None, None, None, case.dim, dtype=case.dtype),) * 3
    return AttentionEngine(meta, p.score_mod, mask_mod=p.mask_mod, layout="bhsd", scale=case.dim**-0.5)


def sdpa(case: Case, p: Pattern) -> Callable[..., Any] | None:
    if not p.sdpa:
        return None
    if case.pattern in ("full", "causal"):
        return functools.partial(F.scaled_dot_product_attention, is_causal=case.pattern == "causal")
    index = indices(case.length)
    mask: Tensor = p.mask_mod(*index) if p.mask_mod else torch.ones(1, 1, 1, 1, dtype=torch.bool)
    if p.score_mod is not None:
        bias: Tensor = p.score_mod(torch.zeros(1, 1, case.length, case.length), *index)
        mask = bias.masked_fill(~mask, -math.inf).to(case.dtype)
    return functools.partial(F.scaled_dot_product_attention, attn_mask=mask)


def flex(case: Case, p: Pattern) -> Callable[..., Any] | None:
    if case.backward:
        return None
    n = case.length
    block_mask = create_block_mask(p.mask_mod, None, None, n, n, device="cpu") if p.mask_mod else None
    return functools.partial(torch.compile(flex_attention), score_mod=p.score_mod, block_mask=block_mask)


def eager(case: Case, p: Pattern) -> Callable[..., Any]:
    index = indices(case.length)
    mask = None if p.mask_mod is None else ~p.mask_mod(*index)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        score = (q @ k.transpose(-1, -2)).float() * case.dim**-0.5
        score = score if p.score_mod is None else p.score_mod(score, *index)
        score = score if mask is None else score.masked_fill(mask, -math.inf)
        return torch.softmax(score, -1).to(v.dtype) @ v

    return attention


def runs_of(case: Case, with_flex: bool) -> dict[str, Run]:
    """What one call of each contender is, on the same tensors."""
    p = pattern(case.pattern, case.length)
    q, k, v, d_out = torch.randn(4, BATCH, HEADS, case.length, case.dim).to(case.dtype).unbind(0)
    functions = {"ours": ours(case, p), "sdpa": sdpa(case, p), "eager": eager(case, p)}
    if with_flex:
        functions["flex"] = flex(case, p)

    def forward(function: Callable[..., Any]) -> object:
        with torch.no_grad():
            return function(q, k, v)

    def both(function: Callable[..., Any]) -> object:
        inputs = [t.detach().requires_grad_() for t in (q, k, v)]
        return torch.autograd.grad(function(*inputs), inputs, d_out)

    one = both if case.backward else forward
    return {name: functools.partial(one, f) for name, f in functions.items() if f is not None}


# ---- measuring


def seconds(run: Run, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - start) / repeats


def measure(runs: dict[str, Run], rounds: int) -> dict[str, list[float]]:
    """Per contender, the quartiles over the rounds of its time divided by ours."""
    repeats = {}
    for name, run in runs.items():
        run()  # compiles, and warms up
        repeats[name] = max(1, min(50, round(0.05 / seconds(run, 1))))
    ratios: dict[str, list[float]] = {name: [] for name in runs if name != "ours"}
    for _ in range(rounds):
        times = {name: seconds(run, repeats[name]) for name, run in runs.items()}
        for name, values in ratios.items():
            values.append(times[name] / times["ours"])
    return {name: [round(x, 3) for x in statistics.quantiles(values, n=4)] for name, values in ratios.items()}


def machine() -> dict[str, object]:
    information = Path("/proc/cpuinfo")
    text = information.read_text() if information.exists() else ""
    models = re.findall(r"model name\s*: (.*)", text)
    compiler = os.environ.get("CXX", "c++")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    return {
        "processor": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load before": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "compiler": version.splitlines()[0] if version else "none",
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="length 1024 and dimension 64 only, without flex"
    )
    parser.add_argument("--only", default="", help="regular expression that a case's name must match")
    parser.add_argument(
        "--flex", action=argparse.BooleanOptionalAction, help="compile flex_attention: 10 to 20 s a case"
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--output", type=Path, help="the result's path; default: benchmarks/results/cpu-DATE.json"
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    with_flex = not options.quick if options.flex is None else options.flex
    warnings.filterwarnings("ignore", module="torch")
    described = machine()
    print(*(f"{key}: {value}" for key, value in described.items()), sep="\n")
    print(
        f"\ntime of each over ours (above 1: attn_engine is faster)\n{'':52}"
        + "".join(f"{c:>9}" for c in CONTENDERS)
    )
    name = f"cpu-{described['date']!s:.10}{'-quick' * options.quick}.json"
    path: Path = options.output or Path(__file__).parent / "results" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    results: list[dict[str, Any]] = []
    for case in table(options.quick):
        if not re.search(options.only, str(case)):
            continue
        torch.manual_seed(0)
        torch.compiler.reset()
        ratios = measure(runs_of(case, with_flex), options.rounds)
        cells = (f"{ratios[name][1]:9.2f}" if name in ratios else f"{'-':>9}" for name in CONTENDERS)
        print(f"{case!s:52}" + "".join(cells), flush=True)
        results.append({"case": str(case), "ratio quartiles": ratios})
        # After every case, so that a run that is cut off keeps what it measured.
        path.write_text(json.dumps({"machine": described, "results": results}, indent=1) + "\n")
    print(f"\nwritten to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Serving on the CPU: keys in pages against keys in rows, decoding with mods against plain softmax, latent attention.

    python -m benchmarks.serving                        everything on one thread (six minutes)
    python -m benchmarks.serving --only 'paged.*float32'
    python -m benchmarks.serving --report               no measurement: the page of what is there

Contenders run in turns, round after round; each round gives a ratio to the base; printed are medians. paged: time over
that of the same keys in a batch with lengths. mods: time over plain softmax. mla: times over ours of SDPA (on copies
whose heads are made beforehand) and of ours with values in memory of their own, and our share of the rate of the
multiply-add loop that benchmarks/peak.py measures. One thread is measured in processor time.
"""

from __future__ import annotations

import argparse
import datetime
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from attn_engine import AttentionEngine, meta_tensor
from attn_engine.library import AttentionLibrary, alibi_slopes, flash_mla_with_kvcache
from benchmarks.measure import Contender, Outcome, measure
from benchmarks.peak import peak
from benchmarks.results import FOLDER, ResultNotUsable, Results, commit, go_on, machine

DIM, KEYS = 128, 16384
PAGES = (16, 64, 256)
HEADS = ((8, 8), (32, 8))
DTYPES = ("float32", "bfloat16")
LATENT, VALUES = 576, 512
LATENT_HEADS = (1, 8, 16, 64, 128)
LATENT_KEYS = 4096


@dataclass(frozen=True, slots=True)
class Case:
    """One measurement. name: rows of a page, the name of a mod, or how the cache of latent attention lies."""

    part: str
    name: str
    dtype: str
    heads: int
    kv_heads: int
    keys: int

    def __str__(self) -> str:
        return f"{self.part} {self.name} {self.dtype} H={self.heads}/{self.kv_heads} keys={self.keys}"

    @property
    def kind(self) -> torch.dtype:
        return getattr(torch, self.dtype)


def cases() -> Iterator[Case]:
    for page, dtype, (heads, kv_heads) in product(PAGES, DTYPES, HEADS):
        yield Case("paged", str(page), dtype, heads, kv_heads, KEYS)
    for name, dtype, (heads, kv_heads) in product(mods(1), DTYPES, HEADS):
        yield Case("mods", name, dtype, heads, kv_heads, KEYS)
    for name, dtype, heads in product(("rows", "pages of 64"), DTYPES, LATENT_HEADS):
        yield Case("mla", name, dtype, heads, 1, LATENT_KEYS)


# -- keys in pages


def in_pages(x: torch.Tensor, page: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The memory of rows (sequences, keys, heads, dim) as a cache of pages, and a table that takes them in no order.

    The same memory: where a tensor lies makes as much of a difference as what is measured.
    """
    sequences, keys = x.shape[:2]
    order = torch.randperm(sequences * keys // page, generator=torch.Generator().manual_seed(7))
    return x.view(-1, page, *x.shape[2:]), order.view(sequences, -1).to(torch.int32)


def rows(case: Case) -> tuple[torch.Tensor, ...]:
    shapes = ((1, 1, case.heads, DIM), *[(1, case.keys, case.kv_heads, DIM)] * 2)
    return tuple(torch.randn(shape).to(case.kind) for shape in shapes)


def paged(case: Case) -> dict[str, Contender]:
    q, k, v = rows(case)
    engine = AttentionEngine([meta_tensor(None, None, None, DIM, dtype=case.kind)] * 3, backend="cpu")
    lengths = torch.tensor([case.keys])
    (k_cache, table), (v_cache, _) = (in_pages(x, int(case.name)) for x in (k, v))
    return {
        "rows": Contender(lambda: engine(q, k, v, len_kv=lengths)),
        "pages": Contender(lambda: engine(q, k_cache, v_cache, block_table=table, len_kv=lengths)),
    }


# -- mods


def mods(heads: int) -> dict[str, Callable[[], AttentionLibrary]]:
    """Attentions whose queries are the last ones of their sequences."""

    def library(attention: str, mask: str = "Causal", **given: Any) -> Callable[[], AttentionLibrary]:
        return lambda: AttentionLibrary(attention, mask, "Decode", backend="cpu", **given)

    return {
        "alibi": library("AlibiAttention", slopes=alibi_slopes(heads)),
        "soft-cap": library("SoftCapAttention", cap=30.0),
        "relative bias": library("RelativeBiasAttention", bias=torch.randn(heads, 2 * KEYS - 1)),
        "window of all": library("SoftmaxAttention", "SlidingWindow", window=KEYS),
        "softmax plus one": library("SoftmaxPlusOneAttention"),
        "sigmoid": library("SigmoidAttention"),
        "relu": library("ReluAttention"),
        "retention": library("RetentionAttention", heads=heads),
    }


def with_mod(case: Case) -> dict[str, Contender]:
    tensors = rows(case)
    plain = AttentionLibrary("SoftmaxAttention", "Causal", "Decode", backend="cpu")
    changed = mods(case.heads)[case.name]()
    return {
        "plain softmax": Contender(lambda: plain(*tensors)),
        case.name: Contender(lambda: changed(*tensors)),
    }


# -- latent attention


def latent(case: Case) -> dict[str, Contender]:
    q = torch.randn(1, 1, case.heads, LATENT).to(case.kind)
    cache, table = torch.randn(1, case.keys, 1, LATENT).to(case.kind), None
    own = cache[..., :VALUES].clone()
    lengths, scale = torch.tensor([case.keys], dtype=torch.int32), 192**-0.5
    keys = cache
    if case.name != "rows":
        page = int(case.name.rsplit(" ", 1)[1])
        (cache, table), (own, _) = (in_pages(x, page) for x in (cache, own))
    given: dict[str, Any] = {"len_kv": lengths} | ({} if table is None else {"block_table": table})
    metas = [meta_tensor(None, None, None, d, dtype=case.kind) for d in (LATENT, LATENT, VALUES)]
    apart = AttentionEngine(metas, scale=scale, backend="cpu")
    heads_first = q.transpose(1, 2)
    k = keys.transpose(1, 2).expand(-1, case.heads, -1, -1)
    found = {
        "ours": Contender(
            lambda: flash_mla_with_kvcache(q, cache, table, lengths, VALUES, softmax_scale=scale)
        ),
        "values of their own": Contender(lambda: apart(q, cache, own, **given)),
        "SDPA": Contender(
            lambda: F.scaled_dot_product_attention(heads_first, k, k[..., :VALUES], scale=scale)
        ),
    }
    loop, threads = peak(case.dtype), torch.get_num_threads()
    if loop is not None:
        flops = 2.0 * case.heads * case.keys * (LATENT + VALUES)
        found["peak"] = Contender(lambda: loop.run(threads), weight=flops / loop.operations(threads))
    return found


# -- the command

PARTS: dict[str, tuple[Callable[[Case], dict[str, Contender]], str]] = {
    "paged": (paged, "rows"),
    "mods": (with_mod, "plain softmax"),
    "mla": (latent, "ours"),
}
ABOUT = {
    "paged": "Decoding, one sequence: time over that of the same keys in a batch with lengths.",
    "mods": "Decoding with a mod: time over plain softmax.",
    "mla": "Latent attention 576/512, one query: times over ours; peak: our share of the multiply-add loop's rate.",
}


def line(case: Case, outcome: Outcome) -> str:
    ratios = ", ".join(f"{name} {middle:.2f}" for name, (_, middle, _) in outcome.ratios.items())
    return f"{case!s:<58} {ratios}"


def page(results: Results) -> str:
    """Everything that was measured, a table for each part."""
    m = results.machine
    lines = [
        "# Serving on the CPU",
        "",
        f"{m['processor']}, {m['threads']} thread(s), {m['date']}, {m['commit']}",
    ]
    for part in PARTS:
        entries = results.of_part(part)
        if not entries:
            continue
        names = list(dict.fromkeys(n for e in entries for n in e["ratios"]))
        names = names if part == "mla" else ["ratio"]
        head = ["case", "seconds", *names]
        lines += ["", f"## {part}", "", ABOUT[part], "", f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
        for e in entries:
            found = e["ratios"] if part == "mla" else {"ratio": next(iter(e["ratios"].values()))}
            cells = (f"{found[n][1]:.2f}" if n in found else "" for n in names)
            seconds = e["seconds"][PARTS[part][1]]
            lines.append(f"| {Case(**e['case'])} | {seconds:.3g} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="cases whose name matches, such as 'paged 16'")
    parser.add_argument("--report", action="store_true", help="no measurement: the page of what is there")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=FOLDER / f"serving-{datetime.date.today()}.json")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    clock = time.process_time if given.threads == 1 else time.perf_counter
    try:
        results = go_on(given.output, machine()) if given.output.exists() else Results(machine())
    except ResultNotUsable as problem:
        print(problem)
        return 1
    chosen = [] if given.report else [c for c in cases() if re.search(given.only, str(c))]
    if chosen:
        command = shlex.join(["python", "-m", "benchmarks.serving", *sys.argv[1:]])
        results.commands.append(f"{command}  # {commit()}")
    for case in chosen:
        make, base = PARTS[case.part]
        with torch.no_grad():
            outcome = measure(make(case), base, given.rounds, clock)
        results.add(case, outcome)
        results.save(given.output)
        print(line(case, outcome), flush=True)
    given.output.with_suffix(".md").write_text(page(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())

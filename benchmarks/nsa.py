"""Native sparse attention on the CPU against our own dense causal attention, torch that gathers, and its own parts.

    python -m benchmarks.nsa [--threads N] [--only 'dense, 16384'] [--rounds 3] [--output FILE]

16 heads of 64 over one kv head, float32, l = 32, d = 16, l' = 64, n = 16, w = 512, on random tensors: what is
selected differs from token to token, which is the hardest for the kernels. A call is forward and backward, from q,
k, v and gates to their gradients, selection and lists included. "dense": our own causal attention of the same
tensors. "torch": the same NSA in plain torch, which gathers the selected tokens and those of the window, for 2048
queries at a time, forward and backward, so that memory holds them; both select the same blocks up to ties.
"selection": what finding the blocks costs of the attention to them, forward. "parts":
milliseconds of each, alone. One thread is measured in processor time. Freed memory is kept in the process (see
benchmarks/sparse.py).
"""

from __future__ import annotations

import argparse
import datetime
import re
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from attn_engine import AttentionEngine, meta_tensor
from attn_engine.library import causal, mean_pooling, native_sparse_attention
from attn_engine.library.nsa.attention import compressed_pair
from attn_engine.library.nsa.branches import over_blocks, over_selected, over_window
from attn_engine.library.nsa.selection import selected
from attn_engine.library.nsa.sequences import sequences_of
from attn_engine.library.nsa.sizes import Compression, Sizes
from benchmarks.measure import OtherWork, quartiles, rounded
from benchmarks.results import FOLDER, ResultNotUsable, Results, commit, go_on, machine
from benchmarks.sparse import keep_freed_memory

HEADS, DIM = 16, 64
SIZES = Sizes(Compression(32, 16), 64, 16, 512)
SCALE = DIM**-0.5
TARGETS = {
    ("dense", 16384): 2.5,
    ("dense", 32768): 4.0,
    **{("torch", n): 10.0 for n in (2048, 4096, 8192, 16384)},
}
AT_ONCE = 2048  # queries whose gathered tokens torch holds: 2.4 GB with their gradients
Run = Callable[[], object]
Clock = Callable[[], float]


@dataclass(frozen=True, slots=True)
class Case:
    part: str
    length: int

    def __str__(self) -> str:
        return f"{self.part}, {self.length}"


@dataclass(frozen=True, slots=True)
class Found:
    """ratios: quartiles, above 1 ours is faster; of the selection, its attention over it. seconds: medians."""

    ratios: dict[str, list[float]]
    seconds: dict[str, float]
    others: float | None


CASES = (
    *(Case("dense", n) for n in (8192, 16384, 32768)),
    *(Case("torch", n) for n in (2048, 4096, 8192, 16384)),
    *(Case("selection", n) for n in (8192, 16384, 32768)),
    *(Case("parts", n) for n in (8192, 16384)),
)


def drawn(length: int) -> list[Tensor]:
    """q, k, v and three gates."""
    q, k, v = (torch.randn(1, length, heads, DIM) for heads in (HEADS, 1, 1))
    return [q, k, v, *(torch.rand(1, length, HEADS) for _ in range(3))]


def both_ways(call: Callable[..., Tensor], inputs: list[Tensor]) -> Run:
    """Forward and backward."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    weights = torch.randn_like(inputs[0])
    return lambda: torch.autograd.grad(call(*leaves), leaves, weights)


def ours(*inputs: Tensor) -> Tensor:
    o = native_sparse_attention(*inputs, backend="cpu")
    assert isinstance(o, Tensor)
    return o


def dense(engine: AttentionEngine, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return engine(q, k, v)


def causal_engine() -> AttentionEngine:
    metas = [meta_tensor(None, None, None, DIM, dtype=torch.float32)] * 3
    return AttentionEngine(metas, mask_mod=causal(), backend="cpu")


def in_pieces(inputs: list[Tensor]) -> Run:
    """Forward and backward of `gathering`; each piece of the queries is done before the next one begins."""
    q, k, v, *gates = (x.clone().requires_grad_() for x in inputs)
    weights = torch.randn_like(inputs[0])

    def run() -> list[Tensor]:
        total = [torch.zeros_like(x) for x in (q, k, v, *gates)]
        for start in range(0, q.shape[1], AT_ONCE):
            part = slice(start, start + AT_ONCE)
            leaves = [q[:, part].detach().requires_grad_(), k, v]
            leaves += [g[:, part].detach().requires_grad_() for g in gates]
            o = gathering(torch.arange(q.shape[1])[part], *leaves)
            found = torch.autograd.grad(o, leaves, weights[:, part])
            for i, (x, d) in enumerate(zip(total, found, strict=True)):
                if i in (1, 2):
                    x += d
                else:
                    x[:, part] = d
        return total

    return run


def gathering(at: Tensor, q: Tensor, k: Tensor, v: Tensor, *gates: Tensor) -> Tensor:
    """NSA as one writes it in torch, of queries at the positions `at`: one kv head, tokens gathered for every query."""
    length, size = k.shape[1], SIZES.selection_block
    k_cmp, v_cmp = (x[0, :, 0].unfold(0, 32, 16).mean(-1) for x in (k, v))
    complete = torch.arange(len(k_cmp)) * 16 + 31 <= at[:, None]
    o_cmp, weights = attended(q[0] @ k_cmp.T * SCALE, complete, v_cmp)
    with torch.no_grad():
        blocks = chosen(weights.sum(1), at, length)
    tokens = (blocks[..., None] * size + torch.arange(size)).flatten(1)
    seen = (blocks.repeat_interleave(size, 1) >= 0) & (tokens <= at[:, None])
    recent = at[:, None] - torch.arange(SIZES.window)
    outs = [o_cmp]
    for which, keep in ((tokens, seen), (recent, recent >= 0)):
        keys, values = (x[0, :, 0][which.clamp(0, length - 1)] for x in (k, v))
        score = torch.einsum("thd,tud->thu", q[0], keys) * SCALE
        share = score.masked_fill(~keep[:, None], -torch.inf).softmax(-1)
        outs.append(torch.einsum("thu,tud->thd", share, values))
    return sum((o * g[0, ..., None] for o, g in zip(outs, gates, strict=True)), torch.zeros(()))[None]


def attended(score: Tensor, keep: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    weights = score.masked_fill(~keep[:, None], -torch.inf).softmax(-1).nan_to_num(0.0)
    return weights @ values, weights


def chosen(weights: Tensor, at: Tensor, length: int) -> Tensor:
    """(queries, n) of weights (queries, compressed blocks): what is most important, -1 for none."""
    size, step = SIZES.selection_block, SIZES.selection_block // 16
    count = -(-length // size)
    taps = torch.nn.functional.pad(weights, (1, count * step - weights.shape[1]))
    importance = sum(
        (w * taps[:, o : o + count * step : step] for o, w in enumerate((1.0, 2.0, 2.0, 2.0, 1.0))),
        torch.zeros(()),
    )
    own, block = at[:, None] // size, torch.arange(count)
    importance = importance.masked_fill((block == 0) | (block == own) | (block == own - 1), torch.inf)
    most = importance.masked_fill(block > own, -torch.inf).topk(min(SIZES.selected_blocks, count))
    return torch.where(most.values > -torch.inf, most.indices, -1)


def parts(length: int) -> dict[str, Run]:
    """What a call is made of, forward, each alone; those that are measured backward too are `both_ways`."""
    q, k, v, *_ = drawn(length)
    sequences, compression = sequences_of(q, length, None), SIZES.compression
    rows = compressed_pair(k, v, (mean_pooling, mean_pooling), None, sequences, compression)
    _, lse = over_blocks(q, rows, sequences, compression, SCALE, "cpu")
    n, size = SIZES.selected_blocks, SIZES.selection_block
    find = partial(selected, q, rows[0], lse, sequences, compression, size, n, SCALE, "cpu")
    found = find()

    def of_blocks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return over_blocks(q, (k, v), sequences, compression, SCALE, "cpu")[0]

    def of_selected(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # A copy: lists of indices that were seen before would be remembered.
        return over_selected(q, (k, v), found.clone(), sequences, size, SCALE, "cpu")

    def of_window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return over_window(q, (k, v), sequences, SIZES.window, SCALE, "cpu")

    whole = partial(dense, causal_engine())
    calls = {"compressed": of_blocks, "selected": of_selected, "window": of_window, "dense": whole}
    runs: dict[str, Run] = {"selection": find}
    for name, call in calls.items():
        given = [q, *rows] if name == "compressed" else [q, k, v]
        runs[f"{name}, forward"] = partial(without_gradients, call, given)
        runs[f"{name}, both"] = both_ways(call, given)
    return runs


def without_gradients(call: Callable[..., Tensor], inputs: list[Tensor]) -> object:
    with torch.no_grad():
        return call(*inputs)


def contenders(case: Case) -> dict[str, Run]:
    """The base first: what the others' times are divided by."""
    match case.part:
        case "dense":
            inputs = drawn(case.length)
            other = both_ways(partial(dense, causal_engine()), inputs[:3])
            return {"ours": both_ways(ours, inputs), "dense": other}
        case "torch":
            inputs = drawn(case.length)
            return {"ours": both_ways(ours, inputs), "torch": in_pieces(inputs)}
        case "selection":
            runs = parts(case.length)
            return {"selection": runs["selection"], "its attention": runs["selected, forward"]}
        case _:
            return parts(case.length)


def measured(case: Case, rounds: int, clock: Clock) -> Found:
    for run in contenders(Case(case.part, min(case.length, 1024))).values():
        run()  # compiles
    runs = contenders(case)
    times: dict[str, list[float]] = {name: [] for name in runs}
    others = OtherWork()
    for turn in range(rounds + 1):
        if turn == 0 and case.length > 16384:
            continue  # too long to be done for nothing
        for name, run in runs.items():
            start = clock()
            run()
            if turn:
                times[name].append(clock() - start)
    base, *rest = times
    ratios = {
        name: quartiles([x / y for x, y in zip(times[name], times[base], strict=True)])
        for name in rest
        if case.part != "parts"
    }
    seconds = {name: rounded(sorted(x)[len(x) // 2]) for name, x in times.items()}
    return Found(ratios, seconds, others.cores())


def line(case: Case, found: Found) -> str:
    times = ", ".join(f"{name} {1e3 * t:.1f} ms" for name, t in found.seconds.items())
    if case.part == "parts":
        return f"{case}: {times}"
    target = TARGETS.get((case.part, case.length), 1.0)
    said = ", ".join(f"{low:.2f} {mid:.2f} {high:.2f}" for low, mid, high in found.ratios.values())
    return f"{case}: {said} (target {target}); {times}; others kept {found.others} of a core busy"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="cases whose name matches, such as 'dense, 16384'")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=FOLDER / f"nsa-{datetime.date.today()}.json")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    clock = time.process_time if given.threads == 1 else time.perf_counter
    try:
        results = go_on(given.output, machine()) if given.output.exists() else Results(machine())
    except ResultNotUsable as problem:
        print(problem)
        return 1
    results.machine["freed memory"] = "kept" if keep_freed_memory() else "as the system likes"
    command = shlex.join(["python", "-m", "benchmarks.nsa", *sys.argv[1:]])
    results.commands.append(f"{command}  # {commit()}")
    for case in (c for c in CASES if re.search(given.only, str(c))):
        found = measured(case, given.rounds, clock)
        results.add(case, found)
        results.save(given.output)
        print(line(case, found), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""DeepSeek's sparse attention on the CPU: a step of decoding over chosen tokens against one over all of them.

    python -m benchmarks.dsa [--threads N] [--dtype float32] [--tokens 65536] [--repeats 7] [--save NAME]

Absorbed latent attention, 128 heads, keys of 576 numbers of which 512 are the values, 2048 chosen tokens, an indexer
of 64 heads of 128 numbers. Medians of interleaved runs in one process; ratios are to the dense step. One thread is
measured in processor time, which a busy machine disturbs less. --save writes benchmarks/results/NAME.json and NAME.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from attn_engine.library import (
    flash_mla_with_kvcache,
    lightning_indexer,
    sparse_attention,
    sparse_flash_attention,
)

HEADS, LATENT, ROPE, CHOSEN, INDEX_HEADS, INDEX_DIM, PAGE = 128, 512, 64, 2048, 64, 128, 64
SCALE = (LATENT + ROPE) ** -0.5
RESULTS = Path(__file__).parent / "results"


def calls(tokens: int, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """What is measured, by name; the first is the dense step."""
    q, kv = (
        torch.randn(1, 1, HEADS, LATENT + ROPE).to(dtype),
        torch.randn(1, tokens, 1, LATENT + ROPE).to(dtype),
    )
    latent, rope = (x.contiguous() for x in kv.split((LATENT, ROPE), 3))
    q_latent, q_rope = q.split((LATENT, ROPE), 3)
    lengths = torch.tensor([tokens], dtype=torch.int32)
    table = torch.randperm(tokens // PAGE).to(torch.int32)[None]
    in_pages = [x.view(-1, PAGE, 1, x.shape[3]) for x in (kv, latent, rope)]
    index_q, index_k = torch.randn(1, 1, INDEX_HEADS, INDEX_DIM), torch.randn(1, tokens, 1, INDEX_DIM)
    index_q, index_k, weights = index_q.to(dtype), index_k.to(dtype), torch.randn(1, 1, INDEX_HEADS)
    chosen = lightning_indexer(index_q, index_k, weights, sparse_count=CHOSEN)

    def both() -> object:
        found = lightning_indexer(index_q, index_k, weights, sparse_count=CHOSEN)
        return sparse_attention(q, kv, found, dim_v=LATENT, sm_scale=SCALE)

    def two_caches() -> object:
        return sparse_flash_attention(
            q_latent, in_pages[1], in_pages[1], chosen, SCALE, block_table=table,
            actual_seq_lengths_kv=lengths, query_rope=q_rope, key_rope=in_pages[2],
        )  # fmt: skip

    return {
        "all tokens": lambda: flash_mla_with_kvcache(q, kv, None, lengths, LATENT, softmax_scale=SCALE),
        "chosen tokens": lambda: sparse_attention(q, kv, chosen, dim_v=LATENT, sm_scale=SCALE),
        "chosen tokens, in pages": lambda: sparse_attention(
            q, in_pages[0], chosen, dim_v=LATENT, sm_scale=SCALE, block_table=table, len_kv=lengths
        ),
        "chosen tokens, two caches in pages": two_caches,
        "indexer": lambda: lightning_indexer(index_q, index_k, weights, sparse_count=CHOSEN),
        "indexer and chosen tokens": both,
    }


def interleaved(
    named: dict[str, Callable[[], object]], repeats: int, clock: Callable[[], float]
) -> dict[str, float]:
    """The median seconds of each."""
    found: dict[str, list[float]] = {name: [] for name in named}
    with torch.no_grad():
        for call in named.values():
            call()
        for _ in range(repeats):
            for name, call in named.items():
                start = clock()
                call()
                found[name].append(clock() - start)
    return {name: statistics.median(times) for name, times in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--save", metavar="NAME")
    given = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(given.threads)
    clock = time.process_time if given.threads == 1 else time.perf_counter
    seconds = interleaved(calls(given.tokens, getattr(torch, given.dtype)), given.repeats, clock)
    dense = seconds["all tokens"]
    title = f"A step of decoding, {given.tokens} tokens, {given.dtype}, {given.threads} threads"
    lines = [title, "", "| what | ms | times the dense step's speed |", "| --- | ---: | ---: |"]
    lines += [f"| {name} | {x * 1e3:.2f} | {dense / x:.1f} |" for name, x in seconds.items()]
    print("\n".join(lines))
    if given.save:
        record = {"title": title, "milliseconds": {name: x * 1e3 for name, x in seconds.items()}}
        RESULTS.joinpath(f"{given.save}.json").write_text(json.dumps(record, indent=1) + "\n")
        RESULTS.joinpath(f"{given.save}.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

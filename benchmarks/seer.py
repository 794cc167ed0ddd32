"""SeerAttention's functions on the CPU, each against our own dense causal kernel for the same tensors.

    python -m benchmarks.seer [--threads N] [--length 8192] [--repeats 5] [--only TEXT]

"of the bound" is the speed-up over dense times the share of the causal pairs that are kept: 1 would be work in
proportion to the pairs. Ratios are of medians of interleaved runs in one process. One thread is measured in processor
time, which a busy machine disturbs less.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from attn_engine import AttentionEngine, meta_tensor, with_pooled
from attn_engine.library import (
    OnlineSoftmax,
    attn_pooling,
    block_1d_gqa_sparse_attn_varlen_func,
    block_2d_sparse_attn_varlen_func,
    block_sparse_flash_decode_gqa_indice,
    block_sparse_flash_decode_gqa_mask,
    causal,
)
from benchmarks.packed import interleaved

HEADS, KV_HEADS, DIM, BLOCK = 8, 1, 64, 64
CACHE, DECODE_DIM = 32768, 128
SPARSITY = 0.9
Says = Literal["of the bound", "times the base", "times as fast"]


@dataclass(frozen=True, slots=True)
class Case:
    """Two calls to be compared; share: of the base's pairs that ours visits. target: what `value` shall reach."""

    name: str
    ours: Callable[[], object]
    base: Callable[[], object]
    says: Says
    target: float
    share: float = 1.0

    def value(self, ours: float, base: float) -> float:
        """What is reported of the seconds of both."""
        if self.says == "times the base":
            return ours / base
        return base / ours * (self.share if self.says == "of the bound" else 1.0)


def cases(length: int = 8192, dtype: torch.dtype = torch.float32, only: str = "") -> Iterator[Case]:
    """Each case when it is asked for, with its tensors, which are large; of the groups whose name has `only`."""
    inputs = [torch.randn(length, heads, DIM, dtype=dtype) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    dense = partial(_dense, _engine(dtype, DIM, DIM))
    one, two = block_1d_gqa_sparse_attn_varlen_func, block_2d_sparse_attn_varlen_func
    masked = partial(_over_blocks, inputs, dense)
    groups: dict[str, Callable[[str], Iterator[Case]]] = {
        "2D": lambda name: masked(name, two, rows_of_blocks(length), (0.8, 0.65)),
        "1D, runs of 16 queries": lambda name: masked(name, one, rows_of_queries(length, 16), (0.7, 0.5)),
        "1D, each query its own": lambda name: masked(name, one, rows_of_queries(length, 1), (0.35, 0.3)),
        "pooled": lambda name: _pooled(name, inputs, dense),
        f"decode, {CACHE} keys": lambda name: _decode(name, dtype),
    }
    for name, make in groups.items():
        if only in name:
            yield from make(name)


def rows_of_blocks(length: int) -> Tensor:
    """Random blocks of the past, with the block of the query itself. bool (1, heads, n, n)"""
    n = length // BLOCK
    return (torch.rand(1, HEADS, n, n) > SPARSITY) | torch.eye(n, dtype=torch.bool)


def rows_of_queries(length: int, run: int) -> Tensor:
    """Random blocks of the past for every `run` queries, with the own one. bool (1, kv heads, length, n)"""
    n = length // BLOCK
    rows = torch.rand(1, KV_HEADS, length // run, n) > SPARSITY
    own = torch.arange(length)[:, None] // BLOCK == torch.arange(n)
    return rows.repeat_interleave(run, 2) | own


def kept_pairs(mask: Tensor, length: int) -> float:
    """The share of the causal pairs that a mask of blocks keeps."""
    rows = length // mask.shape[2]
    seen = (torch.arange(length)[:, None] + 1 - torch.arange(mask.shape[3]) * BLOCK).clamp(0, BLOCK)
    return float((mask[0] * seen.view(-1, rows, mask.shape[3]).sum(1)).sum() / seen.sum() / mask.shape[1])


def _over_blocks(
    inputs: list[Tensor],
    dense: Callable[..., Tensor],
    name: str,
    function: Callable[..., Any],
    mask: Tensor,
    targets: tuple[float, float],
) -> Iterator[Case]:
    length = inputs[0].shape[0]
    cu_len = torch.tensor([0, length], dtype=torch.int32)

    def sparse(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        own = mask.view_as(mask)  # lists of a mask that was seen before would be remembered
        return function(q, k, v, cu_len, cu_len, length, DIM**-0.5, own, BLOCK)

    share = kept_pairs(mask, length)
    for way, make, target in zip(("forward", "backward"), (_forward, _backward), targets, strict=True):
        yield Case(f"{name}, {way}", make(sparse, inputs), make(dense, inputs), "of the bound", target, share)


def _pooled(name: str, inputs: list[Tensor], dense: Callable[..., Tensor]) -> Iterator[Case]:
    q, k, _ = inputs
    cu_len = torch.tensor([0, q.shape[0]], dtype=torch.int32)
    pooled = _engine(q.dtype, DIM, DIM, with_pooled(OnlineSoftmax(), max=BLOCK))

    def targets() -> object:
        return attn_pooling(q, k, cu_len, q.shape[0], DIM**-0.5, BLOCK)

    base = _forward(dense, inputs)
    yield Case(
        f"{name}: output and 1D", _forward(partial(_dense, pooled), inputs), base, "times the base", 1.3
    )
    yield Case(f"{name}: 1D and 2D alone", targets, base, "times the base", 1.3)


def _decode(name: str, dtype: torch.dtype) -> Iterator[Case]:
    q = torch.randn(1, HEADS, DECODE_DIM, dtype=dtype)
    k, v = (torch.randn(1, CACHE, KV_HEADS, DECODE_DIM, dtype=dtype) for _ in range(2))
    filled, n = torch.tensor([CACHE], dtype=torch.int32), CACHE // BLOCK
    engine = _engine(dtype, DECODE_DIM, DECODE_DIM, past=False)
    picked = torch.rand(1, KV_HEADS, n).argsort(-1)[..., : round(n * (1 - SPARSITY))].int()
    mask = torch.zeros(1, KV_HEADS, n, dtype=torch.bool).scatter_(-1, picked.long(), True)
    most = picked.shape[-1]

    def by_mask() -> object:
        return block_sparse_flash_decode_gqa_mask(q, k, v, filled, CACHE, mask, BLOCK)

    def by_indices() -> object:
        return block_sparse_flash_decode_gqa_indice(q, k, v, filled, CACHE, most, picked, BLOCK)

    base = partial(engine, q[:, None], k, v)
    yield Case(f"{name}, mask", by_mask, base, "times as fast", 4.0)
    yield Case(f"{name}, indices", by_indices, base, "times as fast", 4.0)


def _engine(dtype: torch.dtype, dim: int, dim_v: int, rule: Any = None, past: bool = True) -> AttentionEngine:
    metas = [meta_tensor(None, None, None, d, dtype=dtype) for d in (dim, dim, dim_v)]
    return AttentionEngine(metas, online_func=rule, mask_mod=causal() if past else None)


def _dense(engine: AttentionEngine, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return engine(q[None], k[None], v[None], return_final_rowscales=True)[0][0]


def _forward(call: Callable[..., Tensor], inputs: list[Tensor]) -> Callable[[], object]:
    def run() -> object:
        with torch.no_grad():
            return call(*inputs)

    return run


def _backward(call: Callable[..., Tensor], inputs: list[Tensor]) -> Callable[[], object]:
    leaves = [x.clone().requires_grad_() for x in inputs]
    o = call(*leaves)
    weights = torch.randn_like(o)
    return lambda: torch.autograd.grad(o, leaves, weights, retain_graph=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--only", default="", metavar="TEXT", help="groups of cases whose name has this")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    clock = time.process_time if given.threads == 1 else time.perf_counter
    print(f"{HEADS} heads, {KV_HEADS} kv heads, dim {DIM}, {given.dtype}, {given.length} queries, ", end="")
    print(f"{SPARSITY:.0%} sparse, {given.threads} thread(s)")
    for case in cases(given.length, getattr(torch, given.dtype), given.only):
        ours, base = interleaved([case.ours, case.base], given.repeats, clock)
        value = case.value(ours, base)
        print(
            f"{case.name:<34}{value:>7.2f} {case.says:<15} (target {case.target}; kept {case.share:.3f})",
            end="",
        )
        print(f"  {1e3 * ours:.1f} ms, dense {1e3 * base:.1f} ms", flush=True)


if __name__ == "__main__":
    main()

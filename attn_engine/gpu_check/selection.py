"""Selections: which candidates are taken, compared with float64, and their kernels compiled ahead of time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from attn_engine import CustomIO, Overlap, SelectionEngine, meta_tensor
from attn_engine.gpu_check.ahead import KernelsAhead
from attn_engine.gpu_check.checks import Failed, Place
from attn_engine.gpu_check.jobs import Comparison
from attn_engine.ir.program import Sequences
from attn_engine.runtime.aot_report import TARGETS, AotReport
from attn_engine.runtime.selection_triton import TritonSelection, options_for, schedule_for
from attn_engine.runtime.triton_aot import compile_ahead

# What importances of 16-bit elements, summed in float32, may differ from float64 by, as a part of the largest.
MARGIN = 1e-5


@dataclass(frozen=True, slots=True)
class Kind:
    """A selection by the weighed relu of every head; with `pool` by sums of scores, block 0 and the own one first.

    Queries are the last of the keys and see what is before them. whole: small whole numbers, of which all sums are
    exact and many are equal: the indices must be those of float64. lengths: of sequences, in pages where page.
    """

    name: str
    heads: int
    kv_heads: int
    dim: int
    rows: int
    lengths: tuple[int, ...]
    topk: int
    page: int = 0
    pool: Overlap | None = None
    whole: bool = True

    def small(self) -> Kind:
        """For an interpreter."""
        heads = min(self.heads // self.kv_heads, 3)
        lengths = tuple(n % 53 + 9 * (n > 0) for n in self.lengths[:2])
        pool = None if self.pool is None else Overlap(4, 2, 4)
        small = replace(self, heads=heads, kv_heads=1, dim=16, rows=2, lengths=lengths, topk=4, pool=pool)
        return replace(small, page=min(self.page, 16))


UNEVEN = (4097, 1, 0, 777, 8192)
NSA = Overlap(32, 16, 64)
KINDS = (
    Kind("an indexer, 2048 of 16384 keys", 64, 1, 128, 64, (16384,), 2048, whole=False),
    Kind("an indexer, pages of 64", 64, 1, 128, 2, UNEVEN, 512, 64),
    Kind("ties, groups of 3", 12, 4, 64, 300, (1000, 300), 64),
    Kind("blocks of native sparse attention", 16, 1, 64, 2048, (511,), 16, pool=NSA),
)


def weighed(score: Any, custom: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    """What an indexer sums over its heads."""
    return torch.relu(score) * custom.input_tensors["weights"][b, q_idx, h]


def engine_of(kind: Kind, backend: str, dtype: torch.dtype) -> SelectionEngine:
    pool, metas = kind.pool, [meta_tensor(None, None, None, kind.dim, dtype=dtype)] * 2
    if pool is None:
        shapes = CustomIO({"weights": ("batch", "seq_len", "heads"), "last": ("batch",)})

        def before(b: Any, h: Any, q_idx: Any, kv_idx: Any, custom: Any) -> Any:
            return kv_idx <= q_idx + custom.input_tensors["last"][b]

        return SelectionEngine(metas, weighed, before, shapes, backend=backend)
    length, stride, block = pool.length, pool.stride, pool.block

    def complete(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return kv_idx * stride + length - 1 <= q_idx

    def first_and_own(b: Any, h: Any, q_idx: Any, j: Any) -> Any:
        return (j == 0) | (j == q_idx // block)

    return SelectionEngine(
        metas, mask_mod=complete, pool=pool, forced_mod=first_and_own, scale=1.0, backend=backend
    )


@dataclass(frozen=True, slots=True)
class SelectionCheck(Comparison):
    """Indices of a call; what no sequence holds is NaN, and entries of a page table behind its end are -1."""

    kind: Kind
    place: Place
    heavy: bool = False

    @property
    def name(self) -> str:
        return f"selection: {self.kind.name}"

    def compare(self) -> str:
        small = self.place.small
        kind, dtype = (self.kind.small(), torch.float32) if small else (self.kind, torch.bfloat16)
        given = _drawn(kind, dtype, self.place.device)
        engine, q, cache = engine_of(kind, self.place.backend, dtype), given.pop("q"), given.pop("cache")
        keys = given.pop("keys")
        first, again = (engine(q, cache, topk=kind.topk, **given) for _ in range(2))
        if not torch.equal(first, again):
            raise Failed("another run gives other indices")
        rows = exact = 0
        for b in range(len(kind.lengths)):
            importance, forced = _importance(kind, q[b], keys[b], given.get("weights", q)[b], kind.lengths[b])
            exact += _compared(kind, first[b].transpose(0, 1), importance, forced)
            rows += importance.shape[0] * importance.shape[1]
        return f"{rows} rows, {exact} of them determined, twice the same"


def _drawn(kind: Kind, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """ "q", "keys" (sequences, longest, kv heads, dim), the "cache" they lie in, and what else a call is given."""
    generator = torch.Generator().manual_seed(7)
    n, longest = len(kind.lengths), max(kind.lengths)

    def numbers(*shape: int) -> Tensor:
        if kind.whole:
            return torch.randint(-2, 3, shape, generator=generator).to(dtype)
        return torch.randn(shape, generator=generator).to(dtype)

    q, keys = numbers(n, kind.rows, kind.heads, kind.dim), numbers(n, longest, kind.kv_heads, kind.dim)
    lengths = torch.tensor(kind.lengths, dtype=torch.int32)
    found: dict[str, Any] = {"q": q.to(device), "keys": keys.to(device)}
    inside = (torch.arange(longest) < lengths[:, None])[..., None, None]
    cache = torch.where(inside, keys, torch.nan)
    if kind.pool is None:
        weights = numbers(n, kind.rows, kind.heads).float().abs()
        found |= {"weights": weights.to(device), "last": (lengths - kind.rows).to(device)}
        found["len_kv"] = lengths.to(device)
    if kind.page:
        cache, table = _in_pages(cache, kind, generator)
        found["block_table"] = table.to(device)
    return {**found, "cache": cache.to(device)}


def _in_pages(keys: Tensor, kind: Kind, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The keys in pages in no order, and their table."""
    counts = [-(-n // kind.page) for n in kind.lengths]
    order = torch.randperm(sum(counts) + 3, generator=generator).tolist()
    table = torch.full((len(counts), max(counts) + 1), -1, dtype=torch.int32)
    cache = keys.new_full((sum(counts) + 3, kind.page, *keys.shape[2:]), torch.nan)
    for b, count in enumerate(counts):
        for j in range(count):
            table[b, j] = order.pop()
            rows = keys[b, j * kind.page : (j + 1) * kind.page]
            cache[table[b, j], : len(rows)] = rows
    return cache, table


def _importance(
    kind: Kind, q: Tensor, keys: Tensor, weights: Tensor, length: int
) -> tuple[Tensor, Tensor | None]:
    """Importances (kv heads, rows, candidates) of one sequence, -inf: no candidate; and which are taken in any case."""
    group = kind.heads // kind.kv_heads
    heads = keys[:length].double().repeat_interleave(group, 1)
    score = torch.einsum("qhd,khd->hqk", q.double(), heads)
    row, key = torch.arange(kind.rows, device=q.device)[:, None], torch.arange(length, device=q.device)
    if kind.pool is None:
        total = (score.relu() * weights.double().T[:, :, None]).unflatten(0, (kind.kv_heads, group)).sum(1)
        return total.masked_fill(key > row + length - kind.rows, -torch.inf), None
    pool = kind.pool
    seen = key * pool.stride + pool.length - 1 <= row
    total = torch.where(seen, score.unflatten(0, (kind.kv_heads, group)).sum(1), 0.0)
    j = torch.arange(pool.blocks(length), device=q.device)
    first, start = j * pool.block, key[:, None] * pool.stride
    shared = torch.minimum(start + pool.length, first + pool.block) - torch.maximum(start, first)
    segments = (shared.clamp(min=0) / pool.stride).double()
    there = seen.double() @ segments > 0
    return (total @ segments).masked_fill(~there, -torch.inf), (j == 0) | (j == row // pool.block)


def _compared(kind: Kind, found: Tensor, importance: Tensor, forced: Tensor | None) -> int:
    """How many rows had to be as they are; raises Failed. found: (kv heads, rows, topk)."""
    if forced is not None:
        importance = importance.masked_fill(forced, torch.inf)
    count = importance.shape[-1]
    there = found >= 0
    taken = torch.zeros((*importance.shape[:2], count + 1), dtype=torch.bool, device=found.device)
    taken.scatter_(2, torch.where(there, found, count).long(), True)
    taken, wanted = taken[..., :count], (importance > -torch.inf).sum(-1).clamp(max=kind.topk)
    ascending = (found[..., 1:] > found[..., :-1]) | ~there[..., 1:]
    if not (ascending.all() and torch.equal(taken.sum(-1), wanted) and torch.equal(there.sum(-1), wanted)):
        raise Failed("a row does not ascend, has the wrong length, or names what is no candidate")
    if not count:
        return importance.shape[0] * importance.shape[1]
    finite = importance[importance.isfinite()].abs()
    bound = 0.0 if kind.whole or not finite.numel() else MARGIN * float(finite.max())
    ranked = importance.sort(dim=-1, descending=True, stable=True)
    bar = ranked.values.gather(-1, (wanted - 1).clamp(min=0)[..., None])
    if (taken & (importance < bar - bound)).any() or (~taken & (importance > bar + bound)).any():
        raise Failed("what was taken is worse than what was not")
    if kind.whole:  # of equal ones the lowest
        best = torch.zeros_like(taken).scatter_(-1, ranked.indices[..., : kind.topk], True)
        if not torch.equal(taken, best & (importance > -torch.inf)):
            raise Failed("of equal candidates others than the lowest were taken")
        return importance.shape[0] * importance.shape[1]
    after = ranked.values.gather(-1, wanted.clamp(max=count - 1)[..., None])
    return int((bar - after > bound).sum())


@dataclass(frozen=True, slots=True)
class SelectionAhead(KernelsAhead):
    """Both kernels of a call in bfloat16."""

    kind: Kind
    target: str
    backend: str = "triton"
    heavy: bool = False

    @property
    def name(self) -> str:
        return f"selection: {self.kind.name}"

    def reports(self) -> Iterator[tuple[str, AotReport]]:
        program = engine_of(self.kind, "triton", torch.bfloat16).program
        if self.kind.page:
            program = program.with_sequences(Sequences(packed=False, page=self.kind.page))
        machine = TritonSelection(program)
        for kernel in machine.module(schedule_for(program, self.kind.heads // self.kind.kv_heads)).kernels:
            yield kernel.name, compile_ahead(kernel, machine.text(kernel), self.target, options_for(kernel))


def checks(backend: str, device: str, small: bool) -> list[SelectionCheck]:
    return [SelectionCheck(kind, Place(backend, device, small)) for kind in KINDS]


def ahead_jobs(targets: tuple[str, ...] = TARGETS) -> list[SelectionAhead]:
    return [SelectionAhead(kind, t) for kind in (KINDS[0], KINDS[1], KINDS[3]) for t in targets]

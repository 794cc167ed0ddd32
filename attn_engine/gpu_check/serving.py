"""Serving: keys in pages, keys in splits and latent attention, tried on the GPU and compiled ahead of time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from attn_engine import AttentionEngine, meta_tensor
from attn_engine.codegen.gpu_schedule import default_schedule
from attn_engine.codegen.pipeline import lower
from attn_engine.codegen.schedule import Schedule, short_query_schedule
from attn_engine.codegen.targets import target_named
from attn_engine.gpu_check.ahead import KernelsAhead, compiled
from attn_engine.gpu_check.checks import Failed, Place
from attn_engine.gpu_check.jobs import Comparison
from attn_engine.gpu_check.judge import judge
from attn_engine.ir.passes.pack_heads import Packing, pack_heads
from attn_engine.ir.program import Attention, Sequences
from attn_engine.ir.tile import Kernel
from attn_engine.runtime.aot_report import TARGETS, AotReport


@dataclass(frozen=True, slots=True)
class Kind:
    """A call: query rows of every sequence, the lengths of the sequences, rows of a page (0: keys in a batch). latent:
    values are the first columns of the keys. Few rows and long sequences have their keys in splits."""

    name: str
    heads: int
    kv_heads: int
    dims: tuple[int, int]
    rows: int
    lengths: tuple[int, ...]
    page: int = 0
    latent: bool = False

    def small(self) -> Kind:
        """For an interpreter."""
        dims = (48, 32) if self.latent else (16, 16)
        group = min(self.heads // self.kv_heads, 4)
        lengths = tuple(n % 61 for n in self.lengths[:3])
        return replace(self, heads=group, kv_heads=1, dims=dims, lengths=lengths, page=min(self.page, 16))


UNEVEN = (4097, 1, 0, 777, 8192)
KINDS = (
    Kind("decoding, keys in a batch", 32, 8, (128, 128), 1, UNEVEN),
    Kind("decoding, pages of 64", 32, 8, (128, 128), 1, UNEVEN, 64),
    Kind("decoding, pages of 16", 32, 8, (128, 128), 1, UNEVEN, 16),
    Kind("one long sequence in splits", 32, 8, (128, 128), 1, (65537,), 64),
    Kind("a chunk of a prefill, pages of 256", 16, 4, (128, 128), 300, UNEVEN, 256),
    Kind("latent attention, keys in a batch", 128, 1, (576, 512), 1, UNEVEN, 0, True),
    Kind("latent attention, pages of 64", 128, 1, (576, 512), 2, UNEVEN, 64, True),
    Kind("latent attention, 16 heads", 16, 1, (576, 512), 1, UNEVEN, 64, True),
)


@dataclass(frozen=True, slots=True)
class ServingCheck(Comparison):
    """Output and lse of a call against float64; what no sequence holds is NaN, and entries behind its end are -1."""

    kind: Kind
    place: Place
    heavy: bool = False

    @property
    def name(self) -> str:
        return f"serving: {self.kind.name}"

    def compare(self) -> str:
        small = self.place.small
        kind, dtype = (self.kind.small(), torch.float32) if small else (self.kind, torch.bfloat16)
        q, k, v, given = _drawn(kind, dtype, self.place.device)
        metas = [meta_tensor(None, None, None, d, dtype=dtype) for d in (*kind.dims[:1] * 2, kind.dims[1])]
        engine = AttentionEngine(metas, scale=kind.dims[0] ** -0.5, backend=self.place.backend)
        cache = {name: given.pop(name) for name in ("k", "v")}
        with torch.no_grad():
            o, rows = engine(q, cache["k"], cache["v"], return_final_rowscales=True, **given)
        exact, plain = (_dense(kind, q, k, v, of) for of in (torch.float64, dtype))
        verdicts = judge(dtype, {"o": o, "lse": rows["lse"]}, exact, plain)
        wrong = [x for x in verdicts if not x.ok]
        if wrong:
            raise Failed("; ".join(str(x) for x in wrong))
        return "part of the allowed error: " + ", ".join(f"{x.name} {x.worst:.2f}" for x in verdicts)


def _drawn(kind: Kind, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    """q, rows of keys and of values (sequences, longest, heads, dim), and what the call is given: "k" and "v" too."""
    generator = torch.Generator().manual_seed(11)
    n, longest = len(kind.lengths), max(kind.lengths)
    lengths = torch.tensor(kind.lengths, dtype=torch.int32)
    q, k, v = (
        torch.randn(shape, generator=generator).to(dtype)
        for shape in (
            (n, kind.rows, kind.heads, kind.dims[0]),
            (n, longest, kind.kv_heads, kind.dims[0]),
            (n, longest, kind.kv_heads, kind.dims[1]),
        )
    )
    inside = (torch.arange(longest) < lengths[:, None])[..., None, None]
    k, v = (torch.where(inside, x, torch.nan).to(device) for x in (k, v))
    given: dict[str, Any] = {"k": k, "v": v, "len_kv": lengths.to(device)}
    if kind.page:
        given |= _in_pages(k, v, kind, generator)
    if kind.latent:
        v = k[..., : kind.dims[1]]
        given["v"] = given["k"][..., : kind.dims[1]]
    return q.to(device), k, v, given


def _in_pages(k: Tensor, v: Tensor, kind: Kind, generator: torch.Generator) -> dict[str, Tensor]:
    """The same rows in pages in no order, and their table."""
    page, counts = kind.page, [-(-n // kind.page) for n in kind.lengths]
    order = torch.randperm(sum(counts) + 3, generator=generator).tolist()
    table = torch.full((len(counts), max(counts) + 1), -1, dtype=torch.int32)
    caches = [x.new_full((sum(counts) + 3, page, *x.shape[2:]), torch.nan) for x in (k, v)]
    for b, count in enumerate(counts):
        for j in range(count):
            table[b, j] = order.pop()
            for x, cache in zip((k, v), caches, strict=True):
                rows = x[b, j * page : (j + 1) * page]
                cache[table[b, j], : len(rows)] = rows
    return {"k": caches[0], "v": caches[1], "block_table": table.to(k.device)}


def _dense(kind: Kind, q: Tensor, k: Tensor, v: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """o and lse as straightforward code in `dtype` has them, with everything between products in float32 or more."""
    wide = torch.promote_types(dtype, torch.float32)
    group = kind.heads // kind.kv_heads
    o = torch.zeros((*q.shape[:3], kind.dims[1]), dtype=wide, device=q.device)
    lse = torch.full((len(kind.lengths), kind.heads, kind.rows), -torch.inf, dtype=wide, device=q.device)
    for b, n in enumerate(kind.lengths):
        if n == 0:
            continue
        keys, values = (x[b, :n].repeat_interleave(group, 1).to(dtype) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[b].to(dtype), keys).to(wide) * kind.dims[0] ** -0.5
        lse[b] = scores.logsumexp(2)
        o[b] = torch.einsum("hqk,khd->qhd", scores.softmax(2).to(dtype), values).to(wide)
    # The engine's lse is float32, whatever q is.
    return {"o": o if dtype is torch.float64 else o.to(dtype), "lse": lse}


@dataclass(frozen=True, slots=True)
class ServingAhead(KernelsAhead):
    """The kernels of a call in bfloat16, compiled for a target with its default schedule."""

    kind: Kind
    target: str
    backend: str = "triton"
    heavy: bool = False

    @property
    def name(self) -> str:
        return f"serving: {self.kind.name}"

    def reports(self) -> Iterator[tuple[str, AotReport]]:
        for kernel, schedule in kernels_of(self.kind, self.target):
            yield kernel.name, compiled(kernel, schedule, self.target)


def program_of(kind: Kind) -> Attention:
    d, dv = kind.dims
    metas = [meta_tensor(None, None, None, n, dtype=torch.bfloat16) for n in (d, d, dv)]
    program = AttentionEngine(metas, backend="torch").program
    sequences = Sequences(packed=False, page=kind.page)
    return replace(program, sequences=sequences, values_in_keys=kind.latent)


def kernels_of(kind: Kind, target: str) -> Iterator[tuple[Kernel, Schedule]]:
    """The forward pass as a call runs it: few rows of heads side by side, keys whole and in splits."""
    program, group = program_of(kind), kind.heads // kind.kv_heads
    schedule = default_schedule(program, target_named(target))
    few = 2 * kind.rows <= schedule.block_q
    if few:
        program = pack_heads(program, Packing.ONE_QUERY if kind.rows == 1 else Packing.QUERIES)
        schedule = short_query_schedule(schedule, kind.rows * group)
    for direction in ("forward", "decode") if few else ("forward",):
        for kernel in lower(program, schedule, direction).kernels:
            yield kernel, schedule


def checks(backend: str, device: str, small: bool) -> list[ServingCheck]:
    place = Place(backend, device, small)
    return [ServingCheck(kind, place) for kind in KINDS]


def ahead_jobs(targets: tuple[str, ...] = TARGETS) -> list[ServingAhead]:
    return [ServingAhead(kind, t) for kind in KINDS[1:] for t in targets]

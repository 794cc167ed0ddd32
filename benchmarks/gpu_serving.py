"""Speed of sparse attention and of decoding on this machine's GPU, beside fla, FlashMLA and FlashInfer.

    python -m benchmarks.gpu_serving                    every case (minutes)
    python -m benchmarks.gpu_serving --only 'latent'
    python -m benchmarks.gpu_serving --list

nsa: all branches, selection included, or over given blocks; fla's `parallel_nsa`. latent: MLA decoding 576/512 over
pages; `flash_mla_with_kvcache`, FlashInfer's MLA wrapper. tokens: `flash_mla_sparse_fwd`. paged: decoding over pages;
FlashInfer's wrapper. indexer: ours in Triton and in torch. Peers that are not installed, or do not take a case, are
left out and say why.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attn_engine import AttentionEngine, meta_tensor
from attn_engine.library import (
    flash_mla_sparse_fwd,
    flash_mla_with_kvcache,
    lightning_indexer,
    parallel_nsa,
)
from benchmarks.gpu_contenders import Cannot, module_named
from benchmarks.gpu_rows import Measured, command, measured

Given = Mapping[str, Tensor]
Function = Callable[[Given], Tensor]
LATENT, VALUES = 576, 512
WORKSPACE = 128 * 2**20  # bytes, as FlashInfer's examples have it


@dataclass(frozen=True, slots=True)
class ServingCase:
    """One attention in one size. keys: of each sequence; topk: tokens, or blocks of 64, of a query."""

    kind: str
    batches: int
    rows: int
    heads: int
    kv_heads: int
    dim: int
    keys: int
    topk: int = 0
    page: int = 64
    direction: str = "forward"

    def __str__(self) -> str:
        sizes = f"B={self.batches} Tq={self.rows} H={self.heads}:{self.kv_heads} D={self.dim} T={self.keys}"
        return f"{self.kind} {sizes}{f' topk={self.topk}' * bool(self.topk)} {self.direction}"


def table() -> Iterator[ServingCase]:
    for length in (8192, 32768):
        for kind in ("nsa", "nsa, given blocks"):
            for direction in ("forward", "backward"):
                yield ServingCase(kind, 1, length, 64, 4, 128, length, 16, direction=direction)
    for heads, batches in ((128, 64), (16, 64), (128, 1)):
        yield ServingCase("latent", batches, 1, heads, 1, LATENT, 8192)
    for heads in (128, 64):
        yield ServingCase("tokens", 1, 4096, heads, 1, LATENT, 32768, 2048)
    for batches, keys in ((64, 8192), (1, 65536)):
        yield ServingCase("paged", batches, 1, 32, 8, 128, keys)
    for rows in (2048, 1):
        yield ServingCase("indexer", 1, rows, 64, 1, 128, 65536, 2048)


# -- what calls are given


def tensors(case: ServingCase, device: str) -> dict[str, Tensor]:
    """By name, in bfloat16: q and k, v, or a cache in pages, in no order, with its table and lengths."""
    generator = torch.Generator(device).manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, generator=generator).to(torch.bfloat16)

    found = {"q": drawn(case.batches, case.rows, case.heads, case.dim)}
    if case.kind in ("latent", "paged"):
        pages = -(-case.keys // case.page)
        order = torch.randperm(case.batches * pages, device=device, generator=generator)
        found["block_table"] = order.view(case.batches, pages).int()
        found["lengths"] = torch.full((case.batches,), case.keys, dtype=torch.int32, device=device)
        shape = (case.batches * pages, case.page, case.kv_heads, case.dim)
        found["k"] = drawn(*shape)
        if case.kind == "paged":
            found["v"] = drawn(*shape)
        return found
    found["k"] = drawn(case.batches, case.keys, case.kv_heads, case.dim)
    if case.kind == "tokens":
        order = torch.rand(case.rows, 1, case.keys, device=device, generator=generator)
        found["indices"] = order.topk(case.topk, -1).indices.int()
    elif case.kind == "indexer":
        found["weights"] = drawn(case.batches, case.rows, case.heads).float().abs()
    else:
        found["v"] = drawn(case.batches, case.keys, case.kv_heads, case.dim)
        found |= {name: drawn(*found["q"].shape[:3]).sigmoid() for name in ("g_cmp", "g_slc", "g_swa")}
        if case.kind != "nsa":
            found["blocks"] = _blocks(case, device, generator)
    return found


def _blocks(case: ServingCase, device: str, generator: torch.Generator) -> Tensor:
    """Of every token: its own block and others before it, or -1. (B, T, H, topk)"""
    count = -(-case.keys // 64)
    own = torch.arange(case.rows, device=device)[:, None] // 64
    value = torch.rand(case.rows, case.kv_heads, count, device=device, generator=generator)
    block = torch.arange(count, device=device)
    value = torch.where(block == own[:, None], 2.0, value).masked_fill(block > own[:, None], -1.0)
    best = value.topk(min(case.topk, count), -1)
    return torch.where(best.values >= 0, best.indices, -1).int().sort(-1).values[None]


# -- ours


def ours(backend: str) -> Callable[[ServingCase], Function]:
    def make(case: ServingCase) -> Function:
        scale = case.dim**-0.5
        if case.kind.startswith("nsa"):
            return lambda x: parallel_nsa(**_of_nsa(x, case), backend=backend)
        if case.kind == "latent":
            return lambda x: flash_mla_with_kvcache(
                x["q"], x["k"], x["block_table"], x["lengths"], VALUES, backend=backend
            )[0]
        if case.kind == "tokens":
            return lambda x: flash_mla_sparse_fwd(
                x["q"][0], x["k"][0], x["indices"], scale, VALUES, backend=backend
            )[0]
        if case.kind == "indexer":
            return lambda x: lightning_indexer(
                x["q"], x["k"], x["weights"], sparse_count=case.topk, backend=backend
            )
        metas = [meta_tensor(None, None, None, case.dim, dtype=torch.bfloat16)] * 3
        engine = AttentionEngine(metas, backend=backend, scale=scale)
        return lambda x: engine(x["q"], x["k"], x["v"], block_table=x["block_table"], len_kv=x["lengths"])

    return make


def _of_nsa(x: Given, case: ServingCase) -> dict[str, Any]:
    """The arguments of parallel_nsa, which are the same here and in fla."""
    given = {name: x[name] for name in ("q", "k", "v", "g_cmp", "g_slc", "g_swa")}
    return {
        **given, "block_indices": x.get("blocks"), "block_counts": case.topk, "block_size": 64,
        "window_size": 512, "scale": case.dim**-0.5,
    }  # fmt: skip


# -- peers


def fla(case: ServingCase) -> Function:
    library = _for(case, "nsa", "fla.ops.nsa")
    return lambda x: library.parallel_nsa(**_of_nsa(x, case))


def flash_mla(case: ServingCase) -> Function:
    """What a call of its scheduler says is made once, as a server does it for all layers."""
    library = _for(case, ("latent", "tokens"), "flash_mla")
    if case.kind == "tokens":
        return lambda x: library.flash_mla_sparse_fwd(
            x["q"][0], x["k"][0], x["indices"], sm_scale=case.dim**-0.5, d_v=VALUES
        )[0]
    schedule, splits = library.get_mla_metadata()

    def decode(x: Given) -> Tensor:
        return library.flash_mla_with_kvcache(
            x["q"], x["k"], x["block_table"], x["lengths"], VALUES, schedule, splits,
            softmax_scale=case.dim**-0.5,
        )[0]  # fmt: skip

    return decode


def flashinfer(case: ServingCase) -> Function:
    """Its wrappers plan once for all layers, too."""
    library = _for(case, ("latent", "paged"), "flashinfer")
    planned: list[Any] = []
    return (
        _mla_of_flashinfer(library, case, planned)
        if case.kind == "latent"
        else _decode(library, case, planned)
    )


def _pages_in_a_row(x: Given, case: ServingCase) -> tuple[Tensor, Tensor]:
    """Where each sequence's pages begin in the list of all, and that list; int32."""
    pages = x["block_table"].shape[1]
    return torch.arange(case.batches + 1, device=x["q"].device).int() * pages, x["block_table"].flatten()


def _mla_of_flashinfer(library: Any, case: ServingCase, planned: list[Any]) -> Function:
    mla = module_named("flashinfer.mla")

    def decode(x: Given) -> Tensor:
        if not planned:
            first, pages = _pages_in_a_row(x, case)
            wrapper = mla.BatchMLAPagedAttentionWrapper(
                torch.empty(WORKSPACE, dtype=torch.int8, device=x["q"].device)
            )
            rows = torch.arange(case.batches + 1, device=x["q"].device).int() * case.rows
            wrapper.plan(
                rows, first, pages, x["lengths"], case.heads, VALUES, LATENT - VALUES, case.page,
                False, case.dim**-0.5, x["q"].dtype, x["k"].dtype,
            )  # fmt: skip
            planned.append(wrapper)
        q, cache = x["q"].flatten(0, 1), x["k"][:, :, 0]
        parts = (q[..., :VALUES], q[..., VALUES:], cache[..., :VALUES], cache[..., VALUES:])
        return planned[0].run(*parts, return_lse=False).view(*x["q"].shape[:3], VALUES)

    return decode


def _decode(library: Any, case: ServingCase, planned: list[Any]) -> Function:
    def decode(x: Given) -> Tensor:
        if not planned:
            first, pages = _pages_in_a_row(x, case)
            workspace = torch.empty(WORKSPACE, dtype=torch.uint8, device=x["q"].device)
            wrapper = library.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
            last = (x["lengths"] - 1) % case.page + 1
            wrapper.plan(
                first, pages, last, case.heads, case.kv_heads, case.dim, case.page,
                q_data_type=x["q"].dtype, kv_data_type=x["k"].dtype, sm_scale=case.dim**-0.5,
            )  # fmt: skip
            planned.append(wrapper)
        return planned[0].run(x["q"][:, 0], (x["k"], x["v"]))[:, None]

    return decode


def _for(case: ServingCase, kinds: str | tuple[str, ...], module: str) -> Any:
    """The library, where it computes such cases; raises Cannot."""
    if not case.kind.startswith(kinds):
        raise Cannot("it has no such attention, or it is not compared")
    if case.direction == "backward" and module != "fla.ops.nsa":
        raise Cannot("forward only")
    return module_named(module)


CONTENDERS: Mapping[str, Callable[[ServingCase], Function]] = {
    "ours, triton": ours("triton"),
    "ours, torch": ours("torch"),
    "fla": fla,
    "FlashMLA": flash_mla,
    "FlashInfer": flashinfer,
}


def run_of(function: Function, case: ServingCase, given: Given) -> Callable[[], Tensor]:
    """One call in the case's direction; backward is the gradient alone, on a graph that is kept."""
    if case.direction == "forward":

        def forward() -> Tensor:
            with torch.no_grad():
                return function(given)

        return forward
    names = [name for name in given if name != "blocks"]
    leaves = {n: x.detach().requires_grad_(n in names) for n, x in given.items()}
    out = function(leaves)
    d_out, wanted = torch.ones_like(out), [leaves[n] for n in names]
    return lambda: torch.autograd.grad(out, wanted, d_out, retain_graph=True)[0]


def measure(case: ServingCase, device: str) -> Measured:
    given = tensors(case, device)
    skipped = ("ours, torch",) if case.kind != "indexer" else ()

    def maker(make: Callable[[ServingCase], Function]) -> Callable[[], Callable[[], Tensor]]:
        return lambda: run_of(make(case), case, given)

    return measured({n: maker(make) for n, make in CONTENDERS.items() if n not in skipped}, device)


if __name__ == "__main__":
    sys.exit(command("gpu_serving", table(), measure))

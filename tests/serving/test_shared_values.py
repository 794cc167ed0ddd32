"""Values that are the first columns of their keys, in one memory: tiles are loaded once, and nothing else changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from attn_engine import AttentionEngine, meta_tensor
from attn_engine.codegen.backends.cpu import CpuTarget, render_cpu
from attn_engine.codegen.backends.triton import render_triton
from attn_engine.codegen.footprint import footprint
from attn_engine.codegen.pipeline import lower, with_header
from attn_engine.codegen.schedule import few_rows_schedule
from attn_engine.ir.program import Attention
from attn_engine.runtime.cpu_compile import find_compiler
from attn_engine.runtime.shared_values import values_in_keys
from tests.gpu_tiles import gpu_schedule
from tests.serving.caches import attention, filled

CPU = "cpu" if find_compiler() is not None else "torch"
LENGTHS = [70, 0, 33, 129]


def built(
    dims: tuple[int, int], backend: str = "torch", dtype: torch.dtype = torch.float32
) -> AttentionEngine:
    d, dv = dims
    metas = [meta_tensor(None, None, None, n, dtype=dtype) for n in (d, d, dv)]
    return AttentionEngine(metas, scale=0.2, backend=backend)


def shared(dims: tuple[int, int]) -> Attention:
    return replace(built(dims).program, values_in_keys=True)


@pytest.mark.parametrize(
    ("backend", "heads", "dims", "page"),
    [
        (CPU, 3, (48, 32), 16),
        (CPU, 40, (48, 48), 24),
        ("torch", 5, (96, 96), 64),
        ("torch", 2, (40, 24), 16),
        ("triton-interpreter", 3, (48, 32), 16),
        pytest.param("tilelang-cpu", 3, (48, 32), 64, marks=pytest.mark.slow),
        pytest.param("tilelang-cpu", 3, (48, 32), 24, marks=pytest.mark.slow),
        pytest.param(CPU, 128, (576, 512), 64, marks=pytest.mark.slow),
        pytest.param(CPU, 16, (576, 512), 48, marks=pytest.mark.slow),
        pytest.param("triton-interpreter", 20, (96, 80), 64, marks=pytest.mark.slow),
    ],
)
def test_the_bits_of_values_in_memory_of_their_own(
    backend: str, heads: int, dims: tuple[int, int], page: int, seed: int
) -> None:
    """In rows and in pages, everything unused NaN; and the formula in float64."""
    if backend.startswith("tilelang"):
        pytest.importorskip("tilelang")
    torch.manual_seed(seed)
    cache, q = filled(LENGTHS, page, 1, (dims[0], 8)), torch.randn(len(LENGTHS), 1, heads, dims[0])
    engine, values = built(dims, backend), slice(0, dims[1])
    pages: dict[str, Any] = {"block_table": cache.table, "len_kv": cache.lengths}
    found = engine(q, cache.k, cache.k[..., values], **pages)
    (call, _), *_ = engine._calls.values()
    assert "_sharing" in vars(call.compiled)
    apart = engine(q, cache.k, cache.k[..., values].clone(), **pages)
    in_rows = engine(q, cache.k_rows, cache.k_rows[..., values], len_kv=cache.lengths)
    assert torch.equal(found, apart)
    assert torch.equal(found, in_rows)
    want, _ = attention(q, cache.k_rows, cache.k_rows[..., values], cache.lengths, 0.2)
    torch.testing.assert_close(found.double(), want, rtol=3e-5, atol=3e-5)


@pytest.mark.skipif(CPU != "cpu", reason="bfloat16 in pairs is the compiled CPU's")
@pytest.mark.parametrize("heads", [4, 40])
def test_bfloat16(heads: int, seed: int) -> None:
    torch.manual_seed(seed)
    k, q = torch.randn(1, 150, 1, 48).bfloat16(), torch.randn(1, 1, heads, 48).bfloat16()
    engine = built((48, 32), CPU, torch.bfloat16)
    assert torch.equal(engine(q, k, k[..., :32]), engine(q, k, k[..., :32].clone()))


@pytest.mark.parametrize("backend", [CPU, "torch"])
def test_calls_alike_but_for_the_memory(backend: str, seed: int) -> None:
    """What is remembered of a kind of call must not outlive the memory that both tensors were in."""
    torch.manual_seed(seed)
    engine, q = built((48, 32), backend), torch.randn(2, 3, 4, 48)
    k, other = torch.randn(2, 2, 90, 2, 48)
    for _ in range(3):
        for v in (k[..., :32], other[..., :32]):
            assert v.stride() == k.stride()
            want, _ = attention(q, k, v, torch.tensor([90, 90]), 0.2)
            torch.testing.assert_close(engine(q, k, v).double(), want, rtol=3e-5, atol=3e-5)


def test_gradients_go_to_both(seed: int) -> None:
    torch.manual_seed(seed)
    q, k = torch.randn(1, 20, 2, 48), torch.randn(1, 30, 1, 48)
    weight, found = torch.randn(1, 20, 2, 32), list[Tensor]()
    for split in (lambda x: x[..., :32], lambda x: x[..., :32].clone()):
        leaves = q.clone().requires_grad_(), k.clone().requires_grad_()
        o = built((48, 32))(leaves[0], leaves[1], split(leaves[1]))
        found += torch.autograd.grad((o * weight).sum(), leaves)
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[3])
    assert found[1].any()


@pytest.mark.parametrize(
    ("dims", "once"),
    [((576, 512), True), ((64, 64), True), ((96, 64), True), ((96, 80), False), ((40, 24), False)],
)
def test_kernels_load_a_tile_once(dims: tuple[int, int], once: bool) -> None:
    """Where the pieces of a value are pieces of its key; the model of shared memory counts it once."""
    schedule = gpu_schedule(64, 64, 2)
    one = lower(shared(dims), schedule, "forward").kernel("forward")
    two = lower(built(dims).program, schedule, "forward").kernel("forward")
    assert ("V" not in {p.name for p in one.params}) == once
    staged, before = (sum(t.bytes for t in footprint(k).staged) for k in (one, two))
    assert (staged < before) == once
    text = render_triton(one)
    assert (text.count("tl.load(") < render_triton(two).count("tl.load(")) == once


def test_what_lies_in_keys() -> None:
    k = torch.zeros(2, 5, 1, 8)
    assert values_in_keys(k, k, {}) and values_in_keys(k, k[..., :3], {})
    assert not values_in_keys(k, k.clone(), {})
    assert not values_in_keys(k, k[..., 1:4], {})
    assert not values_in_keys(k[..., :3], k, {})
    assert not values_in_keys(k, k[:1].expand(2, -1, -1, -1), {})
    assert not values_in_keys(k[:0], k[:0], {})


def test_scales_are_shared_too() -> None:
    """A value that shares the bytes of its key need not share its scales."""
    k, scale, row = torch.zeros(2, 5, 1, 320), torch.ones(2, 5, 1, 3), torch.ones(2, 5, 1, 1)

    def shared(columns: int, of_keys: Tensor, of_values: Tensor) -> bool:
        return values_in_keys(k, k[..., :columns], {"K_scale": of_keys, "V_scale": of_values})

    assert shared(256, scale, scale[..., :2]) and shared(128, scale, scale[..., :1]) and shared(256, row, row)
    assert not shared(256, scale, scale[..., :1])  # one scale for both blocks
    assert not shared(256, scale, scale[..., :2].clone())
    assert not shared(256, scale, scale[..., 1:])
    assert not shared(256, scale, row)


def test_showcase(golden: Callable[[str, str], None]) -> None:
    kernel = lower(shared((96, 64)), few_rows_schedule(4), "decode").kernel("decode")
    golden("latent_decode.cpp", render_cpu(with_header(kernel, "cpu", "golden"), CpuTarget()))
    kernel = lower(shared((96, 64)), gpu_schedule(64, 32, 2), "forward").kernel("forward")
    golden("latent_forward.py", render_triton(with_header(kernel, "triton", "golden")))

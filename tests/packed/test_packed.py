"""Packed sequences: forward, row values and every gradient, against each sequence by itself."""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from attn_engine.runtime.cpu_compile import find_compiler
from tests.packed.programs import HEADS, KV_HEADS, PROGRAMS, alone, engine, tensors_of

CPU = "cpu" if find_compiler() is not None else "torch"
# Lengths around a tile, none, one; then different lengths of q and kv, among them keys nobody asks for and the reverse.
EQUAL = [(n, n) for n in (0, 1, 63, 64, 65, 150)]
DIFFERENT = [(3, 0), (70, 131), (0, 9), (129, 64), (1, 65)]
SMALL = [(17, 17), (0, 0), (1, 1), (70, 70)]


def bounds(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def cut(x: Tensor, cu_len: Tensor) -> list[Tensor]:
    return [x[i:j] for i, j in pairwise(cu_len.tolist())]


def compare(
    name: str,
    backend: str,
    lengths: list[tuple[int, int]],
    dtype: torch.dtype = torch.float32,
    dims: tuple[int, int] = (16, 16),
    tolerance: float = 2e-5,
    group: int = HEADS // KV_HEADS,
    **options: Any,
) -> None:
    cu_len_q, cu_len_kv = bounds([n for n, _ in lengths]), bounds([n for _, n in lengths])
    longest = max(n for n, _ in lengths), max(n for _, n in lengths)
    captured = tensors_of(name, len(lengths), *longest, dtype)
    q_rows, kv_rows = int(cu_len_q[-1]), int(cu_len_kv[-1])
    shapes = (q_rows, HEADS, dims[0]), (kv_rows, HEADS // group, dims[0]), (kv_rows, HEADS // group, dims[1])
    q, k, v = (torch.randn(s, dtype=dtype).requires_grad_() for s in shapes)
    built = engine(name, captured, backend, dtype, dims, **options)
    o, rows = built(q, k, v, cu_len_q=cu_len_q, cu_len_kv=cu_len_kv, return_final_rowscales=True)
    assert o.shape == (q_rows, HEADS, dims[1])

    each = alone(
        name,
        captured,
        list(zip(cut(q, cu_len_q), cut(k, cu_len_kv), cut(v, cu_len_kv), strict=True)),
        **options,
    )
    want = torch.cat([x for x, _ in each])
    torch.testing.assert_close(o.double(), want, rtol=tolerance, atol=tolerance)
    for row, x in rows.items():
        assert x.shape == (HEADS, q_rows)
        expected = torch.cat([of_one[row] for _, of_one in each], 1)
        torch.testing.assert_close(x.double(), expected, rtol=tolerance, atol=tolerance)

    learned = [captured[n] for n in PROGRAMS[name].learned]
    weights = torch.randn_like(o)
    got = torch.autograd.grad(o, [q, k, v, *learned], weights)
    wanted = torch.autograd.grad(want, [q, k, v, *learned], weights.double())
    for g, w in zip(got, wanted, strict=True):
        scale = max(1.0, w.abs().max().item() if w.numel() else 1.0)
        torch.testing.assert_close(g, w.to(g.dtype), rtol=10 * tolerance, atol=tolerance * scale)


SHOWN = (
    "causal",
    "documents",
    "biases by row, key and sequence",
    "bias by pair",
)  # the rest takes minutes to compile
SOME = [pytest.param(n, marks=() if n in SHOWN else pytest.mark.slow) for n in PROGRAMS]


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("lengths", [EQUAL, DIFFERENT], ids=["equal", "different"])
def test_cpu(name: str, lengths: list[tuple[int, int]], seed: int) -> None:
    torch.manual_seed(seed)
    compare(name, CPU, lengths)


@pytest.mark.parametrize("name", PROGRAMS)
def test_tile_programs(name: str, seed: int) -> None:
    torch.manual_seed(seed)
    compare(name, "torch", DIFFERENT, torch.float64, tolerance=1e-11)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=() if n in ("causal", "bias by pair") else pytest.mark.slow)
        for n in PROGRAMS
        if n != "bias by distance"  # sums along diagonals are the CPU's
    ],
)
def test_triton(name: str, seed: int) -> None:
    torch.manual_seed(seed)
    pytest.importorskip("triton")
    compare(name, "triton-interpreter", SMALL if name.startswith("bias") else DIFFERENT)

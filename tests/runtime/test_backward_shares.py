"""Backward passes that share out queries: the gradients of those that share out keys, in smaller parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from attn_engine import AttentionEngine, meta_tensor
from attn_engine.library import causal, sliding_window
from attn_engine.runtime import backward_shares, compiled, gradient_parts, launch_plan
from attn_engine.runtime.backward_shares import key_shares, query_shares, shares_fewer_queries

DIM = 16


def sizes(q_len: int, kv_len: int, kv_heads: int = 1, batches: int = 1) -> dict[str, int]:
    return {"q_len": q_len, "kv_len": kv_len, "kv_heads": kv_heads, "batches": batches}


def test_shares_are_of_sizes_alone() -> None:
    assert [query_shares(sizes(n, 1), 32) for n in (0, 1, 64, 4096)] == [1, 1, 2, 8]
    assert [key_shares(sizes(1, n), 64) for n in (0, 64, 128, 4096)] == [1, 1, 2, 8]
    assert [query_shares(sizes(4096, 1, heads, 2), 32) for heads in (1, 2, 8)] == [4, 2, 1]
    assert key_shares(sizes(1, 4096, 8), 64, ("kv_head",)) == 8


def test_the_cut_with_fewer_numbers_is_taken() -> None:
    """16 heads over one kv head, over 8, and what caches hold."""
    dq = torch.empty(1, 16, 4096, 64, device="meta")
    one, half = torch.empty(1, 1, 4096, 64, device="meta"), torch.empty(1, 8, 4096, 64, device="meta")
    assert shares_fewer_queries(dq, one, one, 8, 8)
    assert not shares_fewer_queries(dq, half, half, 8, 8)  # as many
    assert not shares_fewer_queries(dq, one, one, 1, 1)  # dQ needs no parts
    small = dq[:, :, :128]
    assert small.numel() * 8 < backward_shares.MANY
    assert not shares_fewer_queries(small, one[:, :, :128], one[:, :, :128], 8, 4)


@pytest.fixture
def cuts(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, int]]:
    """(queries are shared out, in how many shares) of every backward pass; any size is many."""
    monkeypatch.setattr(backward_shares, "MANY", 0)
    made: list[tuple[bool, int]] = []

    def spy(shares_queries: bool, gradients: Any, splits: int, *rest: Any) -> Any:
        made.append((shares_queries, splits))
        return gradient_parts.gradient_parts(shares_queries, gradients, splits, *rest)

    for module in (compiled, launch_plan):
        monkeypatch.setattr(module, "gradient_parts", spy)
    return made


def gradients(
    engine: AttentionEngine, inputs: list[Tensor], d_out: Tensor, reference: bool = False, **named: Any
) -> tuple[Tensor, ...]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    call: Any = engine.reference if reference else engine
    return torch.autograd.grad(call(*leaves, **named), leaves, d_out.double() if reference else d_out)


def check(
    backend: str,
    mask: Any,
    lengths: tuple[int, int],
    cuts: list[tuple[bool, int]],
    splits: int,
    **options: Any,
) -> tuple[tuple[Tensor, ...], Callable[[], tuple[Tensor, ...]]]:
    """The gradients of a call, checked, and a function that makes them again."""
    dtype, ends = options.get("dtype", torch.float32), options.get("ends")
    metas = [meta_tensor(None, None, None, DIM, dtype=dtype)] * 3
    engine = AttentionEngine(metas, mask_mod=mask, backend=backend)
    batch = (1,) if ends is None else ()
    q, d_out = torch.randn(2, *batch, lengths[0], 8, DIM, dtype=dtype)
    k, v = torch.randn(2, *batch, lengths[1], 1, DIM, dtype=dtype)
    named: dict[str, Any] = (
        {} if ends is None else {"cu_len_q": torch.tensor(ends), "cu_len_kv": torch.tensor(ends)}
    )
    found = gradients(engine, [q, k, v], d_out, **named)
    assert cuts == [(True, splits)]
    wanted = gradients(engine, [q, k, v], d_out, reference=True, **named)
    tolerance = 2e-2 if dtype is torch.bfloat16 else 2e-5
    for x, y in zip(found, wanted, strict=True):
        assert float((x.double() - y.double()).norm()) <= tolerance * float(y.double().norm())
    return found, lambda: gradients(engine, [q, k, v], d_out, **named)


def test_in_torch(cuts: list[tuple[bool, int]]) -> None:
    """Rows without a key (more queries than a window of keys reaches) get zeros."""
    check("torch", sliding_window(40), (300, 280), cuts, 3)


def test_packed_sequences_leave_zeros_behind(cuts: list[tuple[bool, int]]) -> None:
    """Rows of no sequence at the end, and an empty sequence."""
    found, _ = check("torch", causal(), (320, 320), cuts, 2, ends=[0, 300, 300, 310])
    assert all(not x[310:].any() for x in found)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mask", [None, causal(), sliding_window(50)], ids=["all", "causal", "window"])
def test_on_the_cpu_for_any_number_of_threads(
    mask: Any, dtype: torch.dtype, cuts: list[tuple[bool, int]]
) -> None:
    found, again = check("cpu", mask, (600, 600), cuts, 8, dtype=dtype)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert all(torch.equal(x, y) for x, y in zip(found, again(), strict=True))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.slow
def test_packed_on_the_cpu(cuts: list[tuple[bool, int]]) -> None:
    check("cpu", causal(), (700, 700), cuts, 4, ends=[0, 430, 700])

"""Packed sequences through torch.compile's graphs, the registered operator and its checks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attn_engine.runtime.cpu_compile import find_compiler
from tests.packed.programs import engine
from tests.packed.test_listed_sequences import lists_of
from tests.packed.test_packed import bounds

CPU = "cpu" if find_compiler() is not None else "torch"


def test_compiled(seed: int) -> None:
    """One graph for all lengths; results and gradients are those outside of it."""
    torch.manual_seed(seed)
    built = engine("causal", {}, CPU, torch.float32)

    def step(q: Tensor, k: Tensor, v: Tensor, cu_len: Tensor) -> Any:
        o, rows = built(q * 1.5, k, v, cu_len_q=cu_len, cu_len_kv=cu_len, return_final_rowscales=True)
        return o.sin(), rows["lse"]

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for lengths in ([40, 70, 1], [64, 0, 47]):
        inputs = [torch.randn(111, 2, 16, requires_grad=True) for _ in range(3)]
        weights = torch.randn(111, 2, 16)
        cu_len = bounds(lengths)
        o, lse = compiled(*inputs, cu_len)
        wanted, wanted_lse = step(*inputs, cu_len)
        assert lse.shape == (2, 111)
        torch.testing.assert_close((o, lse), (wanted, wanted_lse))
        for g, w in zip(
            torch.autograd.grad((o * weights).sum() + lse.sum(), inputs),
            torch.autograd.grad((wanted * weights).sum() + wanted_lse.sum(), inputs),
            strict=True,
        ):
            torch.testing.assert_close(g, w)


def test_compiled_in_a_batch(seed: int) -> None:
    torch.manual_seed(seed)
    built = engine("causal", {}, CPU, torch.float32)
    q, k, v = (torch.randn(2, 40, 2, 16) for _ in range(3))
    length = torch.tensor([40, 13])
    compiled = torch.compile(
        lambda q, k, v, n: built(q, k, v, len_q=n, len_kv=n), backend="aot_eager", fullgraph=True
    )
    torch.testing.assert_close(compiled(q, k, v, length), built(q, k, v, len_q=length, len_kv=length))


def test_the_operator_is_as_its_fake_says(seed: int) -> None:
    torch.manual_seed(seed)
    built = engine("causal", {}, "torch", torch.float32)
    q, k, v = (torch.randn(30, 2, 16, requires_grad=True) for _ in range(3))
    from attn_engine.graph_calls import key_of
    from attn_engine.sequence_calls import SequencePlaces

    places = SequencePlaces({"cu_len_q": bounds([10, 20])})
    views = [x.transpose(0, 1)[None] for x in (q, k)]
    spans = [*places.spans(*views).values()]
    key = key_of(built._number, "cpu", (), None, (True, 0))
    torch.library.opcheck(torch.ops.attn_engine.forward, (q, k, v, spans, [built.scale], key))


def test_compiled_with_lists(seed: int) -> None:
    torch.manual_seed(seed)
    built = engine("causal", {}, CPU, torch.float32)
    drawn = torch.rand(2, 1, 2, 2) < 0.7
    lists = lists_of(drawn, torch.zeros_like(drawn), 64, 70)
    q, k, v = (torch.randn(111, 2, 16) for _ in range(3))
    cu_len = bounds([41, 70])

    def call(q: Tensor, k: Tensor, v: Tensor, cu_len: Tensor) -> Tensor:
        return built(q, k, v, cu_len_q=cu_len, block_mask=lists)

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v, cu_len), call(q, k, v, cu_len))

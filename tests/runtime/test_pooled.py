"""Pooled weights: the largest and the sum of a row's weights in every block of keys, beside the output."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attn_engine import AttentionEngine, OnlineFunc, meta_tensor, online, with_pooled
from attn_engine.errors import PooledMaximumNotDifferentiable, UnknownOption
from attn_engine.library import OnlineRetention, OnlineSigmoid, OnlineSoftmax
from attn_engine.runtime.cpu_compile import find_compiler

CPU = "cpu" if find_compiler() is not None else "torch"


def seen(b: Any, h: Any, i: Any, j: Any) -> Any:
    return (j <= i) & (i - j < 70) & (i != 3)


def weights(name: str, score: Tensor, visible: Tensor) -> Tensor:
    if name == "softmax":
        return torch.softmax(score.masked_fill(~visible, float("-inf")), -1).nan_to_num() * visible
    if name == "sigmoid":
        return torch.sigmoid(score) * visible
    return score * visible / (score * visible).abs().sum(-1, keepdim=True).clamp(min=1)


RULES = {"softmax": OnlineSoftmax, "sigmoid": OnlineSigmoid, "retention": OnlineRetention}


def check(
    rule: str, backend: str, q_len: int, kv_len: int, block: int, generator: torch.Generator, **given: Any
) -> None:
    metas = [meta_tensor(None, None, None, d, dtype=torch.float32) for d in (8, 8, 5)]
    func = with_pooled(with_pooled(RULES[rule](), max=block), sum=2 * block)
    built = AttentionEngine(metas, online_func=func, backend=backend, scale=0.6, **given)
    plain = AttentionEngine(metas, online_func=RULES[rule](), backend=backend, scale=0.6, **given)
    q, k, v = (
        torch.randn(s, generator=generator) for s in ((2, q_len, 4, 8), (2, kv_len, 2, 8), (2, kv_len, 2, 5))
    )
    i, j = torch.arange(q_len)[:, None], torch.arange(kv_len)[None]
    visible = seen(0, 0, i, j) if given else (i >= 0) & (j >= 0)
    score = q.double().transpose(1, 2) @ k.double().permute(0, 2, 3, 1).repeat_interleave(2, 1) * 0.6
    dense = weights(rule, score, visible)
    o, rows = built(q, k, v, return_final_rowscales=True)
    torch.testing.assert_close(o, plain(q, k, v), rtol=1e-5, atol=1e-5)
    largest = dense.masked_fill(~visible, -torch.inf).split(block, -1)
    want_max = torch.stack([x.amax(-1) for x in largest], -1)
    want_max = torch.where(want_max == -torch.inf, 0.0, want_max)
    want_sum = torch.stack([x.sum(-1) for x in dense.split(2 * block, -1)], -1)
    torch.testing.assert_close(rows["pooled_max"].double(), want_max, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(rows["pooled_sum"].double(), want_sum, rtol=1e-5, atol=1e-6)
    _, exact = built.reference(q, k, v, return_final_rowscales=True)
    torch.testing.assert_close(exact["pooled_max"], want_max)
    torch.testing.assert_close(exact["pooled_sum"], want_sum)


@pytest.mark.parametrize("block", [16, 256])
@pytest.mark.parametrize("rule", RULES)
def test_on_the_cpu(rule: str, block: int, generator: torch.Generator) -> None:
    check(rule, CPU, 150, 300, block, generator, mask_mod=seen)


def test_few_query_rows_and_no_mask(generator: torch.Generator) -> None:
    check("softmax", CPU, 1, 700, 32, generator)


@pytest.mark.parametrize("backend", ["torch", "triton-interpreter"])
def test_on_other_machines(backend: str, generator: torch.Generator) -> None:
    check("softmax", backend, 70, 100, 32, generator, mask_mod=seen)


def test_gradients_go_through_the_output_alone(generator: torch.Generator) -> None:
    metas = [meta_tensor(None, None, None, 8, dtype=torch.float32)] * 3
    engines = [
        AttentionEngine(metas, online_func=f, backend=CPU, mask_mod=seen)
        for f in (with_pooled(OnlineSoftmax(), max=64), OnlineSoftmax())
    ]
    qkv = [torch.randn(1, 80, 2, 8, generator=generator, requires_grad=True) for _ in range(3)]
    o, rows = engines[0](*qkv, return_final_rowscales=True)
    assert rows["lse"].requires_grad
    with pytest.raises(PooledMaximumNotDifferentiable, match="detach"):
        (o.sum() + rows["pooled_max"].sum()).backward(retain_graph=True)
    found = torch.autograd.grad(o.square().sum(), qkv)
    exact = torch.autograd.grad(engines[1](*qkv).square().sum(), qkv)
    assert all(torch.equal(x, y) for x, y in zip(found, exact, strict=True))


def test_inside_a_compiled_function(generator: torch.Generator) -> None:
    metas = [meta_tensor(None, None, None, 8, dtype=torch.float32)] * 3
    built = AttentionEngine(metas, online_func=with_pooled(OnlineSoftmax(), sum=16), backend=CPU)

    def pooled(*qkv: Tensor) -> Tensor:
        return built(*qkv, return_final_rowscales=True)[1]["pooled_sum"]

    qkv = [torch.randn(1, 40, 2, 8, generator=generator) for _ in range(3)]
    found = torch.compile(pooled, backend="aot_eager", fullgraph=True)(*qkv)
    assert torch.equal(found, pooled(*qkv))
    torch.testing.assert_close(found.sum(-1), torch.ones(1, 2, 40))


@pytest.mark.parametrize("block", [8, 48, -16])
def test_blocks_are_powers_of_two(block: int) -> None:
    with pytest.raises(UnknownOption, match="power of two"):
        with_pooled(OnlineFunc, max=block)


def test_a_kind_is_pooled_once() -> None:
    with pytest.raises(UnknownOption, match="already"):
        with_pooled(with_pooled(OnlineSoftmax(), sum=16), sum=32)


SINK = torch.zeros(4, dtype=torch.float64, requires_grad=True)


@online
def with_sink(s, h):
    m = s.max()
    p = torch.exp(s - m)
    return p / (p.sum() + torch.exp(SINK[h] - m))


@online
def centred(s):
    return torch.relu(s - s.mean())


@pytest.mark.parametrize("backend", [CPU, "triton-interpreter"])
@pytest.mark.parametrize(
    "rule", [OnlineSoftmax(), with_sink, centred], ids=["given", "learned", "two passes"]
)
def test_pooled_sums_have_gradients(rule: Any, backend: str, generator: torch.Generator) -> None:
    """With score_mod, grouped heads, rows without keys and blocks that no row sees."""
    dtype, tolerance = (torch.float64, 1e-10) if backend == CPU else (torch.float32, 1e-4)
    metas = [meta_tensor(None, None, None, d, dtype=dtype) for d in (8, 8, 5)]
    built = AttentionEngine(
        metas,
        online_func=with_pooled(rule, sum=16),
        score_mod=lambda s, b, h, i, j: s * 0.7 - 0.01 * (i - j),
        mask_mod=seen,
        backend=backend,
    )
    shapes = ((2, 45, 4, 8), (2, 61, 2, 8), (2, 61, 2, 5))
    qkv = [torch.randn(s, generator=generator, dtype=dtype, requires_grad=True) for s in shapes]
    weights = torch.randn(2, 4, 45, 4, generator=generator, dtype=dtype)
    wanted = [*qkv, *([SINK] if rule is with_sink else [])]

    def gradients(o: Tensor, rows: dict[str, Tensor], alone: bool) -> tuple[Tensor, ...]:
        pooled = (rows["pooled_sum"] * weights).sum()
        loss = pooled if alone else pooled + o.square().sum()
        return torch.autograd.grad(loss, wanted, materialize_grads=True, allow_unused=True)

    for alone in (False, True):
        found = gradients(*built(*qkv, return_final_rowscales=True), alone)
        exact = gradients(*built.reference(*qkv, return_final_rowscales=True), alone)
        for x, y in zip(found, exact, strict=True):
            torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance, check_dtype=False)

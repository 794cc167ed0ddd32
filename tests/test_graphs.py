"""Engines inside torch.compile and under torch's transforms: right, or a typed error that says what to do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attn_engine import AttentionEngine, CustomIO, errors, meta_tensor

D = 8


def engine(**options: Any) -> AttentionEngine:
    return AttentionEngine([meta_tensor(None, None, None, D, dtype=torch.float32)] * 3, **options)


def qkv(length: int = 9, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.randn(1, length, 2, D, **options) for _ in range(3))
    return q, k, v


def compiled(built: AttentionEngine) -> Any:
    torch.compiler.reset()
    return torch.compile(lambda *tensors: built(*tensors), backend="aot_eager", fullgraph=True)


BAD = {
    "dtype": (lambda q, k, v: (q.double(), k.double(), v.double()), "torch.float64"),
    "mixed": (lambda q, k, v: (q, k.double(), v), "share one dtype"),
    "length": (lambda q, k, v: (q, k, v[:, :5]), "share their length"),
    "heads": (lambda q, k, v: (q[:, :, :1], k, v), "not a multiple"),
    "dimension": (lambda q, k, v: (q[..., :4], k[..., :4], v), "head dimension"),
    "rank": (lambda q, k, v: (q[0], k, v), "3 dimensions"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("first", [True, False], ids=["first call", "later call"])
def test_a_graph_refuses_wrong_inputs(name: str, first: bool) -> None:
    change, message = BAD[name]
    q, k, v = qkv()
    run = compiled(engine())
    if not first:
        run(q, k, v)
    with pytest.raises(Exception, match=message):  # while it traces, torch wraps the error in one of its own
        run(*change(q, k, v))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int64, torch.float64])
def test_a_graph_reads_custom_inputs_as_they_lie(dtype: torch.dtype) -> None:
    built = engine(
        score_mod=lambda s, c, b, h, q, kv: s + c.input_tensors["bias"][h] * kv,
        custom_fwd_inputs=CustomIO({"bias": ("heads",), "unread": ("seq_len",)}),
    )
    q, k, v = qkv(requires_grad=True)
    bias, unread = torch.tensor([1.0, 2.0]).to(dtype), torch.zeros(9)
    if dtype.is_floating_point:
        bias.requires_grad_()
    wrt = [q, k, v, *([bias] if bias.requires_grad else [])]
    run = compiled(built)  # before any other call
    got = run(q, k, v, bias, unread)
    wanted = built.reference(q, k, v, bias, unread).float()
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    tolerance = 1e-2 if dtype is torch.bfloat16 else 1e-4
    for g, w in zip(torch.autograd.grad(got.sum(), wrt), torch.autograd.grad(wanted.sum(), wrt), strict=True):
        torch.testing.assert_close(g, w, rtol=tolerance, atol=tolerance)
    with pytest.raises(errors.CustomInputShape, match="unread"):
        run(q, k, v, bias, unread[:3])


def test_a_graph_notices_what_changed() -> None:
    steep, factor, table = True, 2.0, torch.rand(9)

    def score_mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return (score * factor if steep else score) + table[kv_idx]

    built = engine(score_mod=score_mod)
    q, k, v = qkv()
    run = compiled(built)

    def same() -> None:
        torch.testing.assert_close(run(q, k, v), engine(score_mod=score_mod)(q, k, v))

    same()
    factor = 3.0
    same()
    factor = 5
    same()
    table = torch.rand(9).double()
    same()
    table = torch.rand(4)
    with pytest.raises(errors.IndexOutOfRange, match="table"):
        run(q, k, v)
    table = torch.rand(9)
    steep = False
    with pytest.raises(errors.StaleGraph, match="compile again"):
        run(q, k, v)


class Biased(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bias = torch.nn.Parameter(torch.randn(2))
        self.attention = engine(score_mod=self.score)

    def score(self, score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return score + self.bias[h] * kv_idx

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.attention(q, k, v)


def test_a_graph_notices_a_replaced_parameter() -> None:
    module = Biased()
    q, k, v = qkv()
    torch.compiler.reset()
    run = torch.compile(module, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(run(q, k, v), module(q, k, v))
    with torch.no_grad():
        module.bias.add_(1)
    torch.testing.assert_close(run(q, k, v), module(q, k, v))
    module.bias = torch.nn.Parameter(torch.randn(2))
    try:
        got = run(q, k, v)
    except errors.StaleGraph:
        return
    torch.testing.assert_close(got, module(q, k, v))


def test_a_copied_module_follows_its_own_parameters() -> None:
    import copy

    module = Biased()
    q, k, v = qkv()
    other = copy.deepcopy(module)
    with torch.no_grad():
        other.bias.zero_()
    torch.testing.assert_close(other(q, k, v), engine(scale=1.0)(q, k, v))
    assert not torch.allclose(module(q, k, v), other(q, k, v))


# -- transforms


def test_forward_mode_and_functional_transforms_are_refused() -> None:
    import torch.autograd.forward_ad as forward_ad

    built = engine()
    q, k, v = qkv()
    with forward_ad.dual_level(), pytest.raises(errors.TransformNotSupported, match=r"engine\.reference"):
        built(forward_ad.make_dual(q, torch.ones_like(q)), k, v)
    stacked = q.expand(3, *q.shape)
    for run in (
        lambda: torch.vmap(lambda q: built(q, k, v))(stacked),
        lambda: torch.func.grad(lambda q: built(q, k, v).sum())(q),
        lambda: torch.func.jvp(lambda q: built(q, k, v), (q,), (q,)),
    ):
        with pytest.raises(errors.TransformNotSupported, match=r"torch\.func"):
            run()
    _, tangent = torch.func.jvp(lambda q: built.reference(q, k, v), (q,), (q,))
    assert tangent.abs().max() > 0


@pytest.mark.parametrize("graph", [False, True], ids=["direct", "graph"])
def test_second_derivatives_are_refused(graph: bool) -> None:
    built = engine()
    q, k, v = qkv(requires_grad=True)
    if graph:
        _, key = built._call(built._present, "cpu")
        out = torch.ops.attn_engine.forward(q, k, v, [], [built.scale], key)[0]
    else:
        out = built(q, k, v)
    (gradient,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(errors.TransformNotSupported, match="second derivatives"):
        torch.autograd.grad(gradient.square().sum(), q)
    (gradient,) = torch.autograd.grad(built.reference(q, k, v).square().sum(), q, create_graph=True)
    torch.autograd.grad(gradient.square().sum(), q)

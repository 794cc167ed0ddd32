"""Losses that use the row values: lse and its like carry gradients, in every mode of a call."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from attn_engine import AttentionEngine, meta_tensor
from attn_engine.codegen.pipeline import lower
from attn_engine.codegen.schedule import cpu_schedule
from attn_engine.ir.passes.row_gradients import differentiable_rows, only_row_gradients, with_row_gradients
from attn_engine.library import OnlineRetention, OnlineSoftmax
from attn_engine.runtime.cpu_compile import find_compiler
from tests.gpu_tiles import gpu_schedule
from tests.runtime.rules import program, softmax

CPU = "cpu" if find_compiler() is not None else "torch"


def engine(backend: str = CPU, rule: Any = None, dtype: torch.dtype = torch.float64) -> AttentionEngine:
    """Causal, without keys for query 3, Dq != Dv."""
    metas = [meta_tensor(None, None, None, d, dtype=dtype) for d in (4, 4, 3)]
    return AttentionEngine(
        metas, online_func=rule, mask_mod=lambda b, h, i, j: (j <= i) & (i != 3), backend=backend
    )


def tensors(generator: torch.Generator, dtype: torch.dtype = torch.float64, q: int = 9) -> list[Tensor]:
    shapes = ((2, q, 4, 4), (2, 7, 2, 4), (2, 7, 2, 3))
    return [
        torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes
    ]


@pytest.mark.parametrize("backend", [CPU, "torch", "reference", "triton-interpreter"])
def test_output_and_lse_together(backend: str, generator: torch.Generator) -> None:
    built = engine(backend)

    def both(*qkv: Tensor) -> tuple[Tensor, Tensor]:
        o, rows = built(*qkv, return_final_rowscales=True)
        return o, torch.where(rows["lse"] == -math.inf, 0.0, rows["lse"])

    assert gradcheck(both, tensors(generator), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rule, name", [(OnlineSoftmax(), "lse"), (OnlineRetention(), "abs_sum")])
def test_a_loss_of_row_values_alone(
    rule: Any, name: str, dtype: torch.dtype, generator: torch.Generator
) -> None:
    built = engine(rule=rule, dtype=dtype)
    qkv = tensors(generator, dtype, q=40)
    weight = torch.randn(2, 4, 40, generator=generator)
    found = built(*qkv, return_final_rowscales=True)[1][name]
    exact = built.reference(*qkv, return_final_rowscales=True)[1][name]
    seen = exact > -math.inf  # a weight of 0 times -inf would be NaN in the loss itself
    got = torch.autograd.grad((found[seen] * weight[seen]).sum(), qkv)
    want = torch.autograd.grad((exact[seen] * weight[seen]).sum(), qkv, allow_unused=True)
    # A sum of many rounded terms may be small itself: what is bounded is the error beside the whole tensor.
    tolerance = 1e-5 if dtype is torch.float32 else 1e-2
    for x, y in zip(got, want, strict=True):
        y = torch.zeros_like(x) if y is None else y
        assert (x.double() - y.double()).norm() <= tolerance * y.double().norm()


def test_what_a_loss_makes_of_an_empty_row_moves_nothing(generator: torch.Generator) -> None:
    qkv = tensors(generator)
    _, rows = engine()(*qkv, return_final_rowscales=True)
    (rows["lse"] ** 2).sum().backward()  # the gradient of query 3 is -inf
    assert all(x.grad is not None and x.grad.isfinite().all() for x in qkv)
    assert not qkv[0].grad[:, 3].any()


def test_a_maximum_is_a_constant(generator: torch.Generator) -> None:
    _, rows = engine()(*tensors(generator), return_final_rowscales=True)
    assert rows["lse"].requires_grad
    assert not rows["row_max"].requires_grad
    assert not rows["inverse_sum"].requires_grad


def test_second_derivatives_say_so(generator: torch.Generator) -> None:
    qkv = tensors(generator)
    _, rows = engine()(*qkv, return_final_rowscales=True)
    (dq,) = torch.autograd.grad(rows["lse"][:, :, 5].sum(), qkv[:1], create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        dq.sum().backward()


def test_inside_a_compiled_function(generator: torch.Generator) -> None:
    built = engine(dtype=torch.float32)

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        o, rows = built(q, k, v, return_final_rowscales=True)
        return o.square().sum() + torch.where(rows["lse"] == -math.inf, 0.0, rows["lse"]).sum()

    qkv = tensors(generator, torch.float32)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    got, want = (torch.autograd.grad(f(*qkv), qkv) for f in (compiled, loss))
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y)


def test_the_operators_pass_torch_s_own_tests(generator: torch.Generator) -> None:
    built = engine(dtype=torch.float32)
    q, k, v = tensors(generator, torch.float32)
    traced, captured, numbers, _ = built._bind(q, k, v, (), {})
    _, key = built._call(traced, "cpu")
    arguments = (q, k, v, list(captured.values()), list(numbers.values()), key)
    torch.library.opcheck(torch.ops.attn_engine.forward.default, arguments)
    saved = [x.detach() for x in torch.ops.attn_engine.forward(*arguments)]
    stored = [x.detach() for x in (q, k, v)] + saved
    for d_out, d_rows, used in ((torch.ones_like(saved[0]), [], []), (None, [torch.ones(2, 4, 9)], [0])):
        torch.library.opcheck(
            torch.ops.attn_engine.backward.default,
            (d_out, stored, [], list(numbers.values()), "", d_rows, used, key),
            test_utils=("test_schema", "test_faketensor"),
        )


@pytest.mark.parametrize("schedule", [cpu_schedule(32), gpu_schedule(8, 5, 4)], ids=["cpu", "gpu"])
def test_without_such_a_loss_the_kernels_are_what_they_were(schedule: Any) -> None:
    plain = program()
    moving = program(rule=with_row_gradients(softmax()))
    assert differentiable_rows(plain.rule) == ()
    assert differentiable_rows(moving.rule) == ("lse",)
    assert lower(moving, schedule, "backward") == lower(plain, schedule, "backward")
    assert lower(moving, schedule, "backward", (), ("lse",)) != lower(plain, schedule, "backward")
    assert only_row_gradients(moving.rule, ()) == plain.rule


def test_results_do_not_depend_on_threads(generator: torch.Generator) -> None:
    built = engine(dtype=torch.float32)
    qkv = tensors(generator, torch.float32, q=70)
    found: list[tuple[Tensor, ...]] = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        o, rows = built(*qkv, return_final_rowscales=True)
        seen = rows["lse"] > -math.inf
        found.append(torch.autograd.grad(o.sum() + rows["lse"][seen].sum(), qkv))
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))

"""The chunk algorithm against the token recurrence, in float64: values, gradients, and every form of one definition."""

from __future__ import annotations

import pytest
import torch

from attn_engine import LinearAttentionEngine, meta_tensor
from tests.linear.variants import EVERY, Variant, worst

F64 = torch.float64


@pytest.mark.parametrize("variant", EVERY, ids=str)
def test_chunks_and_their_gradients_are_those_of_the_recurrence(variant: Variant):
    engine = variant.engine(F64, backend="torch", chunk=16)
    inputs = variant.inputs(F64)
    wanted = variant.results(engine.reference, inputs)
    assert worst(variant.results(engine, inputs), wanted) < 1e-9
    assert worst(variant.results(engine.reference, inputs, form="parallel"), wanted) < 1e-9


def test_gradcheck():
    variant = Variant("vector", delta=True, exclusive=True, tokens=18, dims=(3, 2))
    engine = variant.engine(F64, backend="torch", chunk=16)
    inputs = variant.inputs(F64)
    names, leaves = list(inputs), tuple(inputs.values())

    def function(*x: torch.Tensor):
        return variant.call(engine, dict(zip(names, x, strict=True)))

    assert torch.autograd.gradcheck(function, leaves, eps=1e-6, atol=1e-7, rtol=1e-6, fast_mode=True)


@pytest.mark.parametrize("chunk", [32, 64, 128])
def test_the_chunk_length_is_no_part_of_the_result(chunk: int):
    variant = Variant("vector", delta=True, tokens=150)
    inputs = variant.inputs(F64)
    wanted = variant.results(variant.engine(F64, backend="torch", chunk=16), inputs)
    assert worst(variant.results(variant.engine(F64, backend="torch", chunk=chunk), inputs), wanted) < 1e-11


def test_packed_sequences_are_sequences():
    variant = Variant("token", delta=True, packed=True)
    engine = variant.engine(F64, backend="torch", chunk=16)
    x = variant.inputs(F64)
    o, state = variant.call(engine, x)
    for n, (first, end) in enumerate(((0, 7), (7, 7), (7, variant.tokens))):
        part = slice(first, end)
        rows = (x[name][:, part] for name in ("q", "k", "v", "decay"))
        one, after = engine(
            *rows, x["u"], x["s"][:, :, part], x["a"], beta=x["beta"][:, part],
            initial_state=x["state"][n : n + 1], return_final_state=True,
        )  # fmt: skip
        torch.testing.assert_close(o[:, part], one)
        torch.testing.assert_close(state[n : n + 1], after)


def test_a_custom_input_of_two_mods_gets_both_gradients():
    """The existing system returns the gradient of the last mod alone."""
    meta = meta_tensor(None, None, None, 4, dtype=F64)
    from attn_engine import CustomIO

    engine = LinearAttentionEngine(
        [meta] * 3,
        k_mod=lambda k, c: k * c.input_tensors["dt"],
        v_mod=lambda v, c: v * v + c.input_tensors["dt"],  # v_mod need not be a factor of the token
        custom_io=CustomIO({"dt": ("batch", "heads", "seq_len")}),
        backend="torch",
    )
    q, k, v = (torch.randn(1, 20, 2, 4, dtype=F64) for _ in range(3))
    dt = torch.randn(1, 2, 20, dtype=F64, requires_grad=True)
    (found,) = torch.autograd.grad(engine(q, k, v, None, dt).sum(), dt)
    step = dt.transpose(1, 2)[..., None]
    weights = torch.einsum("bqhd,bkhd->bhqk", q, k * step).tril()
    want = torch.einsum("bhqk,bkhd->bqhd", weights, v * v + step)
    (wanted,) = torch.autograd.grad(want.sum(), dt)
    torch.testing.assert_close(found, wanted)


def test_mods_see_positions_and_what_they_capture():
    meta = meta_tensor(None, None, None, 4, dtype=F64)
    table = torch.randn(3, 4, dtype=F64, requires_grad=True)
    factor = 2.0

    def rotated(k, b, h, t):
        return k * factor + t * table[h, 0]

    engine = LinearAttentionEngine([meta] * 3, k_mod=rotated, backend="torch", chunk=16)
    q, k, v = (torch.randn(2, 20, 3, 4, dtype=F64) for _ in range(3))
    (found,) = torch.autograd.grad(engine(q, k, v).sum(), table)
    (wanted,) = torch.autograd.grad(engine.reference(q, k, v).sum(), table)
    torch.testing.assert_close(found, wanted)
    factor = 3.0
    torch.testing.assert_close(engine(q, k, v), engine.reference(q, k, v))

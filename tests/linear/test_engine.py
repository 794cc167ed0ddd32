"""The engine as an object: what it shows, copies, graphs of torch.compile, indices of captured tensors."""

from __future__ import annotations

import copy
import gc
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from attn_engine import CustomIO, LinearAttentionEngine, errors, meta_tensor
from attn_engine.integrations import attention_engine as head_first
from attn_engine.library.linear import gated_delta_net

F32 = torch.float32
META = [meta_tensor(None, None, None, 8, dtype=F32)] * 3


def forget(x: Any, custom: Any) -> Any:
    return -torch.nn.functional.softplus(x) * torch.exp(custom.input_tensors["rate"])


def engine(**options: Any) -> LinearAttentionEngine:
    given = {"decay_mod": forget, "custom_io": CustomIO({"rate": (1, "heads")}), "backend": "torch"}
    return LinearAttentionEngine(META, **(given | options))


def inputs(tokens: int = 20) -> list[Tensor]:
    """q, k, v, decay, rate."""
    torch.manual_seed(0)
    rows = [torch.randn(2, tokens, 2, 8) for _ in range(3)]
    return [x.requires_grad_() for x in (*rows, torch.randn(2, tokens, 2), torch.randn(1, 2))]


def test_what_is_shown():
    shown = engine(chunk=32)
    text = str(shown.explain())
    for words in ("e^decay S + write value^T", "one number for each token", "what the tokens read of each other",
                  "32 tokens each", "8 x 8 float32 for each head, 256 bytes", "in all"):  # fmt: skip
        assert words in text
    assert "16 tokens each, 32 backward" in str(engine().explain())
    delta = LinearAttentionEngine(META, **gated_delta_net(8), backend="torch").explain()
    assert "erase" in delta.sections["Program"] and "(value - erase^T S)" in delta.sections["Program"]
    work = int(shown.explain().sections["Forward, multiplications for a token and head"].split()[-3])
    assert work == 2 * 8 * 8 + 2 * 8 * 33 // 2  # read and write the state; the weights, and what they read
    assert "linear_step" in shown.source("step") and "linear_backward" in shown.source("backward")
    assert repr(shown).startswith("LinearAttentionEngine(linear_forget, float32, D=8, Dv=8, decay='token'")
    with pytest.raises(errors.UnknownOption, match="sideways"):
        shown.source("sideways")


def test_copies():
    first, given = engine(), inputs()
    for other in (copy.deepcopy(first), pickle.loads(pickle.dumps(first))):
        assert other is not first
        assert torch.equal(other(*given), first(*given))
        assert other.explain().sections == first.explain().sections


def test_copies_with_the_calls_of_scripts():
    first = head_first.LinearAttentionEngine(META, decay_mod=forget, custom_io=CustomIO({"rate": (1, "heads")}),
                                             tune=True, backend="torch")  # fmt: skip
    *rows, rate = (x.detach() for x in inputs())
    given = [x.transpose(1, 2) for x in rows]
    wanted = engine()(*rows, rate).transpose(1, 2)
    for one in (first, copy.deepcopy(first), pickle.loads(pickle.dumps(first))):
        assert torch.equal(one(*given, rate), wanted)


class Rate(torch.nn.Module):
    """A module whose method is a mod."""

    def __init__(self) -> None:
        super().__init__()
        self.rate = torch.nn.Parameter(torch.ones(()))
        self.engine = LinearAttentionEngine(META, decay_mod=self.decay, backend="torch")

    def decay(self, x: Any) -> Any:
        return -torch.exp(x) * self.rate


def test_the_engine_of_a_copied_module_follows_the_copy():
    one = Rate()
    other = copy.deepcopy(one)
    with torch.no_grad():
        other.rate.mul_(3.0)
    q, k, v, g, _ = inputs()
    assert not torch.allclose(one.engine(q, k, v, g), other.engine(q, k, v, g))
    (found,) = torch.autograd.grad(other.engine(q, k, v, g).sum(), other.rate)
    assert float(found) != 0


def compiled(function: Any) -> Any:
    torch.compiler.reset()
    return torch.compile(function, backend="aot_eager", fullgraph=True)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_a_graph_has_the_same_numbers(backend: str):
    built = engine(backend=backend)
    given, state = inputs(), torch.randn(2, 2, 8, 8, requires_grad=True)

    def run(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        o, after = built(*tensors[:5], initial_state=tensors[5], return_final_state=True)
        return o * 2.0, after

    found, wanted = compiled(run)(*given, state), run(*given, state)
    loss = (x.square().sum() for x in (*found, *wanted))
    first, second, third, fourth = loss
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    everything = [*given, state]
    got = torch.autograd.grad(first + second, everything)
    for a, b in zip(got, torch.autograd.grad(third + fourth, everything), strict=True):
        torch.testing.assert_close(a, b)


def test_a_graph_of_packed_sequences_and_of_a_delta_rule():
    built = LinearAttentionEngine(META, delta=True, backend="torch", layout="bhsd")
    q, k, v = (torch.randn(1, 2, 30, 8, requires_grad=True) for _ in range(3))
    beta, bounds = torch.rand(1, 2, 30, requires_grad=True), torch.tensor([0, 7, 30])

    def run(q: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> Tensor:
        return built(q, torch.nn.functional.normalize(k, dim=-1), v, beta=beta, cu_seqlens=bounds)

    found, wanted = compiled(run)(q, k, v, beta), run(q, k, v, beta)
    torch.testing.assert_close(found, wanted)
    got = torch.autograd.grad(found.square().sum(), (q, k, v, beta))
    for a, b in zip(got, torch.autograd.grad(wanted.square().sum(), (q, k, v, beta)), strict=True):
        torch.testing.assert_close(a, b)


def test_the_operators_are_sound():
    built, (q, k, v, g, rate) = engine(), inputs(9)
    arguments = (q, k, v, g, None, torch.zeros(2, 2, 8, 8), None, [rate], built._number)
    torch.library.opcheck(torch.ops.attn_engine.linear_forward, arguments)


def test_what_a_graph_refuses():
    q, k, v, g, rate = inputs()
    learned = torch.ones(2, requires_grad=True)
    captured = LinearAttentionEngine(META, decay_mod=lambda x, b, h, t: -learned[h], backend="torch")
    with pytest.raises(
        Exception, match="custom_io"
    ):  # while it traces, torch wraps the error in one of its own
        compiled(captured)(q, k, v, g)
    with pytest.raises(Exception, match="reference"):
        compiled(engine(backend="reference"))(q, k, v, g, rate)
    with pytest.raises(errors.AttnEngineError, match="one number for each token"):
        compiled(engine(decay_rank="token"))(q, k, v, torch.zeros(2), rate)
    built = engine()
    number = built._number
    del built
    gc.collect()
    with pytest.raises(errors.StaleGraph):
        torch.ops.attn_engine.linear_forward(q, k, v, g, None, None, None, [rate], number)


def test_indices_beyond_a_captured_tensor():
    q, k, v, *_ = inputs()
    table = torch.zeros(12)

    def late(x: Any, b: Any, h: Any, t: Any) -> Any:
        return x + table[t]

    with pytest.raises(errors.IndexOutOfRange, match=r"reaches 19, but its size there is 12"):
        LinearAttentionEngine(META, v_mod=late, backend="torch")(q, k, v)
    built = LinearAttentionEngine(META, v_mod=lambda x, b, h, t: x + table[t - 9], backend="torch")
    with pytest.raises(errors.IndexNegative, match="goes down to -9"):
        built(q, k, v)
    ids = torch.arange(20) % 12
    built = LinearAttentionEngine(META, v_mod=lambda x, b, h, t: x + table[ids[t] * 1], backend="torch")
    built(q, k, v)
    ids[3] = 12
    with pytest.raises(errors.IndexOutOfRange, match="reaches 12"):
        built(q, k, v)

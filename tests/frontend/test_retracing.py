"""An engine never computes with values of an earlier call: modules, attributes and OnlineFunc numbers are read anew."""

from __future__ import annotations

import math

import pytest
import torch

from attn_engine import AttentionEngine, errors
from attn_engine.frontend import OnlineFunc, meta_tensor

METAS = (meta_tensor(1, 2, 5, 4, dtype=torch.float32),) * 3


def inputs():
    return [torch.randn(1, 5, 2, 4) for _ in range(3)]


def attention(q, k, v, bias, factor):
    """Plain torch: scores * factor + bias[h] * (q_idx - kv_idx)."""
    distance = torch.arange(5.0)[:, None] - torch.arange(5.0)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * factor + bias[None, :, None, None] * distance
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)


class Attention(torch.nn.Module):
    """The score function is a closure over the module itself."""

    def __init__(self):
        super().__init__()
        self.p, self.factor = torch.nn.Parameter(torch.randn(2)), 0.5
        self.engine = AttentionEngine(
            METAS, lambda s, b, h, i, j: s * self.factor + self.p[h] * (i - j), backend="torch"
        )

    def forward(self, q, k, v):
        return self.engine(q, k, v)


def check(module, qkv):
    torch.testing.assert_close(module(*qkv), attention(*qkv, module.p, module.factor))


def test_a_closure_over_a_module_stays_fresh_and_gets_gradients():
    torch.manual_seed(0)
    module, qkv = Attention(), inputs()
    module(*qkv).square().sum().backward()
    (expected,) = torch.autograd.grad(attention(*qkv, module.p, 0.5).square().sum(), module.p)
    torch.testing.assert_close(module.p.grad, expected)
    torch.optim.SGD(module.parameters(), lr=0.5).step()
    check(module, qkv)
    module.load_state_dict({"p": torch.randn(2)})
    check(module, qkv)
    module.p = torch.nn.Parameter(torch.randn(2))
    check(module, qkv)
    module.factor = 0.25
    check(module, qkv)
    module.factor = torch.tensor(2.0)
    check(module, qkv)


class Tempered(OnlineFunc):
    """Softmax of scores * sharpness."""

    sharpness = 1.0

    def __init__(self):
        super().__init__({"total": 0.0}, {"total": 0.0})

    def online_fwd(self, scores, online_rowscales, b, h, q_idx):
        weights = torch.exp(scores * self.sharpness)
        return weights, {"total": online_rowscales["total"] + weights.get_reduce("sum")}, 1.0

    def online_fwd_epilogue(self, o, online_rowscales, b, h, q_idx):
        return o / online_rowscales["total"], {"total": online_rowscales["total"]}


def test_a_number_of_an_online_function_stays_fresh(monkeypatch):
    torch.manual_seed(1)
    rule, qkv, zero = Tempered(), inputs(), torch.zeros(2)
    engine = AttentionEngine(METAS, online_func=rule, backend="torch")
    torch.testing.assert_close(engine(*qkv), attention(*qkv, zero, 0.5))
    rule.sharpness = 0.5
    torch.testing.assert_close(engine(*qkv), attention(*qkv, zero, 0.25))
    del rule.sharpness
    monkeypatch.setattr(Tempered, "sharpness", math.sqrt(2))
    torch.testing.assert_close(engine(*qkv), attention(*qkv, zero, math.sqrt(0.5)))


def test_a_dictionary_is_no_custom_io():
    with pytest.raises(errors.NotACustomIO, match="custom_fwd_inputs is a dict, not a CustomIO"):
        AttentionEngine(METAS, lambda s, b, h, i, j: s, {"bias": ("heads",)})

"""Every operation, through operators, methods and torch's functions, means on the IR what torch computes."""

from __future__ import annotations

import math
import random

import pytest
import torch
import torch.nn.functional as F

from attn_engine.frontend import trace_mask_mod, trace_score_mod
from attn_engine.ir.evaluate import evaluate
from attn_engine.ir.program import BATCH, HEAD, KV_IDX, Q_IDX, SCORE

FLOATS = {
    "add": lambda s, b, h, q, k: s + 1.5,
    "radd": lambda s, b, h, q, k: 2 + s,
    "sub": lambda s, b, h, q, k: s - q,
    "rsub": lambda s, b, h, q, k: 1 - s,
    "mul": lambda s, b, h, q, k: s * 3,
    "rmul": lambda s, b, h, q, k: 0.5 * s,
    "div": lambda s, b, h, q, k: s / 4,
    "rdiv": lambda s, b, h, q, k: 1 / s,
    "int_div": lambda s, b, h, q, k: s + (q - k) / 4,
    "floordiv": lambda s, b, h, q, k: s + (q - k) // 3,
    "rfloordiv": lambda s, b, h, q, k: s + 17 // (q + 1),
    "mod": lambda s, b, h, q, k: s + (q - k) % 5,
    "rmod": lambda s, b, h, q, k: s + 17 % (q + 1),
    "float_floordiv": lambda s, b, h, q, k: s // 0.7,
    "float_mod": lambda s, b, h, q, k: s % 0.7,
    "neg": lambda s, b, h, q, k: -s,
    "pos": lambda s, b, h, q, k: +s,
    "abs": lambda s, b, h, q, k: abs(s),
    "square": lambda s, b, h, q, k: s**2,
    "cube": lambda s, b, h, q, k: s**3,
    "to_zero": lambda s, b, h, q, k: s**0 + s,
    "inverse": lambda s, b, h, q, k: s**-1,
    "root": lambda s, b, h, q, k: abs(s) ** 0.5,
    "inverse_root": lambda s, b, h, q, k: abs(s) ** -0.5,
    "power": lambda s, b, h, q, k: abs(s) ** 1.7,
    "power_of_two": lambda s, b, h, q, k: 2 ** (-0.5 * (h + 1)) * s,
    "power_of_three": lambda s, b, h, q, k: 3.0**s,
    "power_traced": lambda s, b, h, q, k: abs(s) ** (abs(s) + 0.1),
    "bool_arithmetic": lambda s, b, h, q, k: s * (q >= k),
    "shift_right": lambda s, b, h, q, k: s + ((q - k) >> 2),
    "shift_left": lambda s, b, h, q, k: s + ((q - k) << 2),
    "torch_shift": lambda s, b, h, q, k: s + torch.bitwise_right_shift(q - k, 1),
    "torch_round": lambda s, b, h, q, k: torch.round(s * 4),
    "round_ties": lambda s, b, h, q, k: torch.round((q - k) / 2) + s,
    "round_decimals": lambda s, b, h, q, k: torch.round(s, decimals=2),
    "round_almost_half": lambda s, b, h, q, k: s + torch.round(s * 0.0 + 0.49999999999999994),
    "round_large": lambda s, b, h, q, k: s + (torch.round(s * 0.0 + 4503599627370497.0) - 4503599627370497.0),
    "trunc": lambda s, b, h, q, k: torch.trunc(s * 3) + s.fix(),
    "frac": lambda s, b, h, q, k: torch.frac(s * 3),
    "fmod": lambda s, b, h, q, k: torch.fmod(s, 0.7),
    "fmod_int": lambda s, b, h, q, k: s + torch.fmod(q - k, 3) + torch.fmod(q - k, -3),
    "div_trunc": lambda s, b, h, q, k: torch.div(s, 0.3, rounding_mode="trunc"),
    "div_trunc_int": lambda s, b, h, q, k: s + torch.div(k - q, 3, rounding_mode="trunc"),
    "relu_squared": lambda s, b, h, q, k: torch.relu(s) ** 2,
    "soft_cap": lambda s, b, h, q, k: 20 * torch.tanh(s / 20),
    "torch_add": lambda s, b, h, q, k: torch.add(s, 1, alpha=2),
    "torch_sub": lambda s, b, h, q, k: torch.sub(s, s * 2, alpha=3),
    "torch_rsub": lambda s, b, h, q, k: torch.rsub(s, 2),
    "torch_mul": lambda s, b, h, q, k: torch.mul(s, 2),
    "torch_div": lambda s, b, h, q, k: torch.div(s, 0.3, rounding_mode="floor"),
    "torch_floor_divide": lambda s, b, h, q, k: s + torch.floor_divide(q - k, 3),
    "torch_remainder": lambda s, b, h, q, k: s + torch.remainder(q - k, 3),
    "torch_where": lambda s, b, h, q, k: torch.where(q >= k, s, -float("inf")),
    "torch_where_tensor": lambda s, b, h, q, k: torch.where(q >= k, s, torch.tensor(3.0)),
    "method_where": lambda s, b, h, q, k: s.where(q >= k, 2.0),
    "torch_clamp": lambda s, b, h, q, k: torch.clamp(s, min=-0.5, max=0.75),
    "torch_clip": lambda s, b, h, q, k: torch.clip(s, -0.5, 0.75),
    "method_clamp": lambda s, b, h, q, k: s.clamp(min=0.1),
    "int_clamp": lambda s, b, h, q, k: s + torch.clamp(q - k, -2, 3),
    "torch_maximum": lambda s, b, h, q, k: torch.maximum(s, s * 2),
    "torch_minimum": lambda s, b, h, q, k: torch.minimum(s, -s),
    "torch_max": lambda s, b, h, q, k: torch.max(s, -s),
    "torch_pow": lambda s, b, h, q, k: torch.pow(s, 2),
    "torch_pow_base": lambda s, b, h, q, k: torch.pow(2, s),
    "torch_square": lambda s, b, h, q, k: torch.square(s),
    "torch_sign": lambda s, b, h, q, k: torch.sign(s) + torch.sign(q - k),
    "torch_floor": lambda s, b, h, q, k: torch.floor(s * 3),
    "torch_ceil": lambda s, b, h, q, k: torch.ceil(s * 3),
    "torch_reciprocal": lambda s, b, h, q, k: torch.reciprocal(s),
    "torch_full_like": lambda s, b, h, q, k: torch.where(q > k, s, torch.full_like(s, 2.0)),
    "torch_zeros_like": lambda s, b, h, q, k: s + torch.zeros_like(s) + torch.ones_like(s),
    "float_cast": lambda s, b, h, q, k: s * q.float() + h.to(torch.float32),
    "int_cast": lambda s, b, h, q, k: s + (s * 3).int() + (s * 2).to(torch.int64),
    "bool_cast": lambda s, b, h, q, k: s + (q > k).int(),
    "softplus": lambda s, b, h, q, k: F.softplus(s),
    "softplus_beta": lambda s, b, h, q, k: F.softplus(s * 10, 2.0, 5.0),
    "silu": lambda s, b, h, q, k: F.silu(s),
    "relu": lambda s, b, h, q, k: F.relu(s),
    "leaky_relu": lambda s, b, h, q, k: F.leaky_relu(s, 0.2),
    "elu": lambda s, b, h, q, k: F.elu(s),
    "gelu": lambda s, b, h, q, k: F.gelu(s, approximate="tanh"),
    "hardtanh": lambda s, b, h, q, k: F.hardtanh(s),
    "logsigmoid": lambda s, b, h, q, k: F.logsigmoid(s),
    "expit": lambda s, b, h, q, k: torch.special.expit(s),
    "scalar_tensor_left": lambda s, b, h, q, k: torch.tensor(2.0) * s - torch.tensor(1.0) / s,
    "in_two_names": lambda s, b, h, q, k: (lambda y: y * y + y)(torch.tanh(s)),
}
for _name in ("exp", "exp2", "tanh", "sigmoid", "sin", "cos", "expm1", "abs", "neg", "relu", "square", "tan"):
    FLOATS[f"torch_{_name}"] = lambda s, b, h, q, k, f=_name: _apply(torch, f, s)
    FLOATS[f"method_{_name}"] = lambda s, b, h, q, k, f=_name: _apply(None, f, s)
for _name in ("log", "log2", "sqrt", "rsqrt", "log1p"):
    FLOATS[f"torch_{_name}"] = lambda s, b, h, q, k, f=_name: _apply(torch, f, abs(s))
    FLOATS[f"method_{_name}"] = lambda s, b, h, q, k, f=_name: _apply(None, f, abs(s))


def _apply(module, name, x):
    return getattr(x, name)() if module is None else getattr(module, name)(x)


BOOLS = {
    "le": lambda b, h, q, k: k <= q,
    "lt": lambda b, h, q, k: 3 < q,
    "ge": lambda b, h, q, k: k >= 2,
    "gt": lambda b, h, q, k: k > q,
    "eq": lambda b, h, q, k: q // 4 == k // 4,
    "ne": lambda b, h, q, k: q % 4 != k % 4,
    "and": lambda b, h, q, k: (k <= q) & (q - k < 5),
    "or": lambda b, h, q, k: (k < 3) | (k <= q),
    "not": lambda b, h, q, k: ~(k <= q),
    "xor": lambda b, h, q, k: (k <= q) ^ (h == 1),
    "logical_and": lambda b, h, q, k: torch.logical_and(k <= q, h > 0),
    "logical_or": lambda b, h, q, k: torch.logical_or(k <= q, h > 0),
    "logical_not": lambda b, h, q, k: torch.logical_not(k <= q),
    "logical_xor": lambda b, h, q, k: torch.logical_xor(k <= q, h > 0),
    "logical_ints": lambda b, h, q, k: torch.logical_and(h, b),
    "functions": lambda b, h, q, k: torch.le(k, q) & torch.ne(k, 2) & torch.ge(q, 1),
    "where": lambda b, h, q, k: torch.where(h == 0, k <= q, k >= q),
    "abs": lambda b, h, q, k: (q - k).abs() <= 3,
    "dilated": lambda b, h, q, k: (q - k) % 3 == 0,
}


def points(count=12):
    source = random.Random(7)
    for _ in range(count):
        score = source.choice([-1, 1]) * source.uniform(0.05, 2.2)
        yield score, source.randrange(3), source.randrange(4), source.randrange(16), source.randrange(16)


def as_torch(point):
    score, *where = point
    return torch.tensor(score, dtype=torch.float64), *(torch.tensor(i) for i in where)


@pytest.mark.parametrize("name", FLOATS)
def test_score_operation(name):
    function = FLOATS[name]
    trace = trace_score_mod(lambda s, b, h, q, k: function(s, b, h, q, k))
    for point in points():
        got = evaluate(trace.fn.result, _environment(trace, point))
        expected = float(function(*as_torch(point)))
        assert math.isclose(got, expected, rel_tol=1e-6, abs_tol=1e-7) or got == expected, point


@pytest.mark.parametrize("name", BOOLS)
def test_mask_operation(name):
    function = BOOLS[name]
    trace = trace_mask_mod(function)
    for point in points():
        got = evaluate(trace.fn.result, _environment(trace, point))
        assert bool(got) == bool(function(*as_torch(point)[1:])), point


def _environment(trace, point):
    inputs = dict(zip((SCORE, BATCH, HEAD, Q_IDX, KV_IDX), point, strict=True))
    return {**inputs, **{s.var: s.accessor() for s in trace.scalars}}


def test_relu_and_clamp_have_torchs_gradient_at_the_edge():
    from attn_engine.ir.passes.autodiff import derivative

    relu = derivative(trace_score_mod(lambda s, b, h, q, k: torch.relu(s)).fn.result, SCORE)
    clamp = derivative(trace_score_mod(lambda s, b, h, q, k: torch.clamp(s, 0.0, 1.0)).fn.result, SCORE)
    for point in (-0.5, 0.0, 0.5, 1.0, 2.0):
        for function, slope in ((torch.relu, relu), (lambda x: torch.clamp(x, 0.0, 1.0), clamp)):
            x = torch.tensor(point, requires_grad=True)
            (expected,) = torch.autograd.grad(function(x), x)
            assert evaluate(slope, {SCORE: point}) == expected.item()


@pytest.mark.parametrize(
    "function",
    [torch.round, torch.trunc, torch.frac, lambda x: torch.fmod(x, 0.7)],
)
def test_composed_gradients(function):
    from attn_engine.ir.passes.autodiff import derivative

    slope = derivative(trace_score_mod(lambda s, b, h, q, k: function(s)).fn.result, SCORE)
    for point in (-40.0, -2.3, -0.46875, -0.1, 0.0, 1e-9, 0.3, 0.46875, 0.47, 1.1, 4.2, 7.0):
        x = torch.tensor(point, dtype=torch.float64, requires_grad=True)
        (expected,) = torch.autograd.grad(function(x), x)
        assert math.isclose(evaluate(slope, {SCORE: point}), expected.item(), rel_tol=1e-9, abs_tol=1e-9), (
            point
        )

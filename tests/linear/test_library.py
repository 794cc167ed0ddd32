"""Library entries against recurrences written from the papers, token by token, in plain torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attn_engine import LinearAttentionEngine, errors, meta_tensor
from attn_engine.library import linear

F64 = torch.float64
B, T, H, D, DV = 2, 37, 3, 8, 6


def engine(**arguments) -> LinearAttentionEngine:
    qk, v = (meta_tensor(None, None, None, n, dtype=F64) for n in (D, DV))
    return LinearAttentionEngine([qk, qk, v], backend="torch", chunk=16, **arguments)


@pytest.fixture
def rows() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return (
        torch.randn(B, T, H, D, dtype=F64),
        torch.randn(B, T, H, D, dtype=F64),
        torch.randn(B, T, H, DV, dtype=F64),
    )


def recurrence(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | float = 0.0, beta: Tensor | None = None
) -> Tensor:
    """o_t = q_t S_t; S_t = e^decay S_{t-1} + k v, or the delta rule with strength beta."""
    decay = torch.as_tensor(decay, dtype=F64)
    decay = decay.expand(B, T, H, D) if decay.ndim != 3 else decay[..., None].expand(B, T, H, D)
    state, found = torch.zeros(B, H, D, v.shape[-1], dtype=F64), []
    for t in range(T):
        state = state * decay[:, t, :, :, None].exp()
        new = v[:, t]
        if beta is not None:
            new = beta[:, t, :, None] * (new - torch.einsum("bhd,bhdv->bhv", k[:, t], state))
        state = state + torch.einsum("bhd,bhv->bhdv", k[:, t], new)
        found.append(torch.einsum("bhd,bhdv->bhv", q[:, t], state))
    return torch.stack(found, 1)


def same(found: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(found, want, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("feature", ["elu", "relu"])
def test_linear_transformer(rows, feature):
    q, k, v = rows
    phi = torch.relu if feature == "relu" else lambda x: torch.nn.functional.elu(x) + 1
    out = engine(**linear.linear_transformer(feature))(q, k, v)
    total = recurrence(phi(q), phi(k), torch.ones_like(v[..., :1])) + 1e-6
    same(out, recurrence(phi(q), phi(k), v) / total)
    with pytest.raises(errors.UnknownOption, match="cosine"):
        linear.linear_transformer("cosine")


def test_retnet_and_lightning(rows):
    q, k, v = rows
    heads = torch.arange(H, dtype=F64)
    gamma = torch.log(1 - 2.0 ** (-5 - heads))[:, None].expand(H, D)
    same(engine(**linear.retnet(H, D))(q, k, v), recurrence(q * D**-0.5, k, v, gamma.expand(B, T, H, D)))
    slopes = (-8 / H * (1 - 1 / 4) * heads)[:, None].expand(H, D)
    same(engine(**linear.lightning(H, 1, 4))(q, k, v), recurrence(q, k, v, slopes.expand(B, T, H, D)))


def test_mamba2_with_one_group():
    torch.manual_seed(0)
    c, b = (torch.randn(B, T, 1, D, dtype=F64) for _ in range(2))
    x, dt, a = (
        torch.randn(B, T, H, DV, dtype=F64),
        torch.rand(B, T, H, dtype=F64),
        -torch.rand(1, H, dtype=F64),
    )
    out = engine(**linear.mamba2())(c, b, x, dt, a)
    wide = (y.expand(B, T, H, D) for y in (c, b))
    same(out, recurrence(*wide, x * dt[..., None], a[:, None] * dt))


def test_gates(rows):
    q, k, v = rows
    gate = torch.randn(B, T, H, D, dtype=F64)
    log_gate = torch.nn.functional.logsigmoid(gate) / 16
    same(engine(**linear.gla(D))(q, k, v, gate), recurrence(q * D**-0.5, k, v, log_gate))
    one = log_gate[..., 0]
    same(engine(**linear.simple_gla(D))(q, k, v, gate[..., 0]), recurrence(q * D**-0.5, k, v, one))
    same(engine(**linear.hgrn2())(q, k, v, log_gate), recurrence(q, 1 - log_gate.exp(), v, log_gate))


def test_rwkv6(rows):
    r, k, v = rows
    w, u = torch.randn(B, T, H, D, dtype=F64), torch.randn(H, D, dtype=F64)
    state, found = torch.zeros(B, H, D, DV, dtype=F64), []
    for t in range(T):
        write = torch.einsum("bhd,bhv->bhdv", k[:, t], v[:, t])
        found.append(torch.einsum("bhd,bhdv->bhv", r[:, t], state + u[..., None] * write))
        state = state * torch.exp(-torch.exp(w[:, t]))[..., None] + write
    same(engine(**linear.rwkv6())(r, k, v, w, u), torch.stack(found, 1))


def test_the_delta_family(rows):
    q, k, v = rows
    unit_q, unit_k = (x / x.norm(dim=-1, keepdim=True) for x in (q, k))
    beta, decay = torch.randn(B, T, H, dtype=F64), -torch.rand(B, T, H, D, dtype=F64)
    strength = torch.sigmoid(beta)
    scaled = unit_q * D**-0.5
    same(engine(**linear.delta_net(D))(q, k, v, beta=beta), recurrence(scaled, unit_k, v, beta=strength))
    negative = engine(**linear.delta_net(D, allow_negative_eigenvalues=True))(q, k, v, beta=beta)
    same(negative, recurrence(scaled, unit_k, v, beta=2 * strength))
    out = engine(**linear.kimi_delta(D))(q, k, v, decay, beta=beta)
    same(out, recurrence(scaled, unit_k, v, decay, strength))
    a, a_log, bias = (
        torch.randn(B, T, H, dtype=F64),
        torch.randn(1, H, dtype=F64),
        torch.randn(1, H, dtype=F64),
    )
    out = engine(**linear.gated_delta_net(D))(q, k, v, a, a_log, bias, beta=beta)
    log_decay = -torch.exp(a_log) * torch.nn.functional.softplus(a + bias)
    same(out, recurrence(scaled, unit_k, v, log_decay, strength))


def test_mlstm(rows):
    q, k, v = rows
    i, f = 3 * torch.randn(B, T, H, dtype=F64), 2 + torch.randn(B, T, H, dtype=F64)
    decay, gate, stabiliser = linear.mlstm_gates(i, f)
    out = engine(**linear.mlstm(D))(q, k, v, decay, gate, stabiliser)
    log_f = torch.nn.functional.logsigmoid(f)
    plain = k * D**-0.5 * i.exp()[..., None]  # without a stabiliser, which float64 does not need here
    total = recurrence(q, plain, torch.ones_like(v[..., :1]), log_f).abs()
    same(out, recurrence(q, plain, v, log_f) / total.clamp(min=1.0))

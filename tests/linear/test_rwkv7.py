"""RWKV-7 against the recurrence of the paper, token by token."""

from __future__ import annotations

import torch

from attn_engine import LinearAttentionEngine, meta_tensor
from attn_engine.library.linear import rwkv7, rwkv7_rows

F64 = torch.float64
B, T, H, D, DV = 2, 37, 3, 8, 6


def test_rwkv7():
    torch.manual_seed(0)
    r, k, w, e = (torch.randn(B, T, H, D, dtype=F64) for _ in range(4))
    e = torch.nn.functional.normalize(e, dim=-1).requires_grad_()
    v, a = torch.randn(B, T, H, DV, dtype=F64), torch.rand(B, T, H, D, dtype=F64, requires_grad=True)
    decay = -torch.exp(torch.tensor(-0.5, dtype=F64)) * torch.sigmoid(w)
    state, rows = torch.zeros(B, H, D, DV, dtype=F64), []
    for t in range(T):
        held = torch.einsum("bhd,bhdv->bhv", e[:, t], state)
        state = (
            decay[:, t, :, :, None].exp() * state
            - torch.einsum("bhd,bhv->bhdv", a[:, t] * e[:, t], held)
            + torch.einsum("bhd,bhv->bhdv", k[:, t], v[:, t])
        )
        rows.append(torch.einsum("bhd,bhdv->bhv", r[:, t], state))
    wanted = torch.stack(rows, 1)
    metas = [meta_tensor(None, None, None, n, dtype=F64) for n in (D, D, DV)]
    engine = LinearAttentionEngine(metas, **rwkv7(), backend="torch", chunk=16)
    o, last = engine(*rwkv7_rows(r, k, v, decay, e, a), return_final_state=True)
    torch.testing.assert_close(o[:, 1::2], wanted)
    torch.testing.assert_close(last, state)
    weights = torch.randn(wanted.shape, dtype=F64)
    found = torch.autograd.grad(o[:, 1::2], (e, a), weights)
    for one, other in zip(found, torch.autograd.grad(wanted, (e, a), weights), strict=True):
        torch.testing.assert_close(one, other)

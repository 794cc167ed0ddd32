"""Errors against float64 beside those of torch in the same type, root mean square over each tensor and several inputs.

In float32 they stay near the larger of two: those of the formula written in plain operators, and those of torch's own
fused attention. The first is the smaller where few keys of a row matter: its gradient subtracts a row sum made of the
very products that it is subtracted from, so their rounding cancels, which no fused kernel can do. In bfloat16 they may
reach twice those of plain operators.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from attn_engine import AttentionEngine, meta_tensor

HEADS = 2
SLOPES = torch.tensor([0.5, 0.0625])


def causal(b: Any, h: Any, q: Any, kv: Any) -> Any:
    return kv <= q


def alibi(s: Any, b: Any, h: Any, q: Any, kv: Any) -> Any:
    return s + SLOPES[h] * (kv - q)


def soft_cap(s: Any, b: Any, h: Any, q: Any, kv: Any) -> Any:
    return 20.0 * torch.tanh(s / 20.0)


VARIANTS: dict[str, dict[str, Callable[..., Any]]] = {
    "full": {},
    "causal": {"mask_mod": causal},
    "causal ALiBi": {"mask_mod": causal, "score_mod": alibi},
    "soft-cap": {"score_mod": soft_cap},
}


def eager(name: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What a user writes in torch, in the tensors' own type; q, k, v are (1, heads, S, D)."""
    i = torch.arange(q.shape[2])
    score = q @ k.transpose(-1, -2) * q.shape[3] ** -0.5
    if "ALiBi" in name:
        score = score + (SLOPES[:, None, None] * (i[None, :] - i[:, None])).to(q.dtype)
    if "soft-cap" in name:
        score = 20.0 * torch.tanh(score / 20.0)
    if "causal" in name:
        score = score.masked_fill(i[None, :] > i[:, None], -torch.inf)
    return torch.softmax(score, -1) @ v


def fused(name: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor | None:
    """torch's own kernel, where it can compute this."""
    if "soft-cap" in name:
        return None
    if "ALiBi" not in name:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal="causal" in name)
    i = torch.arange(q.shape[2])
    bias = SLOPES[:, None, None] * (i[None, :] - i[:, None])
    bias = bias.masked_fill(i[None, :] > i[:, None], -torch.inf).to(q.dtype)
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias[None])


def squared_errors(o: Tensor | None, leaves: list[Tensor], d_out: Tensor, wanted: list[Tensor]) -> Tensor:
    """Mean square of the error of o, dq, dk and dv."""
    if o is None:
        return torch.zeros(4, dtype=torch.float64)
    results = [o.detach(), *torch.autograd.grad(o, leaves, d_out)]
    return torch.stack([(r.double() - w).pow(2).mean() for r, w in zip(results, wanted, strict=True)])


@pytest.mark.parametrize("dtype, allowed", [(torch.float32, 1.25), (torch.bfloat16, 2.0)])
@pytest.mark.parametrize("length", [64, 1000])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("name", VARIANTS)
def test_errors_are_those_of_torch(
    name: str, dim: int, length: int, dtype: torch.dtype, allowed: float, generator: torch.Generator
) -> None:
    metas = [meta_tensor(None, None, None, dim, dtype=dtype)] * 3
    engine = AttentionEngine(metas, backend="cpu", layout="bhsd", scale=dim**-0.5, **VARIANTS[name])
    totals = torch.zeros(3, 4, dtype=torch.float64)
    for _ in range(4):
        shape = (1, HEADS, length, dim)
        q, k, v, d_out = (torch.randn(shape, generator=generator).to(dtype) for _ in range(4))
        leaves = [x.requires_grad_() for x in (q, k, v)]
        doubles = [x.detach().double().requires_grad_() for x in leaves]
        exact = eager(name, *doubles)
        wanted = [exact.detach(), *torch.autograd.grad(exact, doubles, d_out.double())]
        for total, o in zip(
            totals, (engine(*leaves), eager(name, *leaves), fused(name, *leaves)), strict=True
        ):
            total += squared_errors(o, leaves, d_out, wanted)
    ours, plain, own = totals.sqrt()
    limit = torch.maximum(plain, own) if dtype is torch.float32 else plain
    for what, a, b in zip(("o", "dq", "dk", "dv"), ours.tolist(), limit.tolist(), strict=True):
        assert a <= allowed * b, f"{what}: {a:.2e} against {b:.2e} of torch"

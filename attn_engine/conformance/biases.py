"""Section 4g: learned biases, with their gradients."""

from __future__ import annotations

from typing import Any

import torch

from attn_engine.conformance.entries import Make, Shape, Table
from attn_engine.conformance.scores import both, integers, normal

BIASES = Table()
S = 37
SMALL = Shape(q_len=S, kv_len=S)


def add(name: str, score: Make, **what: Any) -> None:
    BIASES.add(name, "4g learned bias", score=score, **{"shape": SMALL, "learned": ("bias",), **what})


add(
    "relative, one dimension",
    lambda bias: lambda s, b, h, q, kv: s + bias[q - kv + S - 1],
    tensors=normal(2 * S - 1),
)
add("absolute, two dimensions", lambda bias: lambda s, b, h, q, kv: s + bias[q, kv], tensors=normal(S, S))
add("per head", lambda bias: lambda s, b, h, q, kv: s + bias[h, q, kv], tensors=normal("heads", S, S))
add(
    "per batch and head",
    lambda bias: lambda s, b, h, q, kv: s + bias[b, h, q, kv],
    tensors=normal("batches", "heads", S, S),
)
add("multiplicative", lambda bias: lambda s, b, h, q, kv: s * bias[q, kv], tensors=normal(S, S))
add(
    "clamped to a window",
    lambda bias: lambda s, b, h, q, kv: s + bias[torch.clamp(q - kv, -8, 8) + 8],
    tensors=normal(17),
)
add(
    "clamped to a window, per head",
    lambda bias: lambda s, b, h, q, kv: s + bias[h, torch.clamp(q - kv, -8, 8) + 8],
    tensors=normal("heads", 17),
)
add(
    "global tokens",
    lambda bias: lambda s, b, h, q, kv: s + torch.where(kv < 4, bias[torch.clamp(kv, 0, 3)], 0.0),
    tensors=normal(4),
)
add(
    "by batch, head and a fixed key",
    lambda bias: lambda s, b, h, q, kv: s + bias[b, h, 4] * kv,
    tensors=normal("batches", "heads", S),
)
add(
    "by a computed index",
    lambda bias, offset: lambda s, b, h, q, kv: s + bias[offset[q]] * kv,
    tensors=both(normal(S), integers(offset=lambda s: (torch.arange(S) * 7) % S)),
)
add(
    "symmetric bias[q] + bias[kv]",
    lambda bias: lambda s, b, h, q, kv: s + bias[q] + bias[kv],
    tensors=normal(S),
)
add(
    "flipped bias[S - 1 - q]", lambda bias: lambda s, b, h, q, kv: s + bias[S - 1 - q] * kv, tensors=normal(S)
)
add(
    "sigmoid gate per head",
    lambda bias: lambda s, b, h, q, kv: s * torch.sigmoid(bias[h]),
    tensors=normal("heads"),
)
add(
    "double index bias[b][q, kv]",
    lambda bias: lambda s, b, h, q, kv: s + bias[b][q, kv],
    tensors=normal("batches", S, S),
)
add(
    "two biases",
    lambda bias, other: lambda s, b, h, q, kv: s + bias[q, kv] + other[h, kv],
    tensors=both(normal(S, S), normal("heads", S, name="other")),
    learned=("bias", "other"),
)
add(
    "only the bias requires a gradient",
    lambda bias: lambda s, b, h, q, kv: s + bias[q, kv],
    tensors=normal(S, S), only_learned=True,
)  # fmt: skip
add(
    "with a causal mask",
    lambda bias: lambda s, b, h, q, kv: s + bias[q - kv],
    tensors=normal(S), mask=lambda bias: lambda b, h, q, kv: q >= kv,
)  # fmt: skip

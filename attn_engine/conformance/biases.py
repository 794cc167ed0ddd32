"""Section 4g: learned biases, with their gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attn_engine.conformance.entries import Make, Shape, Table
from attn_engine.conformance.scores import both, integers, normal

BIASES = Table()
SHAPES = {
    "": Shape(q_len=37, kv_len=37),
    ", length 256": Shape(heads=2, kv_heads=2, q_len=256, kv_len=256),
    ", length 277": Shape(heads=2, kv_heads=2, q_len=277, kv_len=277),
}


def add(name: str, score: Make, longest: int = 277, **what: Any) -> None:
    """The bias at every length up to the longest that the definition has memory for."""
    for suffix, shape in SHAPES.items():
        if shape.q_len > longest:
            continue
        given = {"shape": shape, "learned": ("bias",), **what}
        BIASES.add(name + suffix, "4g learned bias", score=score, **given)


def distances(shape: Shape, generator: torch.Generator) -> dict[str, Tensor]:
    """A bias for each distance of a query and a key."""
    return {"bias": torch.randn(2 * shape.q_len - 1, generator=generator)}


add(
    "relative, one dimension",
    lambda bias: lambda s, b, h, q, kv: s + bias[q - kv + len(bias) // 2],
    tensors=distances,
)
add(
    "absolute, two dimensions",
    lambda bias: lambda s, b, h, q, kv: s + bias[q, kv],
    tensors=normal("q_len", "kv_len"),
)
add(
    "per head",
    lambda bias: lambda s, b, h, q, kv: s + bias[h, q, kv],
    tensors=normal("heads", "q_len", "kv_len"),
)
add(
    "per batch and head",
    lambda bias: lambda s, b, h, q, kv: s + bias[b, h, q, kv],
    tensors=normal("batches", "heads", "q_len", "kv_len"),
)
add("multiplicative", lambda bias: lambda s, b, h, q, kv: s * bias[q, kv], tensors=normal("q_len", "kv_len"))
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
    tensors=normal("batches", "heads", "kv_len"),
)
add(
    "by a computed index",
    lambda bias, offset: lambda s, b, h, q, kv: s + bias[offset[q]] * kv,
    tensors=both(normal("q_len"), integers(offset=lambda s: (torch.arange(s.q_len) * 7) % s.q_len)),
)
add(
    "symmetric bias[q] + bias[kv]",
    lambda bias: lambda s, b, h, q, kv: s + bias[q] + bias[kv],
    tensors=normal("q_len"),
)
add(
    "flipped bias[n - 1 - q]",
    lambda bias: lambda s, b, h, q, kv: s + bias[len(bias) - 1 - q] * kv,
    tensors=normal("q_len"),
)
add(
    "sigmoid gate per head",
    lambda bias: lambda s, b, h, q, kv: s * torch.sigmoid(bias[h]),
    tensors=normal("heads"),
)
add(
    "double index bias[b][q, kv]",
    lambda bias: lambda s, b, h, q, kv: s + bias[b][q, kv],
    longest=37,
    tensors=normal("batches", "q_len", "kv_len"),
)
add(
    "two biases",
    lambda bias, other: lambda s, b, h, q, kv: s + bias[q, kv] + other[h, kv],
    tensors=both(normal("q_len", "kv_len"), normal("heads", "kv_len", name="other")),
    learned=("bias", "other"),
)
add(
    "only the bias requires a gradient",
    lambda bias: lambda s, b, h, q, kv: s + bias[q, kv],
    tensors=normal("q_len", "kv_len"), only_learned=True,
)  # fmt: skip
add(
    "with a causal mask",
    lambda bias: lambda s, b, h, q, kv: s + bias[q - kv],
    tensors=normal("q_len"), mask=lambda bias: lambda b, h, q, kv: q >= kv,
)  # fmt: skip

"""Gated Linear Attention (arXiv:2312.06635, section 4) and gated retention, one gate a head (2405.05254)."""

from __future__ import annotations

from typing import Any

import torch


def gla(dim: int, temperature: float = 16.0) -> dict[str, Any]:
    """A forget gate of each token and dimension of k, sigmoid(x)^(1 / temperature); the call's decay is x."""
    return {**simple_gla(dim, temperature), "decay_rank": "vector"}


def simple_gla(dim: int, temperature: float = 16.0) -> dict[str, Any]:
    """The same with one gate of each token and head. dim: that of q, whose scores are scaled."""

    def log_gate(x: Any) -> Any:
        return torch.nn.functional.logsigmoid(x) / temperature

    return {"decay_mod": log_gate, "scale": dim**-0.5, "decay_rank": "token"}

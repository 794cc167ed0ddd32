"""DeltaNet (arXiv:2406.06484, section 2): what the state holds for a key is replaced, by a learned part."""

from __future__ import annotations

from typing import Any

import torch


def unit_row(x: Any) -> Any:
    """A row of length 1."""
    return x * torch.rsqrt((x * x).sum(-1) + 1e-6)


def delta_net(dim: int, allow_negative_eigenvalues: bool = False) -> dict[str, Any]:
    """S_t = S_{t-1} + beta_t k_t (v_t - S_{t-1}^T k_t)^T, beta = sigmoid of what the call brings.

    dim: that of q, whose scores are scaled. allow_negative_eigenvalues: beta from 0 to 2 (arXiv:2411.12537).
    """
    largest = 2.0 if allow_negative_eigenvalues else 1.0

    def strength(beta: Any) -> Any:
        return largest * torch.sigmoid(beta)

    return {
        "q_mod": unit_row,
        "k_mod": unit_row,
        "beta_mod": strength,
        "scale": dim**-0.5,
        "decay_rank": "none",
    }

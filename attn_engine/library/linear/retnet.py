"""Retentive Network (arXiv:2307.08621, section 2): a fixed decay for each head."""

from __future__ import annotations

from typing import Any

import torch


def retnet(heads: int, dim: int) -> dict[str, Any]:
    """gamma_h = 1 - 2^(-5 - h), without the rotation of q and k; dim: that of q, whose scores are scaled."""
    # log1p in double: in float32, 1 - 2^-25 is 1.
    decays = torch.log1p(-torch.exp2(-5.0 - torch.arange(heads, dtype=torch.float64))).float()

    def head_decay(_: Any, b: Any, h: Any, t: Any) -> Any:
        return decays[h]

    return {"decay_mod": head_decay, "scale": dim**-0.5, "decay_rank": "none"}

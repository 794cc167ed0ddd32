"""Gated DeltaNet (arXiv:2412.06464, section 3): the delta rule with a decay of each token, as in Mamba-2."""

from __future__ import annotations

from typing import Any

import torch

from attn_engine.frontend import CustomIO
from attn_engine.library.linear.delta_net import delta_net


def gated_delta_net(dim: int, allow_negative_eigenvalues: bool = False) -> dict[str, Any]:
    """log decay = -e^{A_log} softplus(a_t + dt_bias): call it with (q, k, v, a, A_log, dt_bias, beta=...), A_log and
    dt_bias (heads,)."""

    def log_decay(a: Any, custom: Any) -> Any:
        given = custom.input_tensors
        return -torch.exp(given["A_log"]) * torch.nn.functional.softplus(a + given["dt_bias"])

    return {
        **delta_net(dim, allow_negative_eigenvalues),
        "decay_mod": log_decay,
        "custom_io": CustomIO({"A_log": (1, "heads"), "dt_bias": (1, "heads")}),
        "decay_rank": "token",
    }

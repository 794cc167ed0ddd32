"""RWKV-6, Finch (arXiv:2404.05892, section 4): the state is read before the token writes, which has a bonus instead."""

from __future__ import annotations

from typing import Any

import torch

from attn_engine.frontend import CustomIO


def rwkv6() -> dict[str, Any]:
    """o_t = r_t (S_{t-1} + diag(u) k_t v_t^T), S_t = diag(e^{-e^{w_t}}) S_{t-1} + k_t v_t^T.

    Call it with (r, k, v, w, u), u (heads, dim).
    """

    def bonus(k: Any, custom: Any) -> Any:
        return k * custom.input_tensors["u"]

    def log_decay(w: Any) -> Any:
        return -torch.exp(w)

    return {
        "decay_mod": log_decay,
        "bonus_mod": bonus,
        "phase": "exclusive",
        "custom_io": CustomIO({"u": ("heads", "dimqk")}),
        "decay_rank": "vector",
    }

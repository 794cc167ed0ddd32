"""Mamba-2, the state space dual (arXiv:2405.21060, section 5): a decay and an input step of each token and head."""

from __future__ import annotations

from typing import Any

from attn_engine.frontend import CustomIO


def mamba2() -> dict[str, Any]:
    """S_t = e^{A dt_t} S_{t-1} + B_t (dt_t x_t)^T, y_t = C_t^T S_t: call it with (C, B, x, dt, A), A (heads,) below 0.

    dt (after its softplus) comes as the decay; groups are heads of C and B. The skip D x and the gate are the caller's.
    """

    def scaled_by_a(dt: Any, custom: Any) -> Any:
        return dt * custom.input_tensors["A"]

    def times_step(x: Any, custom: Any) -> Any:
        return x * custom.input_tensors["decay"]

    return {
        "decay_mod": scaled_by_a,
        "v_mod": times_step,
        "custom_io": CustomIO({"A": (1, "heads")}),
        "decay_rank": "token",
    }

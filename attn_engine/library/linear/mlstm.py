"""The matrix memory of xLSTM (arXiv:2405.04517, section 2.3): exponential input gates with a stabiliser."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attn_engine.frontend import CustomIO


def mlstm(dim: int) -> dict[str, Any]:
    """h_t = q_t C_t / max(|q_t . n_t|, e^{-m_t}): call it with (q, k, v, *mlstm_gates(i, f)); dim: that of k."""

    def gated(k: Any, custom: Any) -> Any:
        return k * dim**-0.5 * custom.input_tensors["input_gate"]

    def stabilised(weight_sum: Any, custom: Any) -> Any:
        return torch.maximum(torch.abs(weight_sum), torch.exp(-custom.input_tensors["stabiliser"]))

    lies = ("batch", "heads", "seq_len")
    return {
        "k_mod": gated,
        "normalizer_mod": stabilised,
        "custom_io": CustomIO({"input_gate": lies, "stabiliser": lies}),
        "decay_rank": "token",
    }


def mlstm_gates(i: Tensor, f: Tensor, layout: str = "bshd") -> tuple[Tensor, Tensor, Tensor]:
    """(decay, input gate, stabiliser) from the input gates and forget gates before exp and sigmoid, (B, T, H) or, for
    layout "bhsd", (B, H, T). The last two are (B, H, T).

    m_t = max(log f_t + m_{t-1}, i_t), so the decay log f_t + m_{t-1} - m_t is at most 0 and the gate e^{i_t - m_t} at
    most 1.
    """
    gate, forget = (x.transpose(1, 2) if layout == "bshd" else x for x in (i, f))
    forget = torch.nn.functional.logsigmoid(forget)
    total = forget.cumsum(-1)
    stabiliser = total + (gate - total).cummax(-1).values
    before = torch.cat([stabiliser[..., :1] - forget[..., :1], stabiliser[..., :-1]], -1)
    decay = (forget + before - stabiliser).clamp(max=0.0)
    return decay.transpose(1, 2) if layout == "bshd" else decay, torch.exp(gate - stabiliser), stabiliser

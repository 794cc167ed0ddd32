"""RWKV-7, Goose (arXiv:2503.14456, section 4): a generalised delta rule, whose erasing has a write key of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attn_engine.frontend import CustomIO


def rwkv7() -> dict[str, Any]:
    """S_t = diag(e^{g_t}) S_{t-1} - (a_t * e_t) (e_t^T S_{t-1}) + k_t v_t^T, o_t = S_t^T r_t.

    Call it with what rwkv7_rows gives and take every second row of the output, o[:, 1::2].
    """

    def erased(k: Any, custom: Any) -> Any:
        return custom.input_tensors["eraser"]

    return {
        "erase_mod": erased,
        "custom_io": CustomIO({"eraser": ("batch", "heads", "seq_len", "dimqk")}),
        "decay_rank": "vector",
    }


def rwkv7_rows(
    r: Tensor, k: Tensor, v: Tensor, decay: Tensor, e: Tensor, a: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(q, k, v, decay, eraser) of two tokens for each one: the first erases, the second decays and writes.

    All (B, T, H, D), v (B, T, H, Dv): e is the unit key that is erased, a the in-context rate, decay the natural
    logarithm -e^{-1/2} sigmoid(w), at least -0.61: what the first token writes is divided by its factor, which the
    second one multiplies by.
    """
    none, nothing = torch.zeros_like(k), torch.zeros_like(v)
    pairs = ((none, r), (a * e * torch.exp(-decay), k), (nothing, v), (none, decay))
    q, k, v, decay = (torch.stack(pair, 2).flatten(1, 2) for pair in pairs)
    return q, k, v, decay, torch.stack((e, none), 2).flatten(1, 2).transpose(1, 2)

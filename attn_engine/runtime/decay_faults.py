"""Decays that are none: above 0, -inf, or not a number."""

from __future__ import annotations

import torch
from torch import Tensor

from attn_engine.linear_errors import DecayInfinite, DecayPositive


def check_decays(decay: Tensor, batches: slice, tokens: Tensor) -> None:
    """Raise for the first token whose decay, (batch, head, token) and perhaps a dimension, is none.

    batches, tokens: which batch elements and tokens these are.
    """
    decay = decay.detach()
    bad = ~((decay <= 0) & (decay > -torch.inf))
    if not bool(bad.any()):
        return
    batch, head, place, *_ = (int(i) for i in bad.nonzero()[0])
    infinite = bool((decay[batch, head, place] == -torch.inf).any())
    error = DecayInfinite if infinite else DecayPositive
    raise error(batch=batches.start + batch, head=head, token=int(tokens[place]))

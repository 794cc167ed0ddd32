"""Softmax that may give weight to nothing: a learned sink per head (gpt-oss, arXiv:2508.10925, section 2), or a one in
the denominator (Miller, "Attention is off by one", 2023)."""

from __future__ import annotations

from typing import Any

import torch

from attn_engine.frontend import RowFunction, online


def sink_softmax(sink: torch.Tensor) -> RowFunction:
    """exp(s) over the row sum and exp(sink) of the head. sink: (heads,), learned where it requires a gradient."""

    @online
    def softmax_with_sink(s: Any, h: Any) -> Any:
        row_max = s.max()
        p = torch.exp(s - row_max)
        return p / (p.sum() + torch.exp(sink[h] - row_max))

    return softmax_with_sink


@online
def softmax_plus_one(s: Any) -> Any:
    """exp(s) over one plus the row sum: a sink of 0 in every head."""
    row_max = s.max()
    p = torch.exp(s - row_max)
    return p / (p.sum() + torch.exp(-row_max))

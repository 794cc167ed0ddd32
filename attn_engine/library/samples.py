"""Tensors for parameters that a command line cannot give, so that every entry's kernels can be shown."""

from __future__ import annotations

from typing import Any

import torch

from attn_engine.library.catalogue import Entry

_DOCUMENTS = torch.arange(4096, dtype=torch.int32) // 512
_TENSORS: dict[tuple[str, str], Any] = {
    ("T5Attention", "bias"): torch.zeros(32, 8, requires_grad=True),
    ("RelativeBiasAttention", "bias"): torch.zeros(8, 255, requires_grad=True),
    ("PairBiasAttention", "bias"): torch.zeros(8, 256, 256, requires_grad=True),
    ("SinkAttention", "sink"): torch.zeros(8, requires_grad=True),
    ("Document", "document_ids"): _DOCUMENTS,
    ("SharedPrefix", "document_ids"): _DOCUMENTS,
    ("VisionCross", "image_of_text"): _DOCUMENTS,
    ("Tree", "parents"): [-1, 0, 0, 1, 1, 2],
}


def sample(entry: Entry) -> dict[str, Any]:
    """Values of the parameters of `entry` that have no default."""
    required = (n for n, p in entry.parameters.items() if p.default is p.empty)
    return {name: _TENSORS[entry.name, name] for name in required}

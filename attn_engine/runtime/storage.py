"""Torch dtypes beside the IR's storages."""

from __future__ import annotations

import torch

from attn_engine.ir.ops import Storage

TORCH_DTYPES: dict[Storage, torch.dtype] = {s: getattr(torch, s.value) for s in Storage}
STORAGES: dict[torch.dtype, Storage] = {dtype: s for s, dtype in TORCH_DTYPES.items()}


def compute_dtype(element: Storage) -> torch.dtype:
    """The dtype of row values and partial sums: float64 for float64 programs, else float32."""
    return torch.float64 if element is Storage.FLOAT64 else torch.float32

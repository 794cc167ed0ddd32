"""Torch dtypes beside the IR's storages."""

from __future__ import annotations

import torch

from attn_engine.ir.ops import Storage

TORCH_DTYPES: dict[Storage, torch.dtype] = {s: getattr(torch, s.value) for s in Storage}
# Of what users' functions and engines read: float8 are numbers with their scales only.
STORAGES: dict[torch.dtype, Storage] = {d: s for s, d in TORCH_DTYPES.items() if s is not Storage.FLOAT8}


def compute_dtype(element: Storage) -> torch.dtype:
    """The dtype of row values and partial sums: float64 for float64 programs, else float32."""
    return torch.float64 if element is Storage.FLOAT64 else torch.float32

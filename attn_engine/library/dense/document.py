"""Documents packed into one sequence (T5, arXiv:1910.10683, section 2.4)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from attn_engine.frontend import MaskMod
from attn_engine.library.arguments import integers


def document(document_ids: Tensor) -> MaskMod:
    """Keys of the query's own document.

    document_ids: int tensor, one per position (length,), or per batch and position (batch, length).
    """
    integers("document_ids", document_ids, ranks=(1, 2))
    if document_ids.ndim == 1:

        def document_mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
            return document_ids[q_idx] == document_ids[kv_idx]

        return document_mask

    def batched_document_mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return document_ids[b, q_idx] == document_ids[b, kv_idx]

    return batched_document_mask

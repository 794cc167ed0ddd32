"""Several continuations of one prompt in one sequence (Hydragen, arXiv:2402.05099, section 3.1)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from attn_engine.frontend import MaskMod
from attn_engine.library.arguments import at_least, integers


def shared_prefix(document_ids: Tensor, length: int = 128) -> MaskMod:
    """The past within the query's own continuation, and the first `length` keys, which all share.

    document_ids: int tensor (length of all,), the continuation of each position; those of the prefix do not matter.
    """
    integers("document_ids", document_ids, ranks=(1,))
    at_least("length", length, 0)

    def shared_prefix_mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        in_past = kv_idx <= q_idx
        return in_past & ((kv_idx < length) | (document_ids[q_idx] == document_ids[kv_idx]))

    return shared_prefix_mask

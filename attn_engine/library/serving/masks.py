"""Masks of serving: where queries stand is an argument of each call."""

from __future__ import annotations

from typing import Any

from attn_engine.frontend import MaskMod


def causal_with_offset(name: str = "q_offset") -> MaskMod:
    """Query i of sequence b sees the keys up to position i + offset[b].

    name: of the custom input that brings the offsets, declared as CustomIO({name: ("batch",)}): int tensors (batch,),
    mostly the length of the cache less the number of queries. They may be negative: such a query sees nothing.
    """

    def causal_at_offset(b: Any, h: Any, q_idx: Any, kv_idx: Any, custom_fwd_inputs: Any) -> Any:
        return kv_idx <= q_idx + custom_fwd_inputs.input_tensors[name][b]

    return causal_at_offset

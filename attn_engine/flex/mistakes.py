"""The mistakes that only flex_attention's arguments can have; torch raises ValueError for the same ones."""

from __future__ import annotations

from attn_engine.errors import AttnEngineError


class GroupsNotEnabled(AttnEngineError, ValueError):
    template = "query has {heads} heads and key {kv_heads}, and enable_gqa is False."
    advice = "Pass enable_gqa=True where every key head serves a group of query heads."


class WrongAuxRequest(AttnEngineError, ValueError):
    template = "{got}."
    advice = "Ask with return_aux=AuxRequest(lse=True, max_scores=True) alone."

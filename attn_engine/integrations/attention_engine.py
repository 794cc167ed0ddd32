"""The names and conventions of microsoft/AttentionEngine's linear attention scripts, which run with these imports."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import attn_engine
from attn_engine import CustomIO, meta_tensor

Mod = Callable[..., Any]

__all__ = ["CustomIO", "LinearAttentionEngine", "meta_tensor"]


class LinearAttentionEngine(attn_engine.LinearAttentionEngine):
    """As those scripts call it: tensors are (batch, heads, length, dim), decay (batch, heads, length).

    tune, tune_filename, tune_bwd: taken and not used, for there is nothing to tune here. options: all others of the
    engine, by name.
    """

    def __init__(
        self,
        qkv_meta: Sequence[Any],
        q_mod: Mod | None = None,
        k_mod: Mod | None = None,
        v_mod: Mod | None = None,
        decay_mod: Mod | None = None,
        custom_io: CustomIO | None = None,
        tune: bool = False,
        tune_filename: str = "tune_result",
        tune_bwd: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(qkv_meta, q_mod, k_mod, v_mod, decay_mod, custom_io, **{"layout": "bhsd", **options})

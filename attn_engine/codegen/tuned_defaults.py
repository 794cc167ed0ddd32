"""Launches that were measured to be the best on a device, taken before the model's own choice.

The table is empty: nothing has been measured yet. A row is (device, kernel, element, dim_qk, dim_v, tiles are skipped):
Launch, where the device is what CUDA calls it, such as "NVIDIA H200". `AttentionEngine(..., tune=True)` prints such
launches into the cache directory; a row here is one of those that held on that device for long and short sequences.
"""

from __future__ import annotations

from collections.abc import Mapping

from attn_engine.codegen.schedule import Launch
from attn_engine.ir.ops import Storage

Row = tuple[str, str, Storage, int, int, bool]

TUNED: Mapping[Row, Launch] = {}

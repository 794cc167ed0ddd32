"""A call over rows that lie anywhere: packed sequences whose rows tables name, read and written where they are."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor

from attn_engine.errors import UnsupportedOnBackend
from attn_engine.runtime.backends import backend_for
from attn_engine.runtime.call_checks import refuse_transforms
from attn_engine.runtime.operator import apply
from attn_engine.runtime.sequences import PLACE_NAMES

if TYPE_CHECKING:
    from attn_engine.engine import AttentionEngine


def attend_listed(
    engine: AttentionEngine,
    inputs: tuple[Tensor, Tensor, Tensor],
    custom: tuple[Tensor, ...],
    lengths: tuple[Tensor, Tensor],
    places: tuple[Tensor, Tensor],
) -> Tensor:
    """o of sequences that own the rows `places` of q, k and v: like q, with the head dimension of v.

    inputs: q, k and v in the engine's packed layout, rows in any order. lengths: cu_len_q and cu_len_kv. places: int32
    (rows of all sequences,), of q and of k and v: which row each is, none twice; nobody checks that. Rows of no
    sequence give 0 and have zero gradients. Backends "cpu" and "torch".
    """
    q, k, v = inputs
    if (backend := backend_for(engine.backend, q.device.type)) not in ("cpu", "torch"):
        instead = 'Gather the rows, or use backend="cpu".'
        raise UnsupportedOnBackend(backend=backend, feature="rows that tables name", instead=instead)
    refuse_transforms((q, k, v, *custom))
    given = {"cu_len_q": lengths[0], "cu_len_kv": lengths[1]}
    traced, captured, numbers, _ = engine._bind(q, k, v, custom, given)
    sequences = traced.program.sequences
    assert sequences is not None, "lengths were given"
    traced = traced.with_sequences(replace(sequences, listed=True))
    call, key = engine._call(traced, q.device.type)
    tables = dict(zip(PLACE_NAMES, places, strict=True))
    return apply(call, key, q, k, v, captured | tables, numbers)[0]

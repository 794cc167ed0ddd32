"""Calls that torch.compile traces: one operator, which finds the engine by a number, for a graph can hold no engine."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import astuple
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from attn_engine.ir.program import ListedBlocks, Sequences
from attn_engine.runtime.bind import custom_by_name, storage_of
from attn_engine.runtime.scaled import CACHE, scales_given
from attn_engine.sequence_calls import of_call, sequence_places

if TYPE_CHECKING:
    from attn_engine.engine import AttentionEngine

_engines: WeakValueDictionary[int, AttentionEngine] = WeakValueDictionary()
_numbers = itertools.count()


def numbered(engine: AttentionEngine) -> int:
    """A number by which `key_of` finds the engine for as long as it lives."""
    number = next(_numbers)
    _engines[number] = engine
    return number


def key_of(
    number: int,
    device: str,
    kinds: tuple[torch.dtype, ...],
    blocks: tuple[int, int, str, bool] | None = None,
    layout: tuple[bool, int] | None = None,
    scaled: bool = False,
) -> int:
    """The operator key of an engine's kernels for custom inputs of these dtypes, lists of these blocks, and sequences,
    packed or not, with keys in pages of so many rows or not; scaled: keys and values have scales.

    It is a constant of the compiled graph.
    """
    engine = _engines[number]
    storages = {name: storage_of(name, kind) for name, kind in zip(engine.custom_io, kinds, strict=True)}
    traced = engine._current(storages)
    listed = ListedBlocks(*blocks) if blocks else None
    sequences = None if layout is None else Sequences(*layout)
    traced = traced.with_layout(listed, sequences)
    _, key = engine._call(traced.with_cache(CACHE) if scaled else traced, device)
    return key


# What torch.compiler.assume_constant_result does, without its import of the whole compiler.
key_of._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


def in_graph(
    engine: AttentionEngine,
    number: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    custom_inputs: Sequence[Tensor],
    named: dict[str, Tensor],
    block_mask: Any,
) -> Sequence[Tensor]:
    """A call that torch.compile traces: one operator on the tensors, which checks them when the graph runs."""
    places = sequence_places(named, engine._checks.custom_shapes)
    scales = scales_given(named, engine._checks.custom_shapes, k, v, engine.layout)
    custom = custom_by_name(engine._checks.custom_shapes, custom_inputs, named)
    kinds = tuple(x.dtype for x in custom.values())
    traced, blocks, layout = engine._present, None, None
    captured = list(traced.tensors(custom).values())
    lists = engine._lists_of(block_mask)
    if lists is not None or places is not None:
        found = of_call(lists, places, engine._logical(q), engine._logical(k))
        blocks = astuple(found.blocks) if found.blocks else None
        layout = (found.sequences.packed, found.sequences.page) if found.sequences else None
        captured = captured + list(found.tensors.values())
    scaled = False  # a constant of the graph
    if scales is not None:
        captured, scaled = captured + list(scales.values()), True
    key = key_of(number, q.device.type, kinds, blocks, layout, scaled)
    read = [given for trace in traced.traces for _, given in trace.custom]
    unread = [x for name, x in custom.items() if name not in read]
    scalars = [float(x) for x in (engine.scale, *traced.scalars().values())]
    return torch.ops.attn_engine.forward(q, k, v, captured + unread, scalars, key)

"""Engines by number: a graph of torch.compile can hold a number, not an engine."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

import torch

from attn_engine.ir.program import ListedBlocks
from attn_engine.runtime.bind import storage_of

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
    number: int, device: str, kinds: tuple[torch.dtype, ...], blocks: tuple[int, int, str] | None = None
) -> int:
    """The operator key of an engine's kernels for custom inputs of these dtypes and lists of these blocks.

    It is a constant of the compiled graph.
    """
    engine = _engines[number]
    storages = {name: storage_of(name, kind) for name, kind in zip(engine.custom_io, kinds, strict=True)}
    traced = engine._current(storages)
    _, key = engine._call(traced.with_lists(ListedBlocks(*blocks)) if blocks else traced, device)
    return key


# What torch.compiler.assume_constant_result does, without its import of the whole compiler.
key_of._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]

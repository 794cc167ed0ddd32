"""A call that brings sequences of their own lengths: from its arguments to the tensors that kernels read."""

from __future__ import annotations

import weakref
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attn_engine.codegen.lower.paged import BLOCK_TABLE
from attn_engine.ir.program import ListedBlocks, Sequences
from attn_engine.listed_calls import lists_of_call
from attn_engine.masks.lists import BlockLists
from attn_engine.runtime.compiled import sizes_of
from attn_engine.runtime.paged import table_of
from attn_engine.runtime.paged_checks import check_paged_places
from attn_engine.runtime.sequence_checks import check_places
from attn_engine.runtime.sequences import SPAN_NAMES
from attn_engine.runtime.versions import version_of

PACKED = ("cu_len_q", "cu_len_kv")
IN_BATCH = ("start_q", "len_q", "start_kv", "len_kv")
LARGEST = 2**31 - 1


@dataclass(frozen=True, slots=True, eq=False)
class SequencePlaces:
    """Where a call says that its sequences are: cumulative lengths, or first rows and lengths in a batch."""

    given: dict[str, Tensor]

    @property
    def packed(self) -> bool:
        """Whether q, and k and v where they do not lie in pages, have no batch."""
        return any(name in self.given for name in PACKED)

    def sequences(self, k: Tensor, layout: str) -> Sequences:
        """How the sequences lie; k in the engine's layout."""
        return Sequences(packed=self.packed)

    def spans(self, q: Tensor, k: Tensor) -> dict[str, Tensor]:
        """int32 (n, 2) of each axis by the kernels' names: first row, number of rows. q, k: (B, H, rows, D).

        The same tensors give the same spans again, so that later checks need not look into them.
        """
        self._check(q, k)
        if torch.compiler.is_compiling():
            return self._spans(q, k)
        sources = tuple(self.given.values())
        versions = tuple(version_of(x) for x in sources)
        key = (tuple(self.given), q.shape[0], q.shape[2], k.shape[2], *map(id, sources))
        found = _kept.get(key)
        same = found is not None and found[1] == versions and None not in versions
        if found is not None and same and all(r() is x for r, x in zip(found[0], sources, strict=True)):
            return found[2]
        made = self._spans(q, k)
        _kept[key] = tuple(weakref.ref(x, lambda _: _kept.pop(key, None)) for x in sources), versions, made
        return made

    def _check(self, q: Tensor, k: Tensor) -> None:
        check_places(self.given, q, k, packed=self.packed)

    def _spans(self, q: Tensor, k: Tensor) -> dict[str, Tensor]:
        if self.packed:
            of_q = self.given["cu_len_q"]
            both = (of_q, self.given.get("cu_len_kv", of_q))
            return dict(zip(SPAN_NAMES, (_pairs(x[:-1], x.diff()) for x in both), strict=True))
        found: dict[str, Tensor] = {}
        for name, axis, x in zip(SPAN_NAMES, ("q", "kv"), (q, k), strict=True):
            zeros = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
            first = self.given.get(f"start_{axis}", zeros)
            found[name] = _pairs(first, self.given.get(f"len_{axis}", x.shape[2] - first))
        return found


@dataclass(frozen=True, slots=True, eq=False)
class PagedPlaces(SequencePlaces):
    """The same where k and v are caches in pages: queries in a batch or packed, keys through a table."""

    @property
    def packed(self) -> bool:
        return "cu_len_q" in self.given

    def sequences(self, k: Tensor, layout: str) -> Sequences:
        # What is no cache is refused as such after this.
        known = isinstance(k, Tensor) and k.ndim == 4  # pyright: ignore[reportUnnecessaryIsInstance]
        return Sequences(packed=self.packed, page=int(k.shape[1 if layout == "bshd" else 2]) if known else 1)

    def _of_queries(self) -> dict[str, Tensor]:
        return {n: x for n, x in self.given.items() if n in ("cu_len_q", "start_q", "len_q")}

    def _check(self, q: Tensor, k: Tensor) -> None:
        check_places(self._of_queries(), q, q, packed=self.packed)
        check_paged_places(self.given, self.given[BLOCK_TABLE], q)

    def _spans(self, q: Tensor, k: Tensor) -> dict[str, Tensor]:
        of_q, _ = SequencePlaces(self._of_queries())._spans(q, q).values()
        lengths = self.given["len_kv"]
        found = (of_q, _pairs(torch.zeros_like(lengths), lengths), table_of(self.given[BLOCK_TABLE]))
        return dict(zip((*SPAN_NAMES, BLOCK_TABLE), found, strict=True))


@dataclass(frozen=True, slots=True)
class OfCall:
    """What a call brings beside q, k and v: the blocks of its lists, how its sequences lie, the tensors of both."""

    blocks: ListedBlocks | None
    sequences: Sequences | None
    tensors: dict[str, Tensor]


def of_call(lists: BlockLists | None, places: SequencePlaces | None, q: Tensor, k: Tensor) -> OfCall:
    """q and k are (B, H, rows, D). Lists of blocks of sequences have a batch for each, or one for all."""
    sizes = sizes_of(q, k)
    spans: dict[str, Tensor] = {}
    if places is not None:
        spans = places.spans(q, k)
        if lists is not None:
            sizes = _sizes_for_lists(lists, sizes, spans)
    sequences = None if places is None else places.sequences(k, "bhsd")
    if lists is None:
        return OfCall(None, sequences, spans)
    listed = lists_of_call(lists, sizes)
    # A sequence may end anywhere in a full block.
    blocks = listed.blocks
    if sequences is not None:
        blocks = ListedBlocks(blocks.q, blocks.kv, blocks.heads, ragged=True)
    return OfCall(blocks, sequences, listed.tensors | spans)


def _sizes_for_lists(lists: BlockLists, sizes: dict[str, int], spans: dict[str, Tensor]) -> dict[str, int]:
    """Lengths are those that the lists were made for: each holds the longest sequence, which is checked later on."""
    batches = spans[SPAN_NAMES[0]].shape[0]
    return {**sizes, "batches": batches, "q_len": lists.q_len, "kv_len": lists.kv_len}


_kept: dict[
    tuple[object, ...], tuple[tuple[weakref.ref[Tensor], ...], tuple[int | None, ...], dict[str, Tensor]]
] = {}


def _pairs(first: Tensor, length: Tensor) -> Tensor:
    # What int32 cannot hold stays out of every tensor's range, and is refused as such.
    both = torch.stack((first.to(torch.int64), length.to(torch.int64)), 1)
    return both.clamp(-LARGEST, LARGEST).to(torch.int32)


def sequence_places(named: dict[str, Any], custom: Collection[str]) -> SequencePlaces | None:
    """Takes the arguments that say where sequences are out of a call's; None where there are none.

    A custom input of the same name keeps it.
    """
    given: dict[str, Tensor] = {}
    for name in (*PACKED, *IN_BATCH, BLOCK_TABLE):
        if name in named and name not in custom:
            x = named.pop(name)
            if x is not None:
                given[name] = x
    kind = PagedPlaces if BLOCK_TABLE in given else SequencePlaces
    return kind(given) if given else None

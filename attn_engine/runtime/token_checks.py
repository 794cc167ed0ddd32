"""What lists of tokens must be: kinds and shapes, before anything runs."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from attn_engine.errors import DeviceMismatch, NotATensor
from attn_engine.runtime.token_errors import ABOUT_INDICES, refuse
from attn_engine.runtime.token_lists import TokenLists

LISTS = ("token_indices", "token_slots")
COUNTS, BLOCK_TABLE, LEN_KV = "token_counts", "block_table", "len_kv"
NO_NAMES: Mapping[str, str] = {}
_COUNTS = (
    "It is int32 or int64: how many of the first entries of each list count; the others may be anything."
)
_SLOTS = "Slots are places in the cache already; counts say how many of a list are taken."
_TABLES = (
    "Entry [b, j] is the page of the cache that holds tokens j * page to j * page + page - 1 of sequence b."
)


def checked_lists(
    name: str,
    given: object,
    given_counts: object,
    q: Tensor,
    k: Tensor,
    given_table: object = None,
    length: object = None,
    called: Mapping[str, str] = NO_NAMES,
) -> TokenLists:
    """The lists of a call; q is (B, H, rows, D), k is (B, Hkv, rows, D) or a cache (pages, Hkv, rows of a page, D).

    name: of `LISTS`. called: how the caller calls arguments, where otherwise. Raises WrongTokens.
    """
    names = {x: called.get(x, x) for x in (name, COUNTS, BLOCK_TABLE, LEN_KV)}
    (batches, heads, rows, _), (_, kv_heads, of_batch, _) = q.shape, k.shape
    indices, counts = integers(names[name], given, q), None
    indices = indices.unsqueeze(2) if indices.ndim == 3 else indices
    if indices.ndim != 4 or indices.shape[:2] != (batches, rows) or indices.shape[2] not in (1, kv_heads):
        of_heads = "1" if kv_heads == 1 else f"{kv_heads} or 1"
        _refuse_shape(names[name], given, f"({batches}, {rows}, {of_heads}, longest list)", ABOUT_INDICES)
    if indices.shape[3] == 0:
        indices = indices.new_full((*indices.shape[:3], 1), -1)
    if given_counts is not None:
        counts = integers(names[COUNTS], given_counts, q)
        counts = counts.unsqueeze(2) if counts.ndim == 2 else counts
        if counts.ndim != 3 or counts.shape[:2] != (batches, rows) or counts.shape[2] not in (1, kv_heads):
            _refuse_shape(
                names[COUNTS], given_counts, f"({batches}, {rows}, or that and {kv_heads})", _COUNTS
            )
    table, slots = None, name == LISTS[1]
    capacity = of_batch * (k.shape[0] if slots else 1)
    for other, x in ((BLOCK_TABLE, given_table), (LEN_KV, length)):
        if slots and x is not None:
            raise refuse(names[other], f"an argument beside {names[name]}", "given", "left out", _SLOTS)
    if given_table is not None:
        table = integers(names[BLOCK_TABLE], given_table, q)
        if table.ndim != 2 or table.shape[0] != batches:
            _refuse_shape(names[BLOCK_TABLE], given_table, f"({batches}, pages of the longest)", _TABLES)
        capacity = table.shape[1] * of_batch
    limit = torch.full((batches,), capacity, dtype=torch.int64, device=q.device)
    if length is not None:
        limit = lengths_of(names[LEN_KV], length, q, capacity)
    of_query = limit[:, None].expand(-1, rows)
    every = k.shape[0] * of_batch
    return TokenLists(
        names[name], names[BLOCK_TABLE], indices, of_query, counts, table, 0 if slots else of_batch,
        every, heads, kv_heads,
    )  # fmt: skip


def integers(name: str, x: object, q: Tensor) -> Tensor:
    """x, once it is int32 or int64 beside q."""
    if not isinstance(x, Tensor):
        raise NotATensor(argument=name, got=type(x).__name__)
    if x.dtype not in (torch.int32, torch.int64):
        raise refuse(name, "its dtype", x.dtype, "torch.int32 or torch.int64")
    if x.device != q.device:
        raise DeviceMismatch(argument=name, got=x.device, expected=q.device)
    return x


def lengths_of(name: str, length: object, q: Tensor, capacity: int) -> Tensor:
    """int64 (B,), each inside of what there is."""
    found, about = integers(name, length, q), f"{name}[b] says how many keys sequence b has."
    if tuple(found.shape) != (q.shape[0],):
        raise refuse(name, "its shape", tuple(found.shape), f"({q.shape[0]},)", about)
    wrong = (found < 0) | (found > capacity)
    if bool(wrong.any()):
        b = int(wrong.to(torch.uint8).argmax())
        raise refuse(
            name, f"element {b}", int(found[b]), f"0 to {capacity}, the keys that there can be", about
        )
    return found.to(torch.int64)


def _refuse_shape(name: str, x: object, expected: str, about: str) -> None:
    got = tuple(x.shape) if isinstance(x, Tensor) else x
    raise refuse(name, "its shape", got, expected, about)

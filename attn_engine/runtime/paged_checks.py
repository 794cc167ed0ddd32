"""What caches in pages and their tables must be: kinds and shapes, then contents, before anything runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from attn_engine.errors import AttnEngineError, DeviceMismatch, NotATensor
from attn_engine.runtime.bind import Expected, check_inputs

CACHE_LAYOUTS = {
    "bshd": "(pages, rows of a page, kv heads, dim)",
    "bhsd": "(pages, kv heads, rows of a page, dim)",
}
OF_KEYS = ("cu_len_kv", "start_kv")


class WrongPages(AttnEngineError, ValueError):
    template = "{argument}: {what} is {got}, not {expected}."
    advice = "{instead}"


class CacheNotDifferentiable(AttnEngineError, NotImplementedError):
    template = "{argument} requires a gradient, and a cache in pages or in float8 gives none."
    advice = "Call it under torch.no_grad(), or train on contiguous keys and values of q's type: leave block_table out."


_TABLE = (
    "block_table[b, j] is the page of the cache that holds keys j * page to j * page + page - 1 of sequence b, "
    "-1 where there is none; len_kv[b] says how many keys there are."
)


def check_caches(q: Tensor, k: Tensor, v: Tensor, expected: Expected, packed: bool) -> None:
    """Raise a typed error for the first thing that is wrong with q and two caches in pages.

    packed: q has no batch.
    """
    named = {"k": k, "v": v}
    for name, x in named.items():
        if not isinstance(x, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise NotATensor(argument=name, got=type(x).__name__)
        if x.ndim != 4:
            shape = CACHE_LAYOUTS[expected.layout]
            _refuse(name, "its shape", tuple(x.shape), f"that of a cache in pages, {shape}")
    sizes = tuple((None, heads, None) for _, heads, _ in expected.sizes)
    of_q = (None, sizes[0][1], None) if packed else expected.sizes[0]
    # One page of a cache has what the keys of a sequence have: heads, dimensions and a kind.
    rows = q if not packed or not isinstance(q, Tensor) else q.unsqueeze(0)  # pyright: ignore[reportUnnecessaryIsInstance]
    pages = k.shape[0], v.shape[0]
    if pages[0] != pages[1]:
        _refuse("v", "its number of pages", pages[1], f"{pages[0]}, as k has")
    if pages[0] == 0:
        _refuse("k", "its number of pages", 0, "1 or more")
    if (rows_of_page := k.shape[1 if expected.layout == "bshd" else 2]) == 0:
        _refuse("k", "the number of rows of its pages", rows_of_page, "1 or more")
    if not isinstance(q, Tensor) or q.ndim != (3 if packed else 4):  # pyright: ignore[reportUnnecessaryIsInstance]
        check_inputs(q, k, v, expected, packed)
    keys, values = (x[:1].expand(rows.shape[0], -1, -1, -1) for x in (k, v))
    check_inputs(rows, keys, values, replace(expected, sizes=(of_q, *sizes[1:])))


def check_paged_places(given: Mapping[str, Tensor], table: Tensor, q: Tensor) -> None:
    """Raise a typed error for what cannot be told about paged keys at all; q is (B, H, rows, D), B = 1 where it is
    packed. What is said of the queries is checked elsewhere."""
    for name in OF_KEYS:
        if name in given:
            _refuse(
                name, "an argument beside block_table", "given", "left out: keys begin where the table does"
            )
    if "len_kv" not in given:
        _refuse("len_kv", "it", "left out", "given with block_table")
    sequences = given["cu_len_q"].shape[0] - 1 if "cu_len_q" in given else q.shape[0]
    for name, x, ranks in (("block_table", table, 2), ("len_kv", given["len_kv"], 1)):
        if not isinstance(x, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise NotATensor(argument=name, got=type(x).__name__)
        if x.dtype not in (torch.int32, torch.int64):
            _refuse(name, "its dtype", x.dtype, "torch.int32 or torch.int64")
        if x.device != q.device:
            raise DeviceMismatch(argument=name, got=x.device, expected=q.device)
        if x.ndim != ranks or x.shape[0] != sequences:
            expected = f"({sequences},{' pages of the longest' if ranks == 2 else ''})"
            _refuse(name, "its shape", tuple(x.shape), expected)


def check_table(
    table: Tensor, lengths: Tensor, page: int, pages: int, called: str = "len_kv", instead: str = _TABLE
) -> None:
    """Raise WrongPages for lengths that the table does not hold, and for entries that are read and are no page of the
    cache. lengths: int64 on the CPU, which the caller calls `called`."""
    rows = table.shape[1] * page
    if (b := first_wrong(lengths < 0)) is not None:
        _refuse(called, f"element {b}", int(lengths[b]), "0 or more", instead)
    if (b := first_wrong(lengths > rows)) is not None:
        expected = f"{rows} or less: the table has {table.shape[1]} pages of {page} for each sequence"
        _refuse(called, f"element {b}", int(lengths[b]), expected, instead)
    entries = table.detach().to("cpu", torch.int64)
    read = torch.arange(table.shape[1]) * page < lengths[:, None]
    wrong = read & ((entries < 0) | (entries >= pages))
    if (place := first_wrong(wrong.flatten())) is not None:
        b, j = divmod(place, table.shape[1])
        expected = f"a page of the cache, 0 to {pages - 1}, for the {int(lengths[b])} keys of sequence {b}"
        _refuse("block_table", f"element [{b}, {j}]", int(entries[b, j]), expected, instead)


def first_wrong(wrong: Tensor) -> int | None:
    """The first place where something is wrong, None where nothing is."""
    return int(wrong.to(torch.uint8).argmax()) if bool(wrong.any()) else None


def _refuse(argument: str, what: str, got: object, expected: str, instead: str = _TABLE) -> None:
    raise WrongPages(argument=argument, what=what, got=got, expected=expected, instead=instead)

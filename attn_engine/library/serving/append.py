"""New keys and values into a cache, contiguous or in pages, in place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from attn_engine.errors import NotATensor, UnknownLayout
from attn_engine.library.serving.quantisation import BLOCK, to_fp8
from attn_engine.runtime.paged_checks import CacheNotDifferentiable, WrongPages, first_wrong

_SLOTS = "Slot page * rows of a page + row is written at most once in a call; nothing was written."


def append_to_cache(
    new: Tensor | Sequence[Tensor],
    caches: Tensor | Sequence[Tensor],
    lengths: Tensor,
    block_table: Tensor | None = None,
    *,
    counts: Tensor | None = None,
    cu_len: Tensor | None = None,
    layout: str = "bshd",
    scales: Tensor | Sequence[Tensor] | None = None,
) -> Tensor:
    """Write new rows behind the `lengths` rows that each sequence has; the new lengths, int32 (sequences,).

    new, caches: one tensor or several, such as (k, v) and (k_cache, v_cache). new: (sequences, rows, heads, dim), the
    first counts[b] rows of each (all, where counts is None), or with cu_len (sequences + 1,) packed (rows, heads, dim).
    caches: (sequences, capacity, heads, dim), or (pages, rows of a page, heads, dim) with a block_table int32
    (sequences, pages of one). Layout "bhsd": heads before rows in all of them. scales: of float8 caches, one tensor
    for each, float32, of its shape without the last dimension or with one scale for every 128 columns in it: new rows
    are quantised on the way (`to_fp8`), and their scales are written beside them.

    Everything is checked before anything is written: typed errors name the tensor for pages outside of the cache, rows
    beyond the end, other dtypes, shapes and devices, and for two rows that would be written to one slot.
    """
    checked = checked_append(
        new, caches, lengths, block_table, counts=counts, cu_len=cu_len, layout=layout, scales=scales
    )
    checked.write()
    return checked.lengths


@dataclass(frozen=True, slots=True, eq=False)
class CheckedAppend:
    """Rows that may be written; slots: where to, page * rows of a page + row. lengths: the new ones, int32."""

    pieces: list[Tensor]
    targets: list[Tensor]
    source: Tensor
    slots: Tensor
    lengths: Tensor

    def write(self) -> None:
        _write(self.pieces, self.targets, self.source, self.slots)


def checked_append(
    new: Tensor | Sequence[Tensor],
    caches: Tensor | Sequence[Tensor],
    lengths: Tensor,
    block_table: Tensor | None = None,
    *,
    counts: Tensor | None = None,
    cu_len: Tensor | None = None,
    layout: str = "bshd",
    scales: Tensor | Sequence[Tensor] | None = None,
) -> CheckedAppend:
    """What `append_to_cache` would write, after all its checks."""
    pairs = _with_scales(_pairs_of(new, caches), scales)
    _check_layout(layout)
    pieces = [_logical(x, layout) for x, _ in pairs]
    targets = [_logical(c, layout) for _, c in pairs]
    sequence, position, source, added = _rows(pieces[0], lengths, counts, cu_len)
    slots = _slots(targets[0], sequence, position, lengths, block_table)
    for x, c in zip(pieces, targets, strict=True):
        _check_pair(x, c, pieces[0], targets[0])
    _check_once(slots)
    return CheckedAppend(pieces, targets, source, slots, (lengths.to(torch.int64) + added).to(torch.int32))


def write_to_slots(
    new: Tensor | Sequence[Tensor],
    caches: Tensor | Sequence[Tensor],
    slots: Tensor,
    *,
    layout: str = "bshd",
    scales: Tensor | Sequence[Tensor] | None = None,
) -> None:
    """Write new rows to given places: slot = page * rows of a page + row, and -1 for a row that is left out.

    new, caches, scales: as of `append_to_cache`. slots: int32 or int64, of the shape of the rows of new: (sequences,
    rows), or (rows,) where they are packed. Checked and written as there.
    """
    pairs = _with_scales(_pairs_of(new, caches), scales)
    _check_layout(layout)
    pieces = [_logical(x, layout) for x, _ in pairs]
    targets = [_logical(c, layout) for _, c in pairs]
    _check_integers("slots", slots, targets[0])
    rows = pieces[0].shape[:-2]
    if slots.shape != rows:
        _refuse("slots", "its shape", tuple(slots.shape), f"{tuple(rows)}, one number for each row of new")
    flat = slots.to(torch.int64).flatten()
    room = targets[0].shape[0] * targets[0].shape[1]
    if (i := first_wrong((flat < -1) | (flat >= room))) is not None:
        _refuse("slots", f"element {i}", int(flat[i]), f"a slot of the cache, 0 to {room - 1}, or -1")
    for x, c in zip(pieces, targets, strict=True):
        _check_pair(x, c, pieces[0], targets[0])
    source = (flat >= 0).nonzero().flatten()
    written = flat[source]
    _check_once(written)
    _write(pieces, targets, source, written)


@contextmanager
def kept_if_all_goes_well(new: Sequence[Tensor], caches: Sequence[Tensor], slots: Tensor) -> Iterator[None]:
    """`write_to_slots`, whose rows are taken back where the body raises: the bytes that were there before."""
    page = slots.clamp_min(0) // caches[0].shape[1], slots.clamp_min(0) % caches[0].shape[1]
    before = [cache[page] for cache in caches]
    write_to_slots(new, caches, slots)
    try:
        yield
    except BaseException:
        write_to_slots(before, caches, slots)
        raise


def _pairs_of(
    new: Tensor | Sequence[Tensor], caches: Tensor | Sequence[Tensor], called: str = "caches"
) -> list[tuple[Tensor, Tensor]]:
    given = [(x,) if isinstance(x, Tensor) else tuple(x) for x in (new, caches)]
    for argument, tensors in zip(("new", called), given, strict=True):
        for x in tensors:
            if not isinstance(x, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise NotATensor(argument=argument, got=type(x).__name__)
    if len(given[0]) != len(given[1]) or not given[0]:
        _refuse(called, "their number", len(given[1]), f"{max(len(given[0]), 1)}, as of the new tensors")
    return list(zip(*given, strict=True))


def _with_scales(
    pairs: list[tuple[Tensor, Tensor]], scales: Tensor | Sequence[Tensor] | None
) -> list[tuple[Tensor, Tensor]]:
    """Rows of float8 caches as codes, and as further rows the scales of them."""
    if scales is None:
        for x, cache in pairs:
            if cache.dtype is torch.float8_e4m3fn and x.dtype is not cache.dtype:
                instead = "Give scales=(k_scale, v_scale), or codes and scales as tensors of their own."
                _refuse("scales", "it", "left out", "given: a cache is float8_e4m3fn", instead)
        return pairs
    found: list[tuple[Tensor, Tensor]] = []
    for (x, cache), (_, scale) in zip(pairs, _pairs_of([c for _, c in pairs], scales, "scales"), strict=True):
        blocks = -(-x.shape[-1] // BLOCK)
        scale = scale if scale.ndim == cache.ndim else scale.unsqueeze(-1)
        if cache.dtype is not torch.float8_e4m3fn or not x.dtype.is_floating_point:
            _refuse("caches", "the dtype of one with scales", cache.dtype, "torch.float8_e4m3fn")
        if scale.dtype is not torch.float32:
            _refuse("scales", "the dtype of one", scale.dtype, "torch.float32")
        if scale.shape[:-1] != cache.shape[:-1] or scale.shape[-1] not in (1, blocks):
            of_cache = ", ".join(map(str, cache.shape[:-1]))
            expected = f"({of_cache}), or ({of_cache}, {blocks})"
            _refuse("scales", "the shape of one", tuple(scale.shape), expected)
        codes = to_fp8(x, block=x.shape[-1] if scale.shape[-1] == 1 else BLOCK)
        found += [(codes.codes, cache), (codes.scales, scale)]
    return found


def _check_layout(layout: str) -> None:
    if layout not in ("bshd", "bhsd"):
        raise UnknownLayout(layout=layout)


def _logical(x: Tensor, layout: str) -> Tensor:
    """(..., rows, heads, dim), without a copy."""
    return x if layout == "bshd" else x.transpose(-3, -2)


def _rows(
    new: Tensor, lengths: Tensor, counts: Tensor | None, cu_len: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of every row that is written: its sequence, its position in it, its place among the rows of new; and how many
    each sequence gets."""
    _check_integers("lengths", lengths, new, 1)
    n = lengths.shape[0]
    if (b := first_wrong(lengths < 0)) is not None:
        _refuse("lengths", f"element {b}", int(lengths[b]), "0 or more")
    if cu_len is not None:
        return _packed_rows(new, lengths, cu_len)
    if new.ndim != 4 or new.shape[0] != n:
        _refuse("new", "its shape", tuple(new.shape), f"({n}, rows, heads, dim), for {n} lengths")
    most = new.shape[1]
    if counts is None:
        counts = torch.full_like(lengths, most)
    _check_integers("counts", counts, new, 1)
    if counts.shape[0] != n:
        _refuse("counts", "its shape", tuple(counts.shape), f"({n},), as of lengths")
    if (b := first_wrong((counts < 0) | (counts > most))) is not None:
        _refuse("counts", f"element {b}", int(counts[b]), f"0 to {most}, the rows of new")
    taken = torch.arange(most, device=new.device) < counts[:, None]
    sequence, row = taken.nonzero(as_tuple=True)
    return sequence, lengths.to(torch.int64)[sequence] + row, sequence * most + row, counts.to(torch.int64)


def _packed_rows(new: Tensor, lengths: Tensor, cu_len: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_integers("cu_len", cu_len, new, 1)
    n = lengths.shape[0]
    if cu_len.shape[0] != n + 1:
        _refuse("cu_len", "its shape", tuple(cu_len.shape), f"({n + 1},), for {n} lengths")
    ends = cu_len.to(torch.int64)
    counts = ends.diff()
    if new.ndim != 3:
        _refuse("new", "its shape", tuple(new.shape), "(rows, heads, dim), packed as cu_len says")
    if int(ends[0]) != 0 or bool((counts < 0).any()) or int(ends[-1]) > new.shape[0]:
        _refuse("cu_len", "it", ends.tolist(), f"sums of lengths from 0 on, up to {new.shape[0]}")
    source = torch.arange(int(ends[-1]), device=new.device)
    sequence = torch.repeat_interleave(torch.arange(n, device=new.device), counts)
    return sequence, lengths.to(torch.int64)[sequence] + source - ends[sequence], source, counts


def _slots(
    cache: Tensor, sequence: Tensor, position: Tensor, lengths: Tensor, block_table: Tensor | None
) -> Tensor:
    """Where the rows go: first dimension * rows + row."""
    n = lengths.shape[0]
    if cache.ndim != 4:
        _refuse("caches", "a shape", tuple(cache.shape), "(sequences or pages, rows, heads, dim)")
    rows = cache.shape[1]
    if block_table is None:
        if cache.shape[0] != n:
            _refuse("caches", "a first dimension", cache.shape[0], f"{n}, for {n} lengths and no block_table")
        if (i := first_wrong(position >= rows)) is not None:
            b = int(sequence[i])
            _refuse("lengths", f"the new end of sequence {b}", f"beyond {rows}", f"{rows} rows or less")
        return sequence * rows + position
    _check_integers("block_table", block_table, cache, 2)
    if block_table.shape[0] != n:
        _refuse("block_table", "its shape", tuple(block_table.shape), f"({n}, pages of one sequence)")
    room = rows * block_table.shape[1]
    if (i := first_wrong(position >= room)) is not None:
        b = int(sequence[i])
        expected = f"{room} or less: the table has {block_table.shape[1]} pages of {rows} for each sequence"
        _refuse("lengths", f"the new end of sequence {b}", f"beyond {room}", expected)
    pages = block_table.to(torch.int64)[sequence, position // max(rows, 1)]
    if (i := first_wrong((pages < 0) | (pages >= cache.shape[0]))) is not None:
        b, j = int(sequence[i]), int(position[i]) // rows
        expected = f"a page of the cache, 0 to {cache.shape[0] - 1}: new rows go there"
        _refuse("block_table", f"element [{b}, {j}]", int(pages[i]), expected)
    return pages * rows + position % max(rows, 1)


def _check_pair(x: Tensor, cache: Tensor, first: Tensor, first_cache: Tensor) -> None:
    if x.shape[:-2] != first.shape[:-2]:
        _refuse(
            "new", "the rows of a tensor", tuple(x.shape[:-2]), f"{tuple(first.shape[:-2])}, as of the first"
        )
    if cache.ndim != 4 or cache.shape[:2] != first_cache.shape[:2]:
        _refuse(
            "caches", "a shape", tuple(cache.shape), f"as of the first, {tuple(first_cache.shape[:2])}, ..."
        )
    if x.shape[-2:] != cache.shape[-2:]:
        _refuse(
            "new",
            "heads and dim of a tensor",
            tuple(x.shape[-2:]),
            f"{tuple(cache.shape[-2:])}, as its cache",
        )
    for what in ("dtype", "device"):
        if getattr(x, what) != getattr(cache, what):
            _refuse(
                "new", f"the {what} of a tensor", getattr(x, what), f"{getattr(cache, what)}, as its cache"
            )
    if any(size > 1 and stride == 0 for size, stride in zip(cache.shape, cache.stride(), strict=True)):
        _refuse("caches", "one", "expanded (a stride of 0)", "a tensor with memory for every slot")
    for name, y in (("new", x), ("caches", cache)):
        if torch.is_grad_enabled() and y.requires_grad:
            raise CacheNotDifferentiable(argument=name)


def _check_once(slots: Tensor) -> None:
    ordered, _ = slots.sort()
    if (i := first_wrong(ordered[1:] == ordered[:-1])) is not None:
        _refuse(
            "block_table", "a slot that is written twice in one call", int(ordered[i]), "written once", _SLOTS
        )


@torch.no_grad()
def _write(pieces: Sequence[Tensor], targets: Sequence[Tensor], source: Tensor, slots: Tensor) -> None:
    for x, cache in zip(pieces, targets, strict=True):
        rows = cache.shape[1]
        cache[slots // max(rows, 1), slots % max(rows, 1)] = x.flatten(0, -3)[source]


def _check_integers(name: str, x: Tensor, like: Tensor, rank: int | None = None) -> None:
    if not isinstance(x, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise NotATensor(argument=name, got=type(x).__name__)
    if x.dtype not in (torch.int32, torch.int64):
        _refuse(name, "its dtype", x.dtype, "torch.int32 or torch.int64")
    if x.device != like.device:
        _refuse(name, "its device", x.device, f"{like.device}, as the others")
    if rank is not None and x.ndim != rank:
        _refuse(name, "its number of dimensions", x.ndim, f"{rank}")


def _refuse(
    argument: str, what: str, got: object, expected: str, instead: str = "Nothing was written to a cache."
) -> None:
    raise WrongPages(argument=argument, what=what, got=got, expected=expected, instead=instead)

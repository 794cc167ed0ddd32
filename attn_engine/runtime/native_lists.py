"""Lists of blocks that a call gives, made by compiled code on the CPU.

They are those that `given_lists` and `given_entries` make; reading the mask or the indices once is most of the time.
"""

from __future__ import annotations

import ctypes
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from attn_engine.codegen.lower.given_blocks import BITS
from attn_engine.codegen.lower.listed import blocks_param, seen_param, starts_param
from attn_engine.runtime.cpu_compile import compile_library, find_compiler
from attn_engine.runtime.given_lists import LOOPS, Tensors

SOURCE = '#include "block_lists.h"\n'
Three = tuple[Tensor, Tensor, Tensor | None]  # starts, blocks, and words of bits
_INT, _POINTER = ctypes.c_int64, ctypes.c_void_p
_RESULTS = {"units_of_mask": _INT, "units_of_indices": _INT}


class _ListShape(ctypes.Structure):
    _fields_ = (("sizes", _INT * 4), ("strides", _INT * 4))


class _Lists(ctypes.Structure):
    _fields_ = (("starts", _POINTER), ("blocks", _POINTER), ("words", _POINTER))


@cache
def usable() -> bool:
    """Whether there is a compiler."""
    return find_compiler() is not None


@cache
def _library() -> ctypes.CDLL:
    return compile_library("block_lists", SOURCE, lambda path: ctypes.CDLL(str(Path(path))))


def _call(name: str, *arguments: object) -> int:
    """A function of the library; tensors by their address."""
    function = getattr(_library(), f"attn_engine_{name}")
    function.restype = _RESULTS.get(name)
    passed = (
        _POINTER(x.data_ptr() if isinstance(x, Tensor) else None)
        if x is None or isinstance(x, Tensor)
        else _INT(x)
        if isinstance(x, int)
        else ctypes.byref(x)  # pyright: ignore[reportArgumentType]
        for x in arguments
    )
    return function(*passed)


def _shape(sizes: tuple[int, int, int, int], strides: tuple[int, ...] = (0, 0, 0, 0)) -> _ListShape:
    return _ListShape((_INT * 4)(*sizes), (_INT * 4)(*strides))


def _pointers(lists: Three) -> _Lists:
    return _Lists(*(None if x is None else x.data_ptr() for x in lists))


def _ints(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.int32)


@dataclass(frozen=True, slots=True)
class UnitLists:
    """Which units of keys every unit of queries sees: `columns`, ascending, where `starts` says.

    shape: batches and heads that the tensors of the call tell apart, units of queries and of keys. batches, heads: of
    the lists.
    """

    starts: Tensor
    columns: Tensor
    shape: tuple[int, int, int, int]
    batches: int
    heads: int

    def unions(self, smallest: int, most: int) -> tuple[list[int], list[int]]:
        """How many units of queries share a list, twice as many each time, and how many entries lists then have."""
        sizes, rows = [smallest], self.shape[2]
        while 2 * sizes[-1] <= most and sizes[-1] < rows:
            sizes.append(2 * sizes[-1])
        counts = torch.zeros(len(sizes), dtype=torch.int64)
        _call("union_counts", self.starts, self.columns, _shape(self.shape), smallest, len(sizes), counts)
        return sizes, counts.tolist()

    def cut(self, q_units: int, kv_units: int) -> CutLists:
        """In blocks of so many units."""
        b, h, rows, columns = self.shape
        shape = b, h, -(-rows // q_units), -(-columns // kv_units)
        if q_units == kv_units == 1:
            return CutLists(shape, {"full": (self.starts, self.columns, None)}, self.batches, self.heads)
        words = -(-q_units * kv_units // BITS)
        most = len(self.columns)  # no entry without a unit
        lists: dict[str, Three] = {
            "partial": (_ints(b * h * (shape[2] + 1)), _ints(most), _ints(most * words)),
            "full": (_ints(b * h * (shape[2] + 1)), _ints(most), None),
        }
        made = [_pointers(x) for x in lists.values()]
        _call("cut_units", self.starts, self.columns, _shape(self.shape), q_units, kv_units, *made)
        for kind, (starts, blocks, seen) in lists.items():
            count = int(starts[-1]) if len(starts) else 0
            seen = None if seen is None else seen[: count * words]
            lists[kind] = starts, blocks[:count], seen
        return CutLists(shape, lists, self.batches, self.heads)


@dataclass(frozen=True, slots=True)
class CutLists:
    """shape: batches, heads, blocks of queries and of keys. by_kind: starts, blocks and words of lists of queries."""

    shape: tuple[int, int, int, int]
    by_kind: dict[str, Three]
    batches: int
    heads: int

    def tensors(self, loops: Collection[str] = LOOPS) -> Tensors:
        """The lists of these loops by the kernels' names, in the order of `listed.list_params`."""
        b, h, rows, columns = self.shape
        found: Tensors = {}
        for loop, count in zip(LOOPS, (rows, columns), strict=True):
            if loop not in loops:
                continue
            for kind, lists in self.by_kind.items():
                starts, blocks, seen = lists if loop == "kv" else self._turned(lists)
                places = starts.view(b, h, count + 1).expand(self.batches, self.heads, count + 1)
                found |= {starts_param(loop, kind): places, blocks_param(loop, kind): blocks}
                if seen is not None:
                    found[seen_param(loop)] = seen
        return found

    def _turned(self, lists: Three) -> Three:
        """The lists of keys from those of queries."""
        b, h, _, columns = self.shape
        _, blocks, seen = lists
        words = 0 if seen is None or not len(blocks) else len(seen) // len(blocks)
        more = None if seen is None else torch.empty_like(seen)
        turned = _ints(b * h * (columns + 1)), torch.empty_like(blocks), more
        _call("turn_lists", _pointers(lists), _shape(self.shape), words, _pointers(turned))
        return turned


def units_of_mask(mask: Tensor, batches: int, heads: int) -> UnitLists:
    """Of a bool mask (1 or batches, 1 or heads, units of queries, units of keys) on the CPU."""
    b, h, rows, columns = mask.shape
    shape, starts = _shape((b, h, rows, columns), mask.stride()), _ints(b * h * (rows + 1))
    count = _call("units_of_mask", mask, shape, starts, None)
    found = _ints(count)
    _call("units_of_mask", mask, shape, starts, found)
    return UnitLists(starts, found, (b, h, rows, columns), batches, heads)


def units_of_indices(
    indices: Tensor, counts: Tensor | None, kv_units: int, batches: int, heads: int
) -> tuple[UnitLists, int]:
    """Of int32 or int64 indices (1 or batches, 1 or heads, units of queries, most) on the CPU, and the largest of them.

    counts: how many of each row matter, from 0 to most. Indices below 0 and from kv_units on are nothing.
    """
    b, h, rows, most = indices.shape
    shape, starts, found = (
        _shape((b, h, rows, most), indices.stride()),
        _ints(b * h * (rows + 1)),
        _ints(indices.numel()),
    )
    largest = torch.empty(1, dtype=torch.int64)
    wide = int(indices.dtype is torch.int64)
    counts = None if counts is None else counts.to(torch.int64).contiguous()
    count = _call("units_of_indices", indices, wide, shape, counts, kv_units, starts, found, largest)
    return UnitLists(starts, found[:count], (b, h, rows, kv_units), batches, heads), int(largest)

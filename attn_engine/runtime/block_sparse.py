"""Blocks that a call gives as a mask or as indices: what they must be, in what units they speak, and what they mean.

A unit is what one element of the tensors speaks of: `block_q` queries (1: a query token) by `block_kv` keys. Everything
counts from the first row of a sequence; units past the end of a sequence are ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from attn_engine.errors import AttnEngineError, DeviceMismatch, NotATensor

NAMES = ("block_sparse_mask", "block_sparse_indices", "block_num", "block_size")
INTEGERS = (torch.int32, torch.int64)


class WrongBlockSparse(AttnEngineError, ValueError):
    template = "{argument}: {what} is {got}, not {expected}."
    advice = "{instead}"


_MASK = "It is bool (batch, heads or kv heads or 1, queries or blocks of queries, blocks of keys); True is visible."
_INDICES = (
    "It is int32 or int64 (batch, heads or kv heads or 1, queries or blocks of queries, most selected blocks): the "
    "numbers of kv blocks, and -1 for none."
)
_COUNTS = "It is int32 or int64, of the shape of block_sparse_indices without the last dimension."
_SIZE = "Give block_size=64, or block_size=(block_q, block_kv), where block_q=1 means a row for every query."


@dataclass(frozen=True, slots=True)
class Extent:
    """What a call's units have to cover.

    batches: of the call, or the number of its sequences. q_len, kv_len: of the longest sequence. q_rows, kv_rows: what
    one batch has room for. exact: lengths are all the same, so units must cover them exactly.
    """

    batches: int
    heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    q_rows: int
    kv_rows: int
    exact: bool


@dataclass(frozen=True, slots=True)
class Units:
    """The sizes of a unit, and how many of them cover the longest sequence."""

    block_q: int
    block_kv: int
    q_units: int
    kv_units: int


@dataclass(frozen=True, slots=True, eq=False)
class BlockSparse:
    """The arguments as they were given."""

    mask: Tensor | None
    indices: Tensor | None
    counts: Tensor | None
    size: object

    @property
    def main(self) -> Tensor:
        """The tensor that has a row for every unit of queries."""
        found = self.mask if self.mask is not None else self.indices
        assert found is not None
        return found

    @property
    def name(self) -> str:
        return NAMES[0] if self.mask is not None else NAMES[1]

    @property
    def sources(self) -> tuple[Tensor, ...]:
        return tuple(x for x in (self.mask, self.indices, self.counts) if x is not None)

    def units(self, extent: Extent, device: torch.device) -> Units:
        """Raises WrongBlockSparse, NotATensor or DeviceMismatch for what cannot be told without the contents."""
        self._check_kinds(device)
        x = self.main
        form = _MASK if self.mask is not None else _INDICES
        _require(x.ndim == 4, self.name, "its shape", tuple(x.shape), "one of four dimensions", form)
        batches = {1, extent.batches}
        _require(x.shape[0] in batches, self.name, "its first size", x.shape[0], _either(batches), form)
        heads = {1, extent.kv_heads, extent.heads}
        _require(x.shape[1] in heads, self.name, "its number of heads", x.shape[1], _either(heads), form)
        if self.counts is not None:
            shape = tuple(x.shape[:3])
            _require(
                tuple(self.counts.shape) == shape,
                NAMES[2],
                "its shape",
                tuple(self.counts.shape),
                str(shape),
                _COUNTS,
            )
        block_q, block_kv = self._sizes(extent)
        units = Units(block_q, block_kv, -(-extent.q_len // block_q), -(-extent.kv_len // block_kv))
        self._check_units(units, extent)
        return units

    def _check_kinds(self, device: torch.device) -> None:
        if self.mask is not None and self.indices is not None:
            _refuse(
                NAMES[0],
                "an argument beside block_sparse_indices",
                "given",
                "left out",
                "Give one of the two.",
            )
        if self.counts is not None and self.indices is None:
            instead = "It says how many leading entries of each row of block_sparse_indices count."
            _refuse(NAMES[2], "it", "given", "given with block_sparse_indices alone", instead)
        wanted = (((torch.bool,), _MASK), (INTEGERS, _INDICES), (INTEGERS, _COUNTS))
        for name, x, (kinds, form) in zip(
            NAMES, (self.mask, self.indices, self.counts), wanted, strict=False
        ):
            if x is None:
                continue
            if not isinstance(x, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise NotATensor(argument=name, got=type(x).__name__)
            _require(x.dtype in kinds, name, "its dtype", x.dtype, " or ".join(map(str, kinds)), form)
            if x.device != device:
                raise DeviceMismatch(argument=name, got=x.device, expected=device)

    def _sizes(self, extent: Extent) -> tuple[int, int]:
        """(block_q, block_kv), as given or as the shapes say."""
        rows, size = self.main.shape[2], self.size
        if size is None:
            return self._inferred(extent)
        if isinstance(size, tuple | list):
            _require(len(size) == 2, NAMES[3], "it", size, "a number or a pair of numbers", _SIZE)
            return _power_of_two(size[0]), _power_of_two(size[1])
        block = _power_of_two(size)
        if self._rows_are_queries(rows, block, extent):
            return 1, block
        return block, block

    def _rows_are_queries(self, rows: int, block: int, extent: Extent) -> bool:
        """Whether there is a row for every query, and not for every block of queries."""
        blocks = -(-extent.q_len // block)
        if extent.exact:
            return rows != blocks and rows == extent.q_len
        square = self.mask is not None and self.mask.shape[2] == self.mask.shape[3]
        return rows >= extent.q_len and not square

    def _inferred(self, extent: Extent) -> tuple[int, int]:
        rows = self.main.shape[2]
        block_q = block_kv = None
        if extent.exact:
            block_q = 1 if rows == extent.q_len else _size_of_blocks(extent.q_len, rows)
            if self.mask is not None:
                block_kv = _size_of_blocks(extent.kv_len, self.mask.shape[3])
            elif block_q != 1:
                block_kv = block_q
        if block_q is None or block_kv is None:
            _refuse(
                NAMES[3], "it", "left out", f"given where the shape of {self.name} does not tell it", _SIZE
            )
        return block_q, block_kv

    def _check_units(self, units: Units, extent: Extent) -> None:
        what = ["its number of rows", "its number of kv blocks"]
        form = _MASK if self.mask is not None else _INDICES
        shape = self.main.shape[2:]
        for i, (wanted, size) in enumerate(
            ((units.q_units, units.block_q), (units.kv_units, units.block_kv))
        ):
            if i == 1 and self.mask is None:
                return
            if extent.exact:
                _require(
                    shape[i] == wanted,
                    self.name,
                    what[i],
                    shape[i],
                    f"{wanted}, of {size} positions each",
                    form,
                )
            else:
                more = f"{wanted} or more, of {size} positions each"
                _require(shape[i] >= wanted, self.name, what[i], shape[i], more, form)

    def table(self, units: Units, extent: Extent) -> Tensor:
        """bool (1 or batches, 1 or (kv) heads, units of queries, units of keys): which units are visible."""
        if self.mask is not None:
            return self.mask[:, :, : units.q_units, : units.kv_units]
        assert self.indices is not None
        chosen = self.selected(units, extent)
        rows = self.indices[:, :, : units.q_units]
        shape = (*rows.shape[:3], units.kv_units + 1)
        found = torch.zeros(shape, dtype=torch.bool, device=rows.device)
        return found.scatter_(3, chosen, True)[..., :-1]

    def selected(self, units: Units, extent: Extent) -> Tensor:
        """The indices of rows that exist, int64; `units.kv_units` where nothing is selected. Raises WrongBlockSparse
        for one out of range."""
        assert self.indices is not None
        rows = self.indices[:, :, : units.q_units].long()
        counted = rows >= 0
        counts = self.checked_counts(units)
        if counts is not None:
            counted &= torch.arange(rows.shape[3], device=rows.device) < counts[..., None]
        if counted.numel():
            self.check_largest(int(torch.where(counted, rows, -1).max()), units, extent)
        return torch.where(counted & (rows < units.kv_units), rows, units.kv_units)

    def check_largest(self, largest: int, units: Units, extent: Extent) -> None:
        """Raises WrongBlockSparse where an index that counts is out of range."""
        room = -(-extent.kv_rows // units.block_kv)
        wanted = f"less than {room}, the number of kv blocks, or -1 for none"
        _require(largest < room, NAMES[1], "a kv block", largest, wanted, _INDICES)

    def checked_counts(self, units: Units) -> Tensor | None:
        """How many entries of each row that exists count. Raises WrongBlockSparse where a row has not so many."""
        if self.counts is None:
            return None
        counts = self.counts[:, :, : units.q_units]
        self._check_counts(counts)
        return counts

    def _check_counts(self, counts: Tensor) -> None:
        assert self.indices is not None
        if not counts.numel():
            return
        low, high = (int(x) for x in torch.aminmax(counts))
        most = self.indices.shape[3]
        _require(low >= 0, NAMES[2], "its smallest element", low, "0 or more", _COUNTS)
        _require(
            high <= most, NAMES[2], "its largest element", high, f"{most} or less, the size of a row", _COUNTS
        )

    def dense(self, extent: Extent, device: torch.device) -> Tensor:
        """bool (batches, H, q_len, kv_len) of the longest sequence: the definition, in O(S^2) memory."""
        units = self.units(extent, device)
        pairs = (
            self.table(units, extent).repeat_interleave(units.block_q, 2).repeat_interleave(units.block_kv, 3)
        )
        pairs = pairs[:, :, : extent.q_len, : extent.kv_len]
        pairs = pairs.expand(extent.batches, *pairs.shape[1:])
        return pairs.repeat_interleave(extent.heads // pairs.shape[1], 1)


def taken(named: dict[str, object], custom: Mapping[str, object]) -> BlockSparse | None:
    """Takes the arguments that give blocks out of a call's; None where there are none. A custom input of the same name
    keeps it."""
    found = [None if name in custom else named.pop(name, None) for name in NAMES]
    if all(x is None for x in found):
        return None
    if found[0] is None and found[1] is None:
        name = NAMES[2] if found[2] is not None else NAMES[3]
        expected = "given with block_sparse_mask or block_sparse_indices"
        _refuse(name, "it", "given alone", expected, "Give the blocks too, or leave it out.")
    return BlockSparse(*found)  # pyright: ignore[reportArgumentType]


def _size_of_blocks(length: int, blocks: int) -> int | None:
    """The one power of two in which so many blocks cover a length; None where a length of one block leaves it open."""
    if blocks < 2:
        return None
    size = 1
    while -(-length // size) > blocks:
        size *= 2
    return size if -(-length // size) == blocks else None


def _power_of_two(size: object) -> int:
    legal = isinstance(size, int) and not isinstance(size, bool) and size > 0 and size & (size - 1) == 0
    if not legal:
        _refuse(NAMES[3], "it", size, "a power of two", _SIZE)
    assert isinstance(size, int)
    return size


def _either(sizes: set[int]) -> str:
    return " or ".join(str(n) for n in sorted(sizes))


def _require(legal: bool, argument: str, what: str, got: object, expected: str, instead: str) -> None:
    if not legal:
        _refuse(argument, what, got, expected, instead)


def _refuse(argument: str, what: str, got: object, expected: str, instead: str) -> NoReturn:
    raise WrongBlockSparse(argument=argument, what=what, got=got, expected=expected, instead=instead)

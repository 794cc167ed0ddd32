"""Chosen batches, heads and blocks of queries of a mask, and its mask_mod on the positions that are left."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attn_engine.frontend import MaskMod
from attn_engine.masks.mistakes import WrongBlockMask

if TYPE_CHECKING:
    from attn_engine.masks.block_mask import BlockMask


@dataclass(frozen=True, slots=True)
class Rows:
    """What an index chooses, (batch, heads, q blocks) each.

    of_lists: the row of the lists. batch, head, block: where each lay. q_len: the positions of the result.
    """

    of_lists: Tensor
    batch: Tensor
    head: Tensor
    block: Tensor
    q_len: int


def block_rows(mask: BlockMask, index: Any) -> Rows:
    """Raises WrongBlockMask for an index that leaves the mask or that does not keep three dimensions."""
    lists = mask.lists()
    shape = (*mask.shape[:2], lists.q_blocks)
    parts = index if isinstance(index, tuple) else (index,)
    if len(parts) > 3:
        raise _wrong(index, "at most three indices: batch, head and block of queries")
    kept = tuple(
        _kept(i, n, index) for i, n in zip((*parts, *[slice(None)] * (3 - len(parts))), shape, strict=True)
    )
    device = lists.by_q.full.starts.device
    places = torch.arange(shape[0] * shape[1] * shape[2], device=device).reshape(shape)
    try:
        places = places[kept]
    except IndexError:
        raise _wrong(index, f"inside of (B, H, q blocks) = {shape}") from None
    if places.ndim != 3 or not places.numel():
        raise _wrong(index, "a choice of one or more batches, heads and blocks of queries")
    block = places % shape[2]
    head, batch = places // shape[2] % shape[1], places // (shape[1] * shape[2])
    own_batch, own_head = lists.shape
    row = ((batch % own_batch) * own_head + head % own_head) * shape[2] + block
    return Rows(row, batch, head, block, _length(block, lists.block_q, lists.q_len))


def _kept(i: Any, n: int, index: Any) -> Any:
    """An int as the slice that keeps its dimension."""
    if isinstance(i, bool) or not isinstance(i, int | slice | Tensor):
        raise _wrong(index, "made of ints, slices and tensors")
    if not isinstance(i, int):
        return i.to(torch.int64) if isinstance(i, Tensor) and i.dtype is not torch.bool else i
    if not -n <= i < n:
        raise _wrong(index, f"within {n} entries")
    return slice(i % n, i % n + 1)


def _wrong(index: Any, expected: str) -> WrongBlockMask:
    instead = "Index as block_mask[batch, head, q_block]."
    return WrongBlockMask(argument="index", got=index, expected=expected, instead=instead)


def _length(block: Tensor, size: int, length: int) -> int:
    """How many positions the chosen blocks have; only the last one may be short."""
    count = block.shape[2]
    ends_short = length % size and bool((block[..., -1] == (length - 1) // size).all())
    return count * size - (size - length % size if ends_short else 0)


def sliced_mask(mask: BlockMask, rows: Rows) -> MaskMod | None:
    """mask_mod, asked about where each position lay before; itself where that is where it lies now."""
    mask_mod = mask.mask_mod
    if mask_mod is None:
        return None
    axes = (rows.batch[:, :1, :1], rows.head[:1, :, :1], rows.block[:1, :1, :])
    along = (rows.batch, rows.head, rows.block)
    if any(bool((whole != part).any()) for whole, part in zip(along, axes, strict=True)):
        raise _wrong("[...]", "the same batches, heads and blocks for each other: give one tensor at most")
    batches, heads, blocks = (x.reshape(-1) for x in axes)
    if all(_is_range(x) for x in (batches, heads, blocks)):
        return mask_mod
    size = mask.BLOCK_SIZE[0]
    first = blocks * size

    def moved_mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        position = first[q_idx // size] + q_idx % size
        return mask_mod(batches[b], heads[h], position, kv_idx)

    return moved_mask


def _is_range(x: Tensor) -> bool:
    return bool((x == torch.arange(len(x), device=x.device)).all())


def adjusted(mask: BlockMask, q_len: int, kv_len: int) -> BlockMask:
    """The same mask for other lengths, as torch's `_adjust`: blocks of a mask that was given as blocks are left out
    beyond the new ends; such a mask cannot grow by a block (WrongBlockMask)."""
    from attn_engine.masks.block_mask import BlockMask

    if mask.source is not None:
        source = replace(mask.source, lengths=(q_len, kv_len), _plan=None)
        return mask.like(source)
    rows, columns = (-(-n // size) for n, size in zip((q_len, kv_len), mask.BLOCK_SIZE, strict=True))
    tensors: list[Tensor] = []
    for name in ("kv", "full_kv"):
        counts, indices = mask.padded(name) or (None, None)
        if counts is not None and indices is not None:
            counts, indices = counts[:, :, :rows], indices[:, :, :rows]
            listed = torch.arange(indices.shape[3], device=counts.device) < counts[..., None]
            tensors += [(listed & (indices < columns)).sum(-1), indices[..., :columns]]
    cut = BlockMask.from_kv_blocks(
        *tensors, BLOCK_SIZE=mask.BLOCK_SIZE, mask_mod=mask.mask_mod, seq_lengths=(q_len, kv_len)
    )
    return mask.like(cut.lists())

"""To and from torch's BlockMask, and from padded tensors in its form."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attn_engine.frontend import MaskMod
from attn_engine.frontend.names import type_name
from attn_engine.masks.block_mask import BlockMask
from attn_engine.masks.create import checked_block_size
from attn_engine.masks.lists import Csr, Side
from attn_engine.masks.mistakes import NotABlockMask, WrongBlockMask
from attn_engine.masks.plan import both_sides
from attn_engine.masks.rows import from_padded, listed_of

Padded = tuple[Tensor, Tensor, Tensor | None, Tensor | None]
_FIELDS = ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices", "BLOCK_SIZE", "mask_mod")


def from_padded_blocks(
    tensors: Padded,
    block_size: int | tuple[int, int],
    mask_mod: MaskMod | None,
    seq_lengths: tuple[int, int] | None,
    has_q_blocks: bool,
) -> BlockMask:
    """See BlockMask.from_kv_blocks."""
    counts, indices, full_counts, full_indices = (
        None if x is None else _of_four(x, i % 2) for i, x in enumerate(tensors)
    )
    if counts is None or indices is None or (full_counts is None) != (full_indices is None):
        raise _wrong("full_kv_num_blocks", None, "given together with full_kv_indices")
    size = checked_block_size(block_size)
    rows, width = indices.shape[2], indices.shape[3]
    lengths = (rows * size[0], width * size[1]) if seq_lengths is None else seq_lengths
    columns = -(-lengths[1] // size[1])
    if -(-lengths[0] // size[0]) != rows:
        raise _wrong("seq_lengths", lengths, f"a pair whose first length has {rows} blocks of {size[0]}")
    partial = _checked("kv", counts, indices, columns)
    if full_counts is not None and full_indices is not None:
        if full_counts.shape != counts.shape:
            raise _wrong("full_kv_num_blocks.shape", tuple(full_counts.shape), f"{tuple(counts.shape)}")
        full = _checked("full_kv", full_counts, full_indices, columns)
        _check_apart(partial, full, columns)
    else:
        full = Csr(torch.zeros_like(partial.starts), partial.indices[:0])
    lists = both_sides(size, lengths, Side(partial, full))
    batch, heads = counts.shape[:2]
    separate_full = full_counts is not None
    return BlockMask(lists, mask_mod, batch, heads, separate_full=separate_full, has_q_blocks=has_q_blocks)


def _of_four(x: Any, is_indices: int) -> Tensor:
    """With batch and head dimensions in front where they are missing."""
    if not isinstance(x, Tensor):
        raise NotABlockMask(
            argument="kv_indices" if is_indices else "kv_num_blocks", got=type_name(x), missing="shape"
        )
    wanted = 3 + is_indices
    if not 1 + is_indices <= x.ndim <= wanted or x.is_floating_point() or x.dtype is torch.bool:
        shape = "(B, H, q blocks, width)" if is_indices else "(B, H, q blocks)"
        raise _wrong(
            "kv_indices" if is_indices else "kv_num_blocks",
            f"{x.dtype} {tuple(x.shape)}",
            f"ints of shape {shape}",
        )
    return x.reshape((1,) * (wanted - x.ndim) + x.shape)


def _checked(name: str, counts: Tensor, indices: Tensor, columns: int) -> Csr:
    """Compressed rows. Raises WrongBlockMask for counts and indices that do not fit each other or the lengths."""
    if indices.shape[:3] != counts.shape:
        raise _wrong(f"{name}_indices.shape", tuple(indices.shape), f"{tuple(counts.shape)} and one more")
    if counts.numel() and not 0 <= int(counts.min()) <= int(counts.max()) <= indices.shape[3]:
        raise _wrong(
            f"{name}_num_blocks",
            int(counts.max()),
            f"between 0 and the width {indices.shape[3]} of {name}_indices",
        )
    batch, heads, rows = counts.shape
    csr = from_padded(counts, indices, (batch, heads, rows))
    if len(csr.indices) and not 0 <= int(csr.indices.min()) <= int(csr.indices.max()) < columns:
        raise _wrong(
            f"{name}_indices", int(csr.indices.max()), f"a block of keys, of which there are {columns}"
        )
    _check_once(name, csr)
    return csr


def _check_once(name: str, csr: Csr) -> None:
    rows = listed_of(csr).rows
    again = (csr.indices[1:] == csr.indices[:-1]) & (rows[1:] == rows[:-1])
    if bool(again.any()):
        block = int(csr.indices[1:][again][0])
        raise _wrong(f"{name}_indices", block, "listed once in its row")


def _check_apart(partial: Csr, full: Csr, columns: int) -> None:
    keys = [listed_of(x).rows.to(torch.int64) * columns + x.indices for x in (partial, full)]
    both = torch.isin(*keys)
    if bool(both.any()):
        block = int(partial.indices[both][0])
        raise _wrong("full_kv_indices", block, "apart from kv_indices: a block is in one of them only")


def _wrong(argument: str, got: Any, expected: str) -> WrongBlockMask:
    instead = "See BlockMask.from_kv_blocks for the form."
    return WrongBlockMask(argument=argument, got=got, expected=expected, instead=instead)


def from_torch(block_mask: Any) -> BlockMask:
    """See BlockMask.from_torch."""
    if isinstance(block_mask, BlockMask):
        return block_mask
    for name in _FIELDS:
        if not hasattr(block_mask, name):
            raise NotABlockMask(argument="block_mask", got=type_name(block_mask), missing=name)
    tensors = tuple(getattr(block_mask, name) for name in _FIELDS[:4])
    lengths = getattr(block_mask, "seq_lengths", None)
    has_q_blocks = getattr(block_mask, "q_num_blocks", None) is not None
    return from_padded_blocks(tensors, block_mask.BLOCK_SIZE, block_mask.mask_mod, lengths, has_q_blocks)


def to_torch(mask: BlockMask) -> Any:
    """See BlockMask.to_torch."""
    from torch.nn.attention import flex_attention

    pairs = {name: mask.padded(name) or (None, None) for name in ("kv", "full_kv", "q", "full_q")}
    fields: dict[str, Any] = {f"{name}_num_blocks": pair[0] for name, pair in pairs.items()}
    fields |= {f"{name}_indices": pair[1] for name, pair in pairs.items()}
    mask_mod = flex_attention.noop_mask if mask.mask_mod is None else mask.mask_mod
    return flex_attention.BlockMask(
        seq_lengths=mask.seq_lengths, BLOCK_SIZE=mask.BLOCK_SIZE, mask_mod=mask_mod, **fields
    )

"""Any BlockMask, read by the names of its fields, as one mask_mod that says the same."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attn_engine.errors import DeviceMismatch
from attn_engine.flex.mistakes import WrongBlockMask

Mask = Callable[..., Any]
WHOLE = 1 << 30  # torch's block size of a mask that is one block: it fits every length
PARTIAL, FULL = 1, 2
_MADE_ANEW = "Make one for these lengths: create_block_mask(mask_mod, B, H, Q_LEN, KV_LEN)."


def mask_of(block_mask: Any, query: Tensor, key: Tensor) -> Mask | None:
    """The mask of a BlockMask for these tensors; raises WrongBlockMask where it does not fit them."""
    mask_mod = checked(block_mask, query, key)
    q_block, kv_block = block_mask.BLOCK_SIZE
    if q_block == kv_block == WHOLE:
        return mask_mod
    blocks = table_of(block_mask).expand(query.shape[0], query.shape[1], -1, -1)
    return listed(mask_mod, blocks, q_block, kv_block)


def checked(block_mask: Any, query: Tensor, key: Tensor) -> Mask | None:
    """The mask_mod of a BlockMask once it fits: None where it keeps every pair."""
    for name in ("mask_mod", "BLOCK_SIZE", "kv_num_blocks", "kv_indices", "seq_lengths"):
        if not hasattr(block_mask, name):
            got = type(block_mask).__name__
            instead = "Make it with create_block_mask or BlockMask.from_kv_blocks."
            raise WrongBlockMask(problem=f"a {got} without {name} is no BlockMask", instead=instead)
    lengths = tuple(block_mask.seq_lengths)
    given = query.shape[2], key.shape[2]
    whole = tuple(block_mask.BLOCK_SIZE) == (WHOLE, WHOLE)
    if lengths != given and not whole:
        problem = f"it was made for lengths {lengths}, and query and key have {given}"
        raise WrongBlockMask(problem=problem, instead=_MADE_ANEW)
    counts = block_mask.kv_num_blocks
    if counts.ndim != 3:
        problem = f"kv_num_blocks has shape {tuple(counts.shape)} instead of (batches, heads, query blocks)"
        raise WrongBlockMask(problem=problem, instead="Add leading dimensions of 1.")
    for what, made_for, got in zip(("batches", "heads"), counts.shape, query.shape, strict=False):
        if made_for not in (1, got):
            raise WrongBlockMask(problem=f"it has {made_for} {what}, and query {got}", instead=_MADE_ANEW)
    if counts.device != query.device:
        raise DeviceMismatch(argument="block_mask", got=counts.device, expected=query.device)
    return _mask_mod(block_mask)


def _mask_mod(block_mask: Any) -> Mask | None:
    mask_mod = block_mask.mask_mod
    name, module = getattr(mask_mod, "__name__", ""), getattr(mask_mod, "__module__", "") or ""
    if name == "_sliced_mask_mod_error" and module.startswith("torch."):
        raise WrongBlockMask(
            problem="it is a slice of another one, and slicing leaves it without a mask_mod",
            instead="Set its mask_mod from the mask that was sliced, with positions counted from the slice's start.",
        )
    keeps_all = name == "noop_mask" and module.startswith(("torch.", "attn_engine."))
    return None if keeps_all else mask_mod


def listed(mask_mod: Mask | None, blocks: Tensor, q_block: int, kv_block: int) -> Mask:
    """A pair counts where its block is listed as full, or as partial and mask_mod keeps it."""
    if mask_mod is None:
        return lambda b, h, q_idx, kv_idx: blocks[b, h, q_idx // q_block, kv_idx // kv_block] > 0

    def listed_mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        block = blocks[b, h, q_idx // q_block, kv_idx // kv_block]
        return (block == FULL) | ((block == PARTIAL) & mask_mod(b, h, q_idx, kv_idx))

    return listed_mask


# Tables by BlockMask, with the versions of the lists that they were made from.
_tables: weakref.WeakKeyDictionary[Any, tuple[tuple[int, ...], Tensor]] = weakref.WeakKeyDictionary()


def table_of(block_mask: Any) -> Tensor:
    """(Bm, Hm, query blocks, key blocks) int32: 0 for blocks in no list, PARTIAL, FULL."""
    if torch.compiler.is_compiling():
        return _table(block_mask)
    lists = [x for name in _LISTS if (x := getattr(block_mask, name, None)) is not None]
    state = tuple(n for x in lists for n in (id(x), 0 if x.is_inference() else x._version))
    found = _tables.get(block_mask)
    if found is None or found[0] != state:
        found = _tables[block_mask] = state, _table(block_mask)
    return found[1]


_LISTS = ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices")


def _table(block_mask: Any) -> Tensor:
    (q_len, kv_len), (q_block, kv_block) = block_mask.seq_lengths, block_mask.BLOCK_SIZE
    shape = -(-q_len // q_block), -(-kv_len // kv_block)
    table = _scattered(block_mask.kv_num_blocks, block_mask.kv_indices, shape) * PARTIAL
    if getattr(block_mask, "full_kv_num_blocks", None) is not None:
        full = _scattered(block_mask.full_kv_num_blocks, block_mask.full_kv_indices, shape)
        table = torch.where(full > 0, FULL, table)
    return table


def _scattered(counts: Tensor, indices: Tensor, shape: tuple[int, int]) -> Tensor:
    """1 where a block is listed: of each row of `indices`, the first `counts` entries; the rest is undefined."""
    rows, columns = shape
    listed = torch.arange(indices.shape[-1], device=counts.device) < counts[..., None]
    target = torch.where(listed, indices.long(), columns)
    table = torch.zeros((*counts.shape, columns + 1), dtype=torch.int32, device=counts.device)
    return table.scatter_(-1, target, 1)[..., :rows, :columns].contiguous()

"""create_block_mask: FlexAttention's function, planned instead of evaluated."""

from __future__ import annotations

from typing import Any

import torch

from attn_engine.frontend import MaskMod
from attn_engine.masks.block_mask import BlockMask
from attn_engine.masks.mistakes import WrongBlockMask
from attn_engine.masks.plan import MaskSource
from attn_engine.masks.program import mask_program

BlockSize = int | tuple[int, int]


def create_block_mask(
    mask_mod: MaskMod,
    B: int | None,
    H: int | None,
    Q_LEN: int,
    KV_LEN: int,
    device: torch.device | str | None = None,
    BLOCK_SIZE: BlockSize = 128,
    _compile: bool = False,
    separate_full_blocks: bool = True,
) -> BlockMask:
    """The blocks that mask_mod(b, h, q_idx, kv_idx) -> bool meets; True keeps a pair.

    B, H: batch and heads; None: the mask is the same for all. BLOCK_SIZE: positions per block, of queries and keys or
    one number for both. device: where the mask's tensors are and its lists will be; None: theirs, or torch's
    accelerator.
    separate_full_blocks: False lists wholly visible blocks among the partial ones. _compile: accepted and not needed.

    mask_mod is traced and analysed; no array of Q_LEN x KV_LEN is made. Lists are made when they are asked for, and
    again where what the mask reads has changed. Raises typed errors, with the user's line, for a mask that cannot be
    traced or does not return a bool, for tensors on another device, indices that leave a tensor, and sizes below 1.
    """
    if not callable(mask_mod):
        raise _wrong("mask_mod", mask_mod, "a function of (b, h, q_idx, kv_idx)")
    batch, heads = (1 if n is None else checked_size(name, n) for name, n in (("B", B), ("H", H)))
    lengths = checked_size("Q_LEN", Q_LEN), checked_size("KV_LEN", KV_LEN)
    size = checked_block_size(BLOCK_SIZE)
    source = MaskSource(
        mask_mod, batch, heads, lengths, _device(device, mask_mod), size, separate_full_blocks
    )
    source.plan()
    return BlockMask(source, mask_mod, batch, heads, separate_full=separate_full_blocks)


def checked_size(name: str, n: Any) -> int:
    """A size as an int; raises WrongBlockMask unless it is one of 1 or more."""
    if isinstance(n, bool) or not isinstance(n, int | torch.SymInt) or n < 1:
        raise _wrong(name, n, "an int of 1 or more")
    return int(n)


def checked_block_size(size: Any) -> tuple[int, int]:
    """(positions of q, positions of kv) per block."""
    pair = tuple(size) if isinstance(size, tuple | list) else (size, size)
    if len(pair) != 2:
        raise _wrong("BLOCK_SIZE", size, "an int or a pair of ints")
    q, kv = (checked_size("BLOCK_SIZE", n) for n in pair)
    return q, kv


def _device(device: torch.device | str | None, mask_mod: MaskMod) -> torch.device:
    if device is not None:
        return torch.empty(0, device=device).device  # "cuda" as "cuda:0"
    tensors = [t.accessor() for t in mask_program(mask_mod).trace.tensors]
    if tensors:
        return tensors[0].device
    return _device(torch.accelerator.current_accelerator() or "cpu", mask_mod)


def _wrong(argument: str, got: Any, expected: str) -> WrongBlockMask:
    instead = "Call create_block_mask(mask_mod, B, H, Q_LEN, KV_LEN, device, BLOCK_SIZE)."
    return WrongBlockMask(argument=argument, got=got, expected=expected, instead=instead)

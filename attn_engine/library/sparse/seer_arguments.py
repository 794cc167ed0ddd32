"""What SeerAttention's functions are called with: typed errors that name the argument, before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from attn_engine.errors import WrongArgument
from attn_engine.library.arguments import at_least, integers

SMALLEST_BLOCK = 16


def block_of(block_size: object) -> int:
    """`block_size`, a power of two from 16 on; raises WrongArgument."""
    at_least("block_size", block_size, SMALLEST_BLOCK)
    assert isinstance(block_size, int)
    if block_size & (block_size - 1):
        instead = "Take 16, 32, 64, ..."
        raise WrongArgument(argument="block_size", got=block_size, expected="a power of two", instead=instead)
    return block_size


def blocks(length: int, block_size: int) -> int:
    """How many blocks hold so many positions."""
    return -(-length // block_size)


def shaped(argument: str, x: object, shape: Sequence[object], meaning: str) -> Tensor:
    """A tensor of this shape, where a str or None stands for any size; raises WrongArgument."""
    found = tuple(x.shape) if isinstance(x, Tensor) else None
    wanted = tuple(shape)
    fits = found is not None and len(found) == len(wanted)
    if not fits or any(isinstance(n, int) and n != m for n, m in zip(wanted, found or (), strict=True)):
        expected = f"a tensor ({', '.join(map(str, wanted))}), {meaning}"
        raise WrongArgument(
            argument=argument,
            got=x if found is None else found,
            expected=expected,
            instead="Check how it was made.",
        )
    assert isinstance(x, Tensor)
    return x


def mask_of_blocks(
    block_mask: object, batches: int, heads: int, kv_heads: int, sizes: Sequence[int], meaning: str
) -> Tensor:
    """`block_mask`, bool (batches, heads or kv_heads, *sizes); raises WrongArgument."""
    of_heads = f"{heads} or {kv_heads} heads" if heads != kv_heads else heads
    mask = shaped("block_mask", block_mask, (batches, of_heads, *sizes), meaning)
    if mask.dtype is not torch.bool:
        instead = "Compare or convert it: block_mask.bool()."
        raise WrongArgument(
            argument="block_mask", got=mask.dtype, expected="of dtype torch.bool", instead=instead
        )
    if mask.shape[1] not in (heads, kv_heads):
        expected = f"{heads} (of q) or {kv_heads} (of k)"
        instead = "Give it for one of these; repeat_kv repeats heads."
        raise WrongArgument(
            argument="heads of block_mask", got=mask.shape[1], expected=expected, instead=instead
        )
    return mask


def packed_lengths(argument: str, cu_seqlens: object, rows: int, max_seqlen: object) -> list[int]:
    """The length of every sequence, after one look at their sums; raises WrongArgument.

    rows: of the packed tensors, which the sequences fill.
    """
    integers(argument, cu_seqlens, (1,))
    assert isinstance(cu_seqlens, Tensor)
    at_least("max_seqlen", max_seqlen, 0)
    assert isinstance(max_seqlen, int)
    ends = cu_seqlens.tolist()
    lengths = [end - start for start, end in pairwise(ends)]
    instead = "Give the sums of lengths from 0 on: [0, len_0, len_0 + len_1, ...]."
    if not ends or ends[0] != 0 or min(lengths, default=0) < 0:
        raise WrongArgument(argument=argument, got=ends, expected="ascending from 0", instead=instead)
    if ends[-1] != rows:
        expected = f"{rows}, the rows of q"
        raise WrongArgument(
            argument=f"the end of {argument}", got=ends[-1], expected=expected, instead=instead
        )
    longest = max(lengths, default=0)
    if longest > max_seqlen:
        expected = f"at least {longest}, the longest sequence"
        raise WrongArgument(argument="max_seqlen", got=max_seqlen, expected=expected, instead="Raise it.")
    return lengths

"""The sizes of native sparse attention, with their symbols in the paper."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

from torch import Tensor

from attn_engine.errors import WrongArgument
from attn_engine.library.arguments import at_least

FORCED = 3  # blocks that are always selected: the first one, the query's own, and the one before it


@dataclass(frozen=True, slots=True)
class Compression:
    """Blocks of l = compression_block tokens, one from every d = compression_stride tokens on; d divides l.

    Raises WrongArgument.
    """

    block: int = 32
    stride: int = 16

    def __post_init__(self) -> None:
        at_least("compression_block", self.block, 1)
        at_least("compression_stride", self.stride, 1)
        multiple("compression_block", self.block, self.stride)

    def complete(self, length: int) -> int:
        """How many blocks lie in so many tokens: floor((T - l) / d) + 1, from T = l on.

        >>> [Compression(32, 16).complete(length) for length in (0, 31, 32, 47, 48)]
        [0, 0, 1, 1, 2]
        """
        return max(0, (length - self.block) // self.stride + 1)

    def complete_each(self, lengths: Tensor) -> Tensor:
        """`complete` for every sequence."""
        blocks = (lengths - self.block).div(self.stride, rounding_mode="floor") + 1
        return blocks.clamp(min=0)


@dataclass(frozen=True, slots=True)
class Sizes:
    """selection_block l', selected_blocks n, window w.

    l' is a multiple of d, at least l, and a power of two; n is at least 3. Raises WrongArgument.
    """

    compression: Compression
    selection_block: int = 64
    selected_blocks: int = 16
    window: int = 512

    def __post_init__(self) -> None:
        at_least("selection_block", self.selection_block, 1)
        at_least("selected_blocks", self.selected_blocks, FORCED)
        at_least("window", self.window, 1)
        block = self.selection_block
        multiple("selection_block", block, self.compression.stride)
        if block < self.compression.block:
            expected = f"at least compression_block, {self.compression.block}"
            refuse("selection_block", block, expected, "Take 64 for blocks of 32.")
        power_of_two("selection_block", block)


def power_of_two(argument: str, value: object) -> None:
    """Raises WrongArgument for another number."""
    at_least(argument, value, 1)
    if isinstance(value, int) and value & (value - 1):
        refuse(argument, value, "a power of two", "Take 16, 32, 64, ...")


def refuse(argument: str, got: object, expected: str, instead: str) -> NoReturn:
    """Raises WrongArgument."""
    raise WrongArgument(argument=argument, got=got, expected=expected, instead=instead)


def multiple(argument: str, value: int, stride: int, called: str = "compression_stride") -> None:
    """Raises WrongArgument for what is no multiple of the stride, which the caller calls `called`."""
    if value % stride:
        instead = f"Take {stride}, {2 * stride}, {4 * stride}, ..."
        refuse(argument, value, f"a multiple of {called}, {stride}", instead)

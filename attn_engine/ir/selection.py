"""A selection: which keys, or blocks of keys, count most for a query, by scores summed over the heads of a group.

    importance[b, t, g, u] = sum over query heads h of kv head g of score_mod(scale * q_h . k_u, b, h, t, u)
    pooled: importance of block j = sum over windows u of W[u, j] * importance of u

There are no values and no normaliser; what is kept of a row are the indices of its best candidates (docs/adr/0030).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from attn_engine.errors import WrongArgument
from attn_engine.ir.expr import Var
from attn_engine.ir.program import Attention, Captured, ScalarFn, Sequences


@dataclass(frozen=True, slots=True)
class Overlap:
    """Keys that stand for windows of tokens, and the blocks of tokens that are selected in their place.

    Key i is the window of tokens i * stride to i * stride + length - 1, block j the tokens j * block to
    j * block + block - 1. W[i, j] is how many segments of `stride` tokens they share (NSA, arXiv 2502.11089, Eq. 9).
    length and block are multiples of stride. Raises WrongArgument.

    >>> Overlap(length=32, stride=16, block=64).taps
    {-1: 1, 0: 2, 1: 2, 2: 2, 3: 1}
    """

    length: int
    stride: int
    block: int

    def __post_init__(self) -> None:
        for name in ("length", "stride", "block"):
            size: object = getattr(self, name)
            if not _is_count(size):
                instead = "Give sizes in tokens, such as Overlap(length=32, stride=16, block=64)."
                raise WrongArgument(argument=name, got=size, expected="an int, 1 or more", instead=instead)
        for name in ("length", "block"):
            if getattr(self, name) % self.stride:
                expected = f"a multiple of the stride, {self.stride}"
                instead = "Windows begin every stride tokens, and blocks begin where a window does."
                raise WrongArgument(
                    argument=name, got=getattr(self, name), expected=expected, instead=instead
                )

    @property
    def step(self) -> int:
        """Windows that begin in a block."""
        return self.block // self.stride

    @property
    def reach(self) -> int:
        """Windows that reach into a block from before it."""
        return self.length // self.stride - 1

    @property
    def taps(self) -> dict[int, int]:
        """W[i, j] by i - j * step, in the order in which windows are added up."""
        segments = self.length // self.stride
        return {o: min(o + segments, self.step) - max(o, 0) for o in range(-self.reach, self.step)}

    def blocks(self, windows: int) -> int:
        """Blocks of the tokens that so many windows are made of, with those behind that make no whole window."""
        return -(-(windows * self.stride + self.length - 1) // self.block)


def _is_count(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and x > 0


@dataclass(frozen=True, slots=True)
class Selection:
    """One selection, fully described: the compiler's input.

    pairs: the scores, the mask, the element type and the head dimension; its rule only adds weights up. pool: what is
    selected are blocks. forced: candidates that are taken first, whatever their importance; HEAD is the kv head there,
    KV_IDX the candidate. How many are selected is an argument of a call.
    """

    pairs: Attention
    pool: Overlap | None = None
    forced: ScalarFn | None = None

    @property
    def name(self) -> str:
        return f"select_{self.pairs.name}"

    @property
    def mask(self) -> ScalarFn | None:
        return self.pairs.mask

    @property
    def sequences(self) -> Sequences | None:
        return self.pairs.sequences

    @property
    def functions(self) -> tuple[ScalarFn, ...]:
        return self.pairs.functions if self.forced is None else (*self.pairs.functions, self.forced)

    @property
    def captures(self) -> tuple[Captured, ...]:
        """Captured tensors of all functions, each once."""
        return tuple(dict.fromkeys(c for f in self.functions for c in f.captures))

    @property
    def scalars(self) -> tuple[Var, ...]:
        return tuple(dict.fromkeys(s for f in self.functions for s in f.scalars))

    def with_sequences(self, sequences: Sequences | None) -> Selection:
        return replace(self, pairs=replace(self.pairs, sequences=sequences))

    def candidates(self, keys: int) -> int:
        """How many candidates so many keys make."""
        return keys if self.pool is None else self.pool.blocks(keys)

    def forced_sizes(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """A call's sizes as `forced` sees them: heads are kv heads, keys are candidates."""
        return {**sizes, "heads": sizes["kv_heads"], "kv_len": self.candidates(sizes["kv_len"])}

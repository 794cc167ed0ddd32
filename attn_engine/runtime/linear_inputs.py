"""What one call of a linear attention brings, in logical order: (batch, head, token, dimension)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from attn_engine.ir.ops import Number

Environment = dict[object, object]


@dataclass(frozen=True)
class Sequences:
    """Where the sequences of a call lie: sequence n begins at token first[n] of batch element batch[n].

    packed: they follow each other in the one batch element, as cu_seqlens said.
    """

    batch: tuple[int, ...]
    first: tuple[int, ...]
    length: tuple[int, ...]
    packed: bool

    @staticmethod
    def whole(batches: int, tokens: int) -> Sequences:
        """One for each batch element."""
        return Sequences(tuple(range(batches)), (0,) * batches, (tokens,) * batches, False)

    @staticmethod
    def of_bounds(bounds: tuple[int, ...]) -> Sequences:
        lengths = tuple(b - a for a, b in pairwise(bounds))
        return Sequences((0,) * len(lengths), bounds[:-1], lengths, True)

    def groups(self) -> list[tuple[slice, slice, int, int]]:
        """(sequences, batch elements, first token, length): those that a tensor program can carry out at once."""
        if not self.packed:
            count = len(self.batch)
            return [(slice(0, count), slice(0, count), 0, self.length[0])] if count else []
        return [
            (slice(n, n + 1), slice(0, 1), first, length)
            for n, (first, length) in enumerate(zip(self.first, self.length, strict=True))
        ]


@dataclass(frozen=True, eq=False)
class LinearInputs:
    """q (B, HQ, T, D), k (B, HK, T, D), v (B, H, T, Dv); HQ and HK divide H.

    decay: None, (H,), (B, H, T) or (B, H, T, D). beta: None or (B, H, T). captured, scalars: what the mods read.
    initial_state: None (zeros) or (N, H, D, state columns).
    """

    q: Tensor
    k: Tensor
    v: Tensor
    decay: Tensor | None
    beta: Tensor | None
    captured: Mapping[str, Tensor]
    scalars: Mapping[str, Number]
    initial_state: Tensor | None
    sequences: Sequences

    @property
    def heads(self) -> int:
        return self.v.shape[1]

    def state_shape(self, columns: int) -> tuple[int, int, int, int]:
        return len(self.sequences.batch), self.heads, self.q.shape[3], columns

    def start(self, columns: int, dtype: torch.dtype) -> Tensor:
        """The state before the first token."""
        if self.initial_state is not None:
            return self.initial_state.to(dtype)
        return torch.zeros(self.state_shape(columns), dtype=dtype, device=self.q.device)

    def for_kernels(self) -> dict[str, Tensor]:
        """The tensors by the names that kernels give them, without gradients."""
        found = {"Q": self.q, "K": self.k, "V": self.v, **self.captured}
        if self.decay is not None:
            found["decay_given"] = self.decay
        if self.beta is not None:
            found["beta_given"] = self.beta
        return {name: x.detach() for name, x in found.items()}

    def tensors(self) -> dict[str, Tensor]:
        """Those that may have gradients, by name; captured ones by their kernel names."""
        named = {"q": self.q, "k": self.k, "v": self.v, "decay": self.decay, "beta": self.beta}
        return {**{n: x for n, x in named.items() if x is not None}, **self.captured}

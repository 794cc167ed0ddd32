"""The rows of the table: what is computed, on which shapes, and what must hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Shape:
    """Batches, heads, key heads, lengths and head dimensions of a problem."""

    batches: int = 2
    heads: int = 4
    kv_heads: int = 4
    q_len: int = 70
    kv_len: int = 70
    dim: int = 16
    dim_v: int = 16

    def inputs(self, generator: torch.Generator, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """query, key and value, normally distributed."""
        q = torch.randn(self.batches, self.heads, self.q_len, self.dim, generator=generator)
        k = torch.randn(self.batches, self.kv_heads, self.kv_len, self.dim, generator=generator)
        v = torch.randn(self.batches, self.kv_heads, self.kv_len, self.dim_v, generator=generator)
        return q.to(dtype), k.to(dtype), v.to(dtype)


BASE = Shape()

Make = Callable[
    ..., Callable[..., Any]
]  # called with an entry's tensors by name: returns the user's function
Tensors = Callable[[Shape, torch.Generator], dict[str, Tensor]]


def nothing(_: Shape, __: torch.Generator) -> dict[str, Tensor]:
    return {}


@dataclass(frozen=True, slots=True)
class Entry:
    """An attention that must agree with its dense definition: output, and gradients of q, k, v and `learned`.

    score, mask: make the user's functions from the captured tensors. mask_batches, mask_heads: whether the block mask
    has a batch and a head dimension. view: how q, k and v lie in memory. only_learned: q, k, v require no gradient.
    dtype: of q, k and v.
    """

    name: str
    section: str
    score: Make | None = None
    mask: Make | None = None
    tensors: Tensors = nothing
    learned: tuple[str, ...] = ()
    shape: Shape = BASE
    block_size: Any = 128
    mask_batches: bool = False
    mask_heads: bool = False
    scale: float | None = None
    view: Callable[[Tensor], Tensor] | None = None
    only_learned: bool = False
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True, slots=True)
class Property:
    """A check of its own. `run(subject)` raises where the subject fails; NotApplicable where it cannot be asked.

    backward: whether it needs gradients (and so counts among the backward checks).
    """

    name: str
    section: str
    run: Callable[[Any], None]
    backward: bool = False


class NotApplicable(Exception):
    """The machine or the subject has not what a check is about."""


@dataclass(slots=True)
class Table:
    """Entries in the order in which they were declared."""

    entries: list[Entry] = field(default_factory=list[Entry])

    def add(self, name: str, section: str, **what: Any) -> None:
        self.entries.append(Entry(name, section, **what))

"""What a call means besides its tensors, and the number by which an operator in a compiled graph finds it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol
from weakref import WeakValueDictionary

from torch import Tensor

from attn_engine.errors import StaleGraph
from attn_engine.ir.ops import Number
from attn_engine.ir.passes.row_gradients import differentiable_rows
from attn_engine.runtime.block_lists import tensor_names
from attn_engine.runtime.compiled import CompiledAttention
from attn_engine.runtime.paged_checks import CacheNotDifferentiable
from attn_engine.runtime.strides import empty_ordered_like, logical_view


class Checks(Protocol):
    """What the operators check themselves: a graph may hand them anything."""

    def shapes(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Raise a typed error for dtypes, devices and shapes that the kernels were not made for."""
        ...

    def everything(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        captured: Sequence[Tensor],
        scalars: Mapping[str, Number],
    ) -> None:
        """That, the captured tensors, the indices, and whether the program is still what the user's functions say."""
        ...


@dataclass(frozen=True, eq=False)
class Call:
    """What a call means besides its tensors: the kernels, how q, k, v and o lie ("bshd" or "bhsd"), its checks.

    twice: whether its gradients may be differentiated, by the dense definition and in O(Sq * Skv) memory.
    """

    compiled: CompiledAttention
    layout: str
    checks: Checks
    twice: bool = False

    def logical(self, x: Tensor) -> Tensor:
        """(batch, head, row, dimension), without a copy; the batch is 1 where sequences are packed."""
        return logical_view(x, self.layout)

    @cached_property
    def packed(self) -> bool:
        """Whether tensors have no batch, for their sequences follow each other."""
        sequences = self.compiled.program.sequences
        return sequences is not None and sequences.packed

    def refuse_training(self, tensors: Sequence[Tensor]) -> None:
        """Raise CacheNotDifferentiable where keys lie in pages or have scales, for the first of q, k, v and what is
        captured that requires a gradient."""
        program = self.compiled.program
        if program.cache is not None or (program.sequences is not None and program.sequences.page):
            names = ("q", "k", "v", *self.captures)
            for name, x in zip(names, tensors, strict=False):
                if x.requires_grad:
                    raise CacheNotDifferentiable(argument=name)

    def with_batch(self, saved: Sequence[Tensor]) -> list[Tensor]:
        """Saved row values (B, H, Sq) as kernels take them; those of packed sequences are (H, T) outside."""
        return [x.unsqueeze(0) for x in saved] if self.packed else [*saved]

    def without_batch(self, saved: Sequence[Tensor]) -> list[Tensor]:
        """The other way."""
        return [x.squeeze(0) for x in saved] if self.packed else [*saved]

    @cached_property
    def captures(self) -> tuple[str, ...]:
        return tensor_names(self.compiled.program)

    @cached_property
    def rows(self) -> tuple[str, ...]:
        """The saved row values by name."""
        return self.compiled.program.rule.row_outputs

    @cached_property
    def moving(self) -> frozenset[str]:
        """Those of them that carry gradients."""
        rule = self.compiled.program.rule
        return frozenset((*differentiable_rows(rule), *(p.name for p in rule.pooled if p.kind == "sum")))

    @cached_property
    def floating(self) -> frozenset[str]:
        return frozenset(c.name for c in self.compiled.program.differentiable_captures)

    @cached_property
    def kinds(self) -> dict[str, type[float] | type[int]]:
        scalars = self.compiled.program.scalars
        return {"scale": float, **{s.name: int if s.dtype.value == "int" else float for s in scalars}}

    def named(self, captured: Sequence[Tensor]) -> dict[str, Tensor]:
        """By name; custom inputs that no function reads may follow and are left out."""
        return dict(zip(self.captures, captured, strict=False))

    def numbers(self, scalars: Sequence[Number]) -> dict[str, Number]:
        """By name, of the type that the kernels take."""
        return {n: kind(x) for (n, kind), x in zip(self.kinds.items(), scalars, strict=True)}

    @cached_property
    def refused(self) -> frozenset[str]:
        """Row outputs that no loss may use."""
        return frozenset(p.name for p in self.compiled.program.rule.pooled) - self.moving

    def fixed(self, saved: Sequence[Tensor]) -> list[Tensor]:
        """Those of the row outputs, or of the first of them, that carry no gradient."""
        return [x for name, x in zip(self.rows, saved, strict=False) if name not in self.moving]

    def empty_output(self, q: Tensor, v: Tensor) -> Tensor:
        return empty_ordered_like(q, v.shape[-1])

    def learned(self, captured: Mapping[str, Tensor]) -> tuple[str, ...]:
        """Captured tensors that want a gradient and can have one: those that score_mod reads."""
        return tuple(n for n, t in captured.items() if t.requires_grad and n in self.floating)


_calls: WeakValueDictionary[int, Call] = WeakValueDictionary()
_next_key = itertools.count()


def register(call: Call) -> int:
    """The number by which the operators find `call`; it lives as long as the caller keeps `call`."""
    key = next(_next_key)
    _calls[key] = call
    return key


def registered(key: int) -> Call:
    call = _calls.get(key)
    if call is None:
        raise StaleGraph(what="the engine that the graph was made with no longer exists")
    return call

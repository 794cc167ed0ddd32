"""What equal calls share, laid out once: a call that finds its plan only fills in addresses and numbers.

A plan belongs to one kind of call: one set of shapes, strides, dtypes and devices. It never changes once it is made and
holds no tensor, so calls from several threads may share it. Addresses and captured numbers are read at every call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from operator import mul
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from attn_engine.ir.ops import Number
from attn_engine.runtime.gradient_parts import gradient_parts

Numbers = Mapping[str, Number]
Tensors = Mapping[str, Tensor]
Offsets = tuple[tuple[str, int], ...]
MOST_BACKWARD_PLANS = 16


class Layout(NamedTuple):
    """How a tensor lies: sizes and strides in logical order."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @staticmethod
    def of(x: Tensor) -> Layout:
        return Layout(x.shape, x.stride())

    @staticmethod
    def contiguous(shape: tuple[int, ...]) -> Layout:
        sizes = [max(n, 1) for n in shape[:0:-1]]
        return Layout(shape, tuple(accumulate(sizes, mul, initial=1))[::-1] if shape else ())


class Prepared(Protocol):
    """A kernel with everything but addresses and numbers."""

    def launch(self, addresses: Mapping[str, int], numbers: Numbers) -> None:
        """Run to the end. `addresses` has the kernel's tensors by name, and may have others; so has `numbers`."""
        ...


@dataclass(slots=True, eq=False)
class ForwardPlan:
    """The forward pass of one kind of call.

    out: how the output lies, as q does. rows: (number of saved row values, B, H, Sq). saved, partials: where each saved
    row value and each tensor of the splits begins, in bytes of its buffer. fixed: numbers that the shapes decide.
    """

    kernels: tuple[Prepared, ...]
    element: torch.dtype
    compute: torch.dtype
    out: Layout
    rows: tuple[int, ...]
    saved: Offsets
    partials: Offsets
    partial_elements: int
    fixed: Numbers

    def run(self, q: Tensor, k: Tensor, v: Tensor, captured: Tensors, numbers: Numbers) -> list[Tensor]:
        """[o, all saved row values in one tensor (their number, B, H, Sq)]"""
        out = torch.empty_strided(self.out.shape, self.out.stride, dtype=self.element)
        rows = torch.empty(self.rows, dtype=self.compute)
        addresses = {"Q": q.data_ptr(), "K": k.data_ptr(), "V": v.data_ptr(), "O": out.data_ptr()}
        add_addresses(addresses, rows, self.saved)
        if self.partials:
            parts = torch.empty(self.partial_elements, dtype=self.compute)
            add_addresses(addresses, parts, self.partials)
        for name, x in captured.items():
            addresses[name] = x.data_ptr()
        if self.fixed:
            numbers = {**numbers, **self.fixed}
        for kernel in self.kernels:
            kernel.launch(addresses, numbers)
        return [out, rows]


@dataclass(slots=True, eq=False)
class BackwardPlan:
    """The backward pass of one kind of call, without gradients of captured tensors.

    gradients: how dq, dk, dv lie, as q, k, v do. logical: (batch, head, row, dimension) of such a tensor. delta:
    (B, H, Sq). splits: shares of the keys, or of the queries where shares_queries.
    """

    kernels: tuple[Prepared, ...]
    element: torch.dtype
    compute: torch.dtype
    gradients: tuple[Layout, ...]
    delta: tuple[int, ...]
    saved: Offsets
    splits: int
    shares_queries: bool
    fixed: Numbers
    logical: Callable[[Tensor], Tensor]

    def run(
        self, d_out: Tensor, stored: Sequence[Tensor], captured: Tensors, numbers: Numbers
    ) -> list[Tensor]:
        """[dq, dk, dv]; `stored` is q, k, v, o and the saved row values in one tensor."""
        q, k, v, out, rows = stored
        dq, dk, dv = (torch.empty_strided(x.shape, x.stride, dtype=self.element) for x in self.gradients)
        delta = torch.empty(self.delta, dtype=self.compute)
        by_head = self.logical(dq), self.logical(dk), self.logical(dv)
        parts = gradient_parts(self.shares_queries, by_head, self.splits, self.compute)
        addresses = {
            "Q": q.data_ptr(),
            "K": k.data_ptr(),
            "V": v.data_ptr(),
            "O": out.data_ptr(),
            "dO": d_out.data_ptr(),
            "dK": dk.data_ptr(),
            "dV": dv.data_ptr(),
            "Delta": delta.data_ptr(),
        }
        for name, x in parts.tensors().items():
            addresses[name] = x.data_ptr()
        add_addresses(addresses, rows, self.saved)
        for name, x in captured.items():
            addresses[name] = x.data_ptr()
        for kernel in self.kernels:
            kernel.launch(addresses, {**numbers, **self.fixed})
        parts.finish(numbers["scale"])
        return [dq, dk, dv]


@dataclass(slots=True, eq=False)
class CallKind:
    """Calls of one engine with the same shapes, strides, dtypes and devices, and the plans of their passes.

    calls: how many came, up to two. None where a pass cannot be planned, or was not yet. Two threads may both make a
    plan, and one stays.
    """

    calls: int = 0
    forward: ForwardPlan | None = None
    backward: dict[object, BackwardPlan | None] = field(default_factory=dict[object, "BackwardPlan | None"])


def add_addresses(addresses: dict[str, int], buffer: Tensor, offsets: Offsets) -> None:
    """The addresses of what lies in `buffer`, by name."""
    start = buffer.data_ptr()
    for name, offset in offsets:
        addresses[name] = start + offset

"""A program on a backend: kernels compiled when first needed, tensors allocated, kernels launched in order.

All tensors here are in logical order, (batch, head, row, dimension), with any strides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from attn_engine.codegen.lower.capture import CaptureGradient, Route, capture_gradients
from attn_engine.codegen.lower.values import saved_param
from attn_engine.codegen.pipeline import lower
from attn_engine.codegen.schedule import Gradients, Schedule
from attn_engine.errors import GradientNotSupported
from attn_engine.ir.ops import Number
from attn_engine.ir.program import Attention
from attn_engine.ir.tile import Kernel, Module
from attn_engine.runtime.capture_sums import scatter_sums
from attn_engine.runtime.storage import compute_dtype
from attn_engine.runtime.tile_tables import tile_tables

Tensors = Mapping[str, Tensor]
Scalars = Mapping[str, Number]

# Work items wanted per backward pass: enough to keep the threads of a desktop busy, and few enough that the parts of
# dQ stay small. It does not depend on the number of threads, so neither do the results.
WANTED_BACKWARD_TASKS = 8


class Launchable(Protocol):
    """A compiled kernel."""

    def launch(
        self, tensors: dict[str, Tensor], scalars: dict[str, Number], sizes: dict[str, int]
    ) -> None: ...


class Backend(Protocol):
    """What turns tile kernels into something that runs."""

    @property
    def name(self) -> str: ...

    def schedule(self, program: Attention) -> Schedule: ...

    def refuse(self, program: Attention, captures: Sequence[CaptureGradient]) -> None:
        """Raise a typed error for what this backend cannot do."""
        ...

    def source(self, kernel: Kernel, schedule: Schedule) -> str: ...

    def compile(self, kernel: Kernel, schedule: Schedule) -> Launchable: ...


@dataclass(eq=False)
class CompiledAttention:
    """The kernels of one program on one backend. Thread-safe: a race compiles twice and keeps one."""

    program: Attention
    backend: Backend
    schedule: Schedule
    _modules: dict[tuple[str, tuple[str, ...]], tuple[Module, list[Launchable]]] = field(default_factory=dict)

    def module(self, direction: str, learned: tuple[str, ...] = ()) -> Module:
        return lower(self.program, self.schedule, direction, learned)

    def supported(self, learned: tuple[str, ...]) -> tuple[str, ...]:
        """Those of the captured tensors whose gradients the backend can compute."""
        return tuple(n for n in learned if self._accepts(n))

    def _accepts(self, name: str) -> bool:
        try:
            self.backend.refuse(self.program, capture_gradients(self.program, (name,)))
        except GradientNotSupported:
            return False
        return True

    def kernels(self, direction: str, learned: tuple[str, ...] = ()) -> tuple[Module, list[Launchable]]:
        """Lowered and compiled kernels of a direction, from this object's cache."""
        found = self._modules.get((direction, learned))
        if found is None:
            self.backend.refuse(self.program, capture_gradients(self.program, learned))
            module = self.module(direction, learned)
            found = module, [self.backend.compile(k, self.schedule) for k in module.kernels]
            self._modules[direction, learned] = found
        return found

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, captured: Tensors, scalars: Scalars, out: Tensor
    ) -> list[Tensor]:
        """Fill `out` (B, H, Sq, Dv); returns the saved row values (B, H, Sq), in the rule's order."""
        module, (kernel,) = self.kernels("forward")
        sizes = sizes_of(q, k)
        saved = {saved_param(name): self._rows(q) for name, _ in self.program.rule.saved}
        tables = tile_tables(module.kernels[0].tables, captured, scalars, sizes, self._compute)
        tensors = {"Q": q, "K": k, "V": v, "O": out, **captured, **saved, **tables}
        kernel.launch(tensors, dict(scalars), sizes)
        return list(saved.values())

    def backward(
        self,
        d_out: Tensor,
        inputs: tuple[Tensor, Tensor, Tensor],
        out: Tensor,
        saved: Sequence[Tensor],
        captured: Tensors,
        scalars: Scalars,
        gradients: tuple[Tensor, Tensor, Tensor],
        learned: tuple[str, ...],
    ) -> dict[str, Tensor]:
        """Fill dq, dk, dv; returns the gradients of the tensors in `learned`, in their own shapes and dtypes."""
        q, k, v = inputs
        dq, dk, dv = gradients
        module, kernels = self.kernels("backward", learned)
        captures = capture_gradients(self.program, learned)
        sizes = sizes_of(q, k)
        numbers = dict(scalars)
        tensors: dict[str, Tensor] = {
            "Q": q,
            "K": k,
            "V": v,
            "O": out,
            "dO": d_out,
            "dK": dk,
            "dV": dv,
            **captured,
        }
        names = [saved_param(name) for name, _ in self.program.rule.saved]
        tensors.update(zip(names, saved, strict=True))
        tensors["Delta"] = self._rows(q)
        splits = 1
        if self.schedule.gradients is Gradients.ONE_KERNEL:
            splits = self._splits(k)
            numbers["splits"] = sizes["splits"] = splits
            tensors["dQ_parts"] = _zeros_like_parts(dq, splits, self._compute)
        else:
            tensors["dQ"] = dq
        tensors.update({c.buffer: self._buffer(c, q, k, captured, splits) for c in captures})
        for kernel, launchable in zip(module.kernels, kernels, strict=True):
            tensors.update(tile_tables(kernel.tables, captured, numbers, sizes, self._compute))
            launchable.launch({p.name: tensors[p.name] for p in kernel.params}, numbers, sizes)
        if "dQ_parts" in tensors:
            dq.copy_(tensors["dQ_parts"].sum(0).mul_(scalars["scale"]))
        numbers = {**numbers, **sizes}
        return {name: _captured_gradient(name, captures, tensors, numbers) for name in learned}

    @property
    def _compute(self) -> torch.dtype:
        return compute_dtype(self.program.element)

    def _rows(self, q: Tensor) -> Tensor:
        return torch.empty(q.shape[:3], dtype=self._compute, device=q.device)

    def _splits(self, k: Tensor) -> int:
        """Shares of the kv axis: from the shapes alone, so that the same call always adds in the same order."""
        tiles = -(-k.shape[2] // self.schedule.backward_kv)
        return max(1, min(tiles, WANTED_BACKWARD_TASKS // max(1, k.shape[0] * k.shape[1])))

    def _buffer(self, c: CaptureGradient, q: Tensor, k: Tensor, captured: Tensors, splits: int) -> Tensor:
        """Where the kernels put a captured gradient; zeros, because they add to it."""
        batches, heads, q_len, _ = q.shape
        parts = (splits,) if self.schedule.gradients is Gradients.ONE_KERNEL else ()
        shape = {
            Route.ROW: (*parts, batches, heads, q_len),
            Route.COLUMN: (batches, heads, k.shape[2]),
            Route.PAIR: tuple(captured[c.load.tensor].shape),
        }[c.route]
        return torch.zeros(shape, dtype=self._compute, device=q.device)


def _captured_gradient(
    name: str, captures: Sequence[CaptureGradient], tensors: Tensors, numbers: Scalars
) -> Tensor:
    """Everything that was collected for one captured tensor, summed in a fixed order, in its shape and dtype."""
    tensor = tensors[name]
    total = torch.zeros(tensor.shape, dtype=torch.float64, device=tensor.device)
    pairs: dict[str, Tensor] = {}
    for c in captures:
        if c.load.tensor != name:
            continue
        buffer = tensors[c.buffer]
        if c.route is Route.PAIR:
            pairs[c.buffer] = buffer  # several reads by pairs share one buffer: count it once
        else:
            scatter_sums(total, c, buffer.sum(0) if buffer.ndim == 4 else buffer, tensors, numbers)
    for buffer in pairs.values():
        total += buffer
    return total.to(tensor.dtype)


def sizes_of(q: Tensor, k: Tensor) -> dict[str, int]:
    return {
        "batches": q.shape[0],
        "heads": q.shape[1],
        "kv_heads": k.shape[1],
        "q_len": q.shape[2],
        "kv_len": k.shape[2],
    }


def _zeros_like_parts(dq: Tensor, splits: int, dtype: torch.dtype) -> Tensor:
    """(splits, B, H, Sq, D) zeros whose slices lie in memory in dq's order of dimensions."""
    order = sorted(range(4), key=lambda i: (-dq.stride(i), i))
    base = torch.zeros((splits, *(dq.shape[i] for i in order)), dtype=dtype, device=dq.device)
    back = [order.index(i) + 1 for i in range(4)]
    return base.permute(0, *back)

"""Errors of a compiled attention against the float64 reference, beside those of eager PyTorch in the same dtype."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from attn_engine.ir.passes.check_rule import MethodReport
from attn_engine.ir.program import Attention
from attn_engine.runtime.compiled import CompiledAttention

Inputs = tuple[Tensor, Tensor, Tensor]
Results = dict[str, Tensor]


class CheckFailed(AssertionError):
    """A compiled attention is less exact than it should be; the message is the report."""


@dataclass(frozen=True, slots=True)
class TensorReport:
    """One tensor: largest errors, absolute and relative to the largest element of the reference; and the limit."""

    name: str
    shape: tuple[int, ...]
    error: float
    relative: float
    eager_error: float
    limit: float

    @property
    def ok(self) -> bool:
        """Within the limit; NaN is not."""
        return self.error <= self.limit


@dataclass(frozen=True, slots=True)
class CheckReport:
    """The comparison of every output and gradient. `print(report)` is a table."""

    title: str
    tensors: tuple[TensorReport, ...]
    notes: tuple[str, ...] = ()
    methods: tuple[MethodReport, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether every tensor is within its limit, and the normaliser's methods agree with each other."""
        return all(t.ok for t in self.tensors) and all(m.ok for m in self.methods)

    def raise_if_failed(self) -> None:
        """Raise CheckFailed, with the table as its message, unless everything is within its limit."""
        if not self.ok:
            raise CheckFailed(str(self))

    def __str__(self) -> str:
        width = max(8, *(len(t.name) for t in self.tensors))
        lines = [
            self.title,
            f"{'tensor':<{width}}  {'max error':>10}  {'relative':>10}  {'eager':>10}  {'limit':>10}",
        ]
        lines += [
            f"{t.name:<{width}}  {t.error:>10.2e}  {t.relative:>10.2e}  {t.eager_error:>10.2e}  {t.limit:>10.2e}  "
            f"{'ok' if t.ok else 'WRONG'}"
            for t in self.tensors
        ]
        lines += [f"normaliser, {m}" for m in self.methods]
        lines += self.notes
        lines.append("errors against float64; eager: plain PyTorch in the same dtype")
        return "\n".join(lines)


class Ways(Protocol):
    """The two ways to compute a call, for any tensors of its kind: o (B, H, rows, D) and the row values."""

    def compiled(self, inputs: Inputs, captured: Mapping[str, Tensor]) -> tuple[Tensor, Results]: ...

    def dense(
        self, inputs: Inputs, captured: Mapping[str, Tensor], dtype: torch.dtype
    ) -> tuple[Tensor, Results]: ...


def compare(
    program: Attention,
    compiled: CompiledAttention,
    ways: Ways,
    inputs: Inputs,
    captured: Mapping[str, Tensor],
) -> CheckReport:
    """Output, row values and gradients of a call against its dense definition in float64, beside that in its own type.

    The gradients are those of sum(o * r) for a fixed random r, with respect to q, k, v and each floating tensor that
    score_mod reads, custom or captured. The caller's tensors and their .grad are left alone.
    """
    floating = tuple(c.name for c in program.differentiable_captures)
    learned, dtype = compiled.supported(floating), inputs[0].dtype

    def dense(dtype: torch.dtype) -> Run:
        return lambda inputs, captured: ways.dense(inputs, captured, dtype)

    q, k, v = (x.double() for x in inputs)
    exact = _results(dense(torch.float64), (q, k, v), _double(captured), learned, dtype)
    eager = _results(dense(dtype), inputs, captured, learned, dtype)
    found = _results(ways.compiled, inputs, captured, learned, dtype)
    return CheckReport(
        f"{program.name} on {compiled.backend.name}, {str(dtype).removeprefix('torch.')}",
        tuple(_report(name, found[name], eager[name], exact[name], dtype) for name in exact),
        tuple(f"no gradient on this backend: {name}" for name in floating if name not in learned),
    )


Run = Callable[[Inputs, Mapping[str, Tensor]], tuple[Tensor, Results]]


def _double(tensors: Mapping[str, Tensor]) -> Results:
    """Floating tensors in float64, so that their gradients are not rounded to their own dtype."""
    return {name: x.double() if x.is_floating_point() else x for name, x in tensors.items()}


def _results(
    run: Run, inputs: Inputs, tensors: Mapping[str, Tensor], learned: Sequence[str], dtype: torch.dtype
) -> Results:
    """Output, row values and gradients of one way to compute the attention; dtype: of the caller's inputs."""
    q, k, v = (x.detach().requires_grad_() for x in inputs)
    fresh = {name: x.detach().requires_grad_(name in learned) for name, x in tensors.items()}
    with torch.enable_grad():
        o, rows = run((q, k, v), fresh)
        # What the output is weighted with before its gradient is taken: the same every time.
        weight = torch.randn(o.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
        wanted = {"d q": q, "d k": k, "d v": v, **{f"d {name}": fresh[name] for name in learned}}
        gradients = torch.autograd.grad(
            o, list(wanted.values()), weight.to(o.device, o.dtype), allow_unused=True
        )
    results = {"o": o.detach(), **{name: x.detach() for name, x in rows.items()}}
    for (name, x), gradient in zip(wanted.items(), gradients, strict=True):
        results[name] = torch.zeros_like(x) if gradient is None else gradient
    return results


def _report(name: str, found: Tensor, eager: Tensor, exact: Tensor, computed: torch.dtype) -> TensorReport:
    finite = exact[torch.isfinite(exact)].abs()
    scale = finite.max().item() if finite.numel() else 0.0
    error, eager_error = _largest_error(found, exact), _largest_error(eager, exact)
    dtype = max(
        computed, found.dtype, key=lambda d: torch.finfo(d).eps
    )  # a float32 bias beside float64 q, say
    # Where eager PyTorch is itself in float64 or happens to be exact, rounding of our own kind must still pass.
    floor = 1e-10 * scale + 1e-12 if dtype is torch.float64 else _relative_floor(dtype) * scale + 1e-7
    limit = max(2 * eager_error, floor) if eager_error < float("inf") else floor
    return TensorReport(
        name, tuple(exact.shape), error, error / scale if scale else error, eager_error, limit
    )


def _relative_floor(dtype: torch.dtype) -> float:
    """Two roundings to the dtype, and some dozens in the float32 in which everything is summed."""
    return 2 * torch.finfo(dtype).eps + 64 * torch.finfo(torch.float32).eps


def _largest_error(found: Tensor, exact: Tensor) -> float:
    """Largest absolute difference; equal infinities agree. NaN if any NaN is on one side only."""
    if exact.numel() == 0:
        return 0.0
    found, exact = found.double(), exact.double()
    difference = torch.where(found == exact, 0.0, (found - exact).abs())
    return difference.max().item()

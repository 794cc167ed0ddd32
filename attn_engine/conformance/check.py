"""An entry of the table carried out: output and gradients against the definition in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attn_engine.conformance.entries import Entry
from attn_engine.conformance.gold import dense_attention
from attn_engine.conformance.subjects import Subject


class Wrong(AssertionError):
    """A subject's numbers are further from the definition than allowed."""


def inputs_of(entry: Entry, dtype: torch.dtype, seed: int) -> tuple[list[Tensor], dict[str, Tensor]]:
    """q, k, v and the captured tensors, without gradients."""
    generator = torch.Generator().manual_seed(seed)
    inputs = list(entry.shape.inputs(generator, dtype))
    if entry.name.startswith("keys of one batch"):
        inputs = [inputs[0], inputs[1][:1], inputs[2][:1]]
    tensors = entry.tensors(entry.shape, generator)
    precise = torch.float64 if dtype is torch.float64 else torch.float32
    return inputs, {n: t.to(precise) if t.is_floating_point() else t for n, t in tensors.items()}


def run_subject(
    subject: Subject, entry: Entry, inputs: list[Tensor], tensors: dict[str, Tensor], **options: Any
) -> Any:
    """One call of the subject, functions and block mask made anew."""
    q, k, v = (x if entry.view is None else entry.view(x) for x in inputs)
    score_mod = None if entry.score is None else entry.score(**tensors)
    block_mask = None
    if entry.mask is not None:
        detached = {n: t.detach() for n, t in tensors.items()}
        block_mask = subject.mask(
            entry.mask(**detached),
            entry.shape.batches if entry.mask_batches else None,
            entry.shape.heads if entry.mask_heads else None,
            entry.shape.q_len,
            entry.shape.kv_len,
            BLOCK_SIZE=entry.block_size,
        )
    return subject.attend(
        q,
        k,
        v,
        score_mod=score_mod,
        block_mask=block_mask,
        scale=entry.scale,
        enable_gqa=entry.shape.heads != entry.shape.kv_heads,
        **options,
    )


def run_gold(entry: Entry, inputs: list[Tensor], tensors: dict[str, Tensor]) -> Tensor:
    q, k, v = inputs
    score_mod = None if entry.score is None else entry.score(**tensors)
    detached = {n: t.detach() for n, t in tensors.items()}
    mask_mod = None if entry.mask is None else entry.mask(**detached)
    return dense_attention(q, k, v, score_mod, mask_mod, entry.scale)[0]


Run = Callable[[list[Tensor], dict[str, Tensor]], Tensor]


def results(
    run: Run,
    entry: Entry,
    inputs: list[Tensor],
    tensors: dict[str, Tensor],
    dtype: torch.dtype,
    backward: bool,
) -> dict[str, Tensor]:
    """o, and with `backward` dq, dk, dv and the gradients of the learned tensors, computed in `dtype`."""
    inputs = [x.to(dtype) for x in inputs]
    precise = torch.float64 if dtype is torch.float64 else torch.float32
    tensors = {n: t.to(precise) if t.is_floating_point() else t for n, t in tensors.items()}
    if not backward:
        return {"o": run(inputs, tensors).detach()}
    inputs = [x.requires_grad_(not entry.only_learned) for x in inputs]
    tensors = {n: t.clone().requires_grad_() if n in entry.learned else t for n, t in tensors.items()}
    leaves: dict[str, Tensor] = {}
    if not entry.only_learned:
        leaves.update(zip(("dq", "dk", "dv"), inputs, strict=True))
    leaves.update({f"d{n}": tensors[n] for n in entry.learned})
    o = run(inputs, tensors)
    weights = torch.randn(o.shape, generator=torch.Generator().manual_seed(7)).to(o.dtype)
    found = torch.autograd.grad(o, list(leaves.values()), weights)
    return {"o": o.detach(), **dict(zip(leaves, found, strict=True))}


def check(subject: Subject, entry: Entry, backward: bool = True, seed: int = 0) -> None:
    """Raise Wrong where a result is further from the definition than torch allows its own kernels to be.

    That is 1.1 times (float32: 10 times) the error of the definition computed in the inputs' precision, and no less
    than a few units in the last place. The gradients of learned tensors are sums over many pairs: 1.35 times by the
    root of the mean square.
    """
    dtype = entry.dtype
    inputs, tensors = inputs_of(entry, dtype, seed)

    def gold(i: list[Tensor], t: dict[str, Tensor]) -> Tensor:
        return run_gold(entry, i, t)

    want = results(gold, entry, inputs, tensors, torch.float64, backward)
    eager = results(gold, entry, inputs, tensors, dtype, backward)
    got = results(lambda i, t: run_subject(subject, entry, i, t), entry, inputs, tensors, dtype, backward)
    factor = 10 if dtype in (torch.float32, torch.float64) else 1.1
    for name, truth in want.items():
        _compare(name, got[name], eager[name], truth, dtype, factor)


def _compare(name: str, got: Tensor, eager: Tensor, want: Tensor, dtype: torch.dtype, factor: float) -> None:
    if got.shape != want.shape:
        raise Wrong(f"{name} has shape {tuple(got.shape)} instead of {tuple(want.shape)}")
    if not want.numel():
        return
    rms = name not in ("o", "dq", "dk", "dv")
    error, allowed = _distance(got, want, rms), _distance(eager, want, rms)
    largest = want.abs().max().item()
    floor = {torch.float64: 1e-12, torch.float32: 3e-6}.get(dtype, 4 * torch.finfo(dtype).eps) * max(
        largest, 1e-3
    )
    if not error <= max(allowed * (1.35 if rms and factor < 2 else factor), floor):
        raise Wrong(f"{name} is off by {error:.2e}; the definition in {dtype} by {allowed:.2e}")


def _distance(x: Tensor, want: Tensor, rms: bool) -> float:
    difference = x.double() - want
    return (difference.square().mean().sqrt() if rms else difference.abs().max()).item()

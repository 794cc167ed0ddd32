"""torch.func.vmap: a mapped dimension becomes part of the batch, and the functions see the batch within it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attn_engine.errors import TransformNotSupported

Function = Callable[..., Any]
Run = Callable[[Tensor, Tensor, Tensor, int], tuple[Tensor, ...]]


def is_mapped(*tensors: Tensor) -> bool:
    """Whether torch.func.vmap maps over one of the tensors."""
    return any(torch._C._functorch.is_batchedtensor(x) for x in tensors)  # pyright: ignore[reportAttributeAccessIssue]


def mapped(run: Run, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    """run(query, key, value, batches) on tensors with the mapped dimension folded into the batch.

    `batches` is the batch that score_mod and mask_mod count in; see `within_batch`.
    """
    return _Mapped.apply(run, query.shape[0], query, key, value)


def within_batch(fn: Function | None, batches: int, score: bool) -> Function | None:
    """A score_mod or mask_mod of `batches` batches, for a batch that repeats them."""
    if fn is None:
        return None
    if score:
        return lambda s, b, h, q_idx, kv_idx: fn(s, b % batches, h, q_idx, kv_idx)
    return lambda b, h, q_idx, kv_idx: fn(b % batches, h, q_idx, kv_idx)


class _Mapped(torch.autograd.Function):
    """Only its rule for vmap is used: functorch calls it with the tensors that are mapped over."""

    @staticmethod
    def forward(run: Run, batches: int, query: Tensor, key: Tensor, value: Tensor) -> Any:
        return run(query, key, value, batches)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Nothing is kept: gradients are recorded below the transform."""

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise TransformNotSupported(
            transform="torch.func.grad around this torch.func.vmap",
            instead="Use torch.autograd.grad or backward() on the result of vmap.",
        )

    @staticmethod
    def vmap(info: Any, in_dims: Any, run: Run, batches: int, *tensors: Tensor) -> Any:
        size = info.batch_size
        folded = [
            (x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)).flatten(0, 1)
            for x, dim in zip(tensors, in_dims[2:], strict=True)
        ]
        found = run(folded[0], folded[1], folded[2], batches)
        return tuple(x.unflatten(0, (size, batches)) for x in found), (0,) * len(found)

"""Memory order: outputs and gradients lie as the tensors that they belong to."""

from __future__ import annotations

from torch import Tensor


def empty_ordered_like(x: Tensor, dim: int | None = None) -> Tensor:
    """An uninitialised tensor whose dimensions follow each other in memory as those of x, without gaps.

    dim: the size of the last dimension; that of x when None. What is repeated without memory (a stride of 0) tells no
    order; then the result is contiguous.
    """
    shape = x.shape if dim is None else (*x.shape[:-1], dim)
    if x.is_contiguous() or 0 in x.stride():
        return x.new_empty(shape)
    order = sorted(range(x.ndim), key=lambda i: (-x.stride(i), i))
    back = sorted(range(x.ndim), key=order.__getitem__)
    return x.new_empty([shape[i] for i in order]).permute(back)

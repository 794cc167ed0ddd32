"""Memory order: outputs and gradients lie as the tensors that they belong to."""

from __future__ import annotations

from torch import Tensor


def logical_view(x: Tensor, layout: str) -> Tensor:
    """(batch, head, row, dimension) of a tensor that lies as `layout` says, "bshd" or "bhsd"; one without a batch is
    taken for a batch of 1."""
    if x.ndim == 3:
        x = x.unsqueeze(0)
    return x.transpose(1, 2) if layout == "bshd" else x


def of_logical(x: Tensor, layout: str, packed: bool) -> Tensor:
    """The other way; packed: the tensor has no batch."""
    x = x.transpose(1, 2) if layout == "bshd" else x
    return x.squeeze(0) if packed else x


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

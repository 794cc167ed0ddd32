"""Whether a call's values are the first columns of its keys, in one memory: kernels then load their tiles once."""

from __future__ import annotations

from torch import Tensor


def values_in_keys(k: Tensor, v: Tensor) -> bool:
    """Whether v is k[..., :dim_v]: the same place and strides, and as many or fewer columns. Any layout."""
    if v.data_ptr() != k.data_ptr() or v.stride() != k.stride():
        return False
    return v.shape[:-1] == k.shape[:-1] and v.shape[-1] <= k.shape[-1] and v.numel() > 0

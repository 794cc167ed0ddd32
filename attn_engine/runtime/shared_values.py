"""Whether a call's values are the first columns of its keys, in one memory: kernels then load their tiles once."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from attn_engine.codegen.lower.scaled import COLUMNS_OF_SCALE, SCALES


def values_in_keys(k: Tensor, v: Tensor, tensors: Mapping[str, Tensor]) -> bool:
    """Whether v is k[..., :dim_v], and its scales those of these columns, where a call has some, by the kernels' names.
    Any layout of k and v."""
    if not _is_prefix(k, v):
        return False
    of_keys, of_values = (tensors.get(name) for name in SCALES)
    if of_keys is None or of_values is None:
        return True
    enough = (of_keys.shape[3], -(-v.shape[3] // COLUMNS_OF_SCALE))
    return _is_prefix(of_keys, of_values) and of_values.shape[3] in enough


def _is_prefix(x: Tensor, first: Tensor) -> bool:
    """The same place and strides, and as many or fewer columns."""
    if first.data_ptr() != x.data_ptr() or first.stride() != x.stride():
        return False
    return first.shape[:-1] == x.shape[:-1] and first.shape[-1] <= x.shape[-1] and first.numel() > 0

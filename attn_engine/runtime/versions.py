"""Whether a tensor still holds what it held."""

from __future__ import annotations

from torch import Tensor


def version_of(x: Tensor) -> int | None:
    """torch's count of the in-place changes of a tensor; None where contents may change without being counted.

    Not counted: changes in inference mode, in memory that is not torch's own (a numpy array's) or that other processes
    share. Writing through `x.data` is not counted either, and nothing tells it: torch itself warns against it.
    """
    if x.is_inference() or (x.device.type == "cpu" and x.is_shared()):
        return None
    return x._version if x.untyped_storage().resizable() else None

"""Memory for large outputs in large pages: what is new to a process is given to it page by page, as it is written."""

from __future__ import annotations

import ctypes
import sys
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

LARGE = 4 << 20  # bytes. The allocator hands smaller tensors memory that it has had before.
PAGE = 2 << 20
_HUGE_PAGES = 14  # MADV_HUGEPAGE


def empty_like(x: Tensor) -> Tensor:
    """`torch.empty_like`, in large pages where it is large."""
    return in_large_pages(torch.empty_like(x))


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    """`torch.empty`, in large pages where it is large."""
    return in_large_pages(torch.empty(shape, dtype=dtype))


def in_large_pages(x: Tensor) -> Tensor:
    """The tensor, of which nothing is written yet. The kernel may keep small pages: it is a hint."""
    advise = _advise()
    if advise is None or x.nbytes < LARGE:
        return x
    begin = -(-x.data_ptr() // PAGE) * PAGE
    end = (x.data_ptr() + x.untyped_storage().nbytes()) // PAGE * PAGE
    if end > begin:
        advise(begin, end - begin, _HUGE_PAGES)
    return x


@lru_cache(maxsize=1)
def _advise() -> Any:
    """The system's madvise, None where it has none of Linux's."""
    if not sys.platform.startswith("linux"):
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function

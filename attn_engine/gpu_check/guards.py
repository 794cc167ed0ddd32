"""Guarded allocations: what a call allocates holds NaN at first, and lies between margins that must not change."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

MARGIN = 64 * 1024  # bytes on either side: more than a tile of rows
_MARK = 255  # in every byte: NaN in all floating types, -1 in all integers


class Guards:
    """The buffers around everything that was allocated so far."""

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []
        self._empty = torch.empty

    def place(self, x: Tensor, zeros: bool) -> Tensor:
        """A tensor like x within a buffer of its own."""
        if x.numel() == 0 or x.dtype is torch.bool or x.device.type == "meta":
            return x
        extent = 1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
        size = extent * x.element_size()
        buffer = self._empty(size + 2 * MARGIN, dtype=torch.uint8, device=x.device).fill_(_MARK)
        self._buffers.append(buffer)
        inside = buffer[MARGIN : MARGIN + size].view(x.dtype).as_strided(x.shape, x.stride())
        return inside.zero_() if zeros else inside

    def touched(self) -> int:
        """How many bytes of the margins were written to."""
        margins = [part for b in self._buffers for part in (b[:MARGIN], b[-MARGIN:])]
        return sum(int((part != _MARK).sum()) for part in margins)

    def __len__(self) -> int:
        return len(self._buffers)


@contextmanager
def guarded_allocations() -> Iterator[Guards]:
    """Everything that torch.empty, torch.zeros and their kin make inside lies between margins.

    For the whole process, also for autograd's threads: nothing else may allocate meanwhile that minds.
    """
    guards = Guards()

    def guarded(make: Callable[..., Any], zeros: bool) -> Callable[..., Any]:
        def made(*args: Any, **kwargs: Any) -> Any:
            x = make(*args, **kwargs)
            return guards.place(x, zeros) if type(x) is Tensor and kwargs.get("out") is None else x

        return made

    with ExitStack() as patches:
        for owner, name in (
            (torch, "empty"), (torch, "empty_strided"), (torch, "empty_like"), (torch, "zeros"),
            (torch.Tensor, "new_empty"), (torch.Tensor, "new_zeros"),
        ):  # fmt: skip
            original = getattr(owner, name)
            patches.enter_context(patch.object(owner, name, guarded(original, name.endswith("zeros"))))
        yield guards

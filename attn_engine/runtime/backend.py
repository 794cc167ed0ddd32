"""What the runtime asks of a backend, and of a kernel that it has compiled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor

from attn_engine.codegen.lower.capture import CaptureGradient
from attn_engine.codegen.schedule import Schedule
from attn_engine.ir.ops import Number
from attn_engine.ir.program import Attention
from attn_engine.ir.tile import Kernel

Tensors = Mapping[str, Tensor]
Scalars = Mapping[str, Number]


class Launchable(Protocol):
    """A compiled kernel. `tensors` has its arguments by name, and may have others."""

    def launch(self, tensors: Tensors, scalars: Scalars, sizes: Mapping[str, int]) -> None: ...


class Backend(Protocol):
    """What turns tile kernels into something that runs."""

    @property
    def name(self) -> str: ...

    def schedule(self, program: Attention) -> Schedule: ...

    def refuse(self, program: Attention, captures: Sequence[CaptureGradient]) -> None:
        """Raise a typed error for what this backend cannot do."""
        ...

    def source(self, kernel: Kernel, schedule: Schedule) -> str: ...

    def compile(self, kernel: Kernel, schedule: Schedule) -> Launchable: ...

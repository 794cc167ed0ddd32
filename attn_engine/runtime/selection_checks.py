"""What the forced candidates of a selection capture, checked as the score and the mask are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from attn_engine.ir.ops import Number
from attn_engine.ir.program import Captured, ScalarFn
from attn_engine.ir.selection import Selection
from attn_engine.runtime.bind import check_captured
from attn_engine.runtime.compiled import sizes_of_call
from attn_engine.runtime.sequences import sequences_of_call


@dataclass(frozen=True, slots=True)
class Forced:
    """forced_mod as a mask by itself."""

    mask: ScalarFn

    @property
    def functions(self) -> tuple[ScalarFn, ...]:
        return (self.mask,)

    @property
    def captures(self) -> tuple[Captured, ...]:
        return self.mask.captures


def check_forced(
    program: Selection,
    q: Tensor,
    k: Tensor,
    tensors: Mapping[str, Tensor],
    scalars: Mapping[str, Number],
) -> None:
    """Raise the typed errors of `bind.check_captured`; q and k are (B, H, rows, D), k maybe a cache in pages."""
    if program.forced is None or not (program.forced.captures or program.forced.scalars):
        return
    sizes = sizes_of_call(q, k, sequences_of_call(program.pairs, tensors))
    own = {c.name: tensors[c.name] for c in program.forced.captures}
    check_captured(Forced(program.forced), own, scalars, program.forced_sizes(sizes), q.device)

"""A mask_mod once it is traced and analysed, and what it reads at one moment.

Tracing is kept per function, the analysis per expression: a mask that reads other tensors or numbers at every step is
neither traced nor analysed again, and a lambda that is made anew is traced (well below a millisecond) but not analysed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from attn_engine.frontend import MaskMod, Trace, trace_plain_mask
from attn_engine.ir.expr import Expr, variables
from attn_engine.ir.ops import Number
from attn_engine.ir.passes.block_ranges import Formula, range_formula
from attn_engine.ir.passes.mask_tiles import TileClass, tile_truth
from attn_engine.ir.program import BATCH, HEAD, Captured, ScalarFn
from attn_engine.masks.mistakes import MaskOnOtherDevice
from attn_engine.runtime.bind import check_captured


@dataclass(frozen=True, slots=True)
class Analysis:
    """What is known of a mask before anything is read.

    may, must: the formulas of `classes` as ranges; None where they cannot be.
    """

    classes: TileClass
    may: Formula | None
    must: Formula | None


@lru_cache(maxsize=512)
def analysis_of(mask: Expr) -> Analysis:
    classes = tile_truth(mask)
    return Analysis(classes, range_formula(classes.may_hold), range_formula(classes.must_hold))


@dataclass(frozen=True, slots=True)
class Moment:
    """The captured tensors and numbers of a mask at one moment, for given sizes ("batches", "heads", "q_len", ...)."""

    tensors: Mapping[str, Tensor]
    scalars: Mapping[str, Number]
    sizes: Mapping[str, int]
    device: torch.device
    versions: tuple[int, ...] | None  # of the tensors; None where torch keeps none

    def same(self, other: Moment) -> bool:
        """Whether nothing that a mask reads has changed in between."""
        if self.versions is None or self.versions != other.versions:
            return False
        if self.scalars != other.scalars or self.sizes != other.sizes or self.device != other.device:
            return False
        pairs = zip(self.tensors.values(), other.tensors.values(), strict=True)
        return all(x is y and x.shape == y.shape for x, y in pairs)

    @property
    def compute(self) -> torch.dtype:
        """What floating values are computed in: float64 where a captured tensor is, as in torch."""
        double = any(x.dtype is torch.float64 for x in self.tensors.values())
        return torch.float64 if double else torch.float32


@dataclass(eq=False)
class MaskProgram:
    """A traced mask_mod. `mask`, `functions` and `captures` are what a checked program has."""

    trace: Trace

    def __post_init__(self) -> None:
        self.mask: ScalarFn = self.trace.fn
        self.functions: tuple[ScalarFn, ...] = (self.mask,)
        self.captures: tuple[Captured, ...] = self.mask.captures
        read = variables(self.mask.result)
        self.by_batch, self.by_head = BATCH in read, HEAD in read

    @property
    def analysis(self) -> Analysis:
        return analysis_of(self.mask.result)

    def stale(self) -> bool:
        return self.trace.opaque or self.trace.stale()

    def moment(self, batch: int, heads: int, q_len: int, kv_len: int, device: torch.device) -> Moment:
        """What the mask reads now. A mask that is the same for every batch (or head) is made for one."""
        tensors = {t.name: t.accessor() for t in self.trace.tensors}
        scalars = {s.var.name: s.accessor() for s in self.trace.scalars}
        sizes = {
            "batches": batch if self.by_batch else 1,
            "heads": heads if self.by_head else 1,
            "q_len": q_len,
            "kv_len": kv_len,
        }
        tracked = not any(x.is_inference() for x in tensors.values())
        versions = tuple(x._version for x in tensors.values()) if tracked else None
        return Moment(tensors, scalars, sizes, device, versions)

    def check(self, moment: Moment) -> None:
        """Raise a typed error for a tensor on another device, an index that leaves its tensor, too large a number."""
        for name, x in moment.tensors.items():
            if x.device != moment.device:
                raise MaskOnOtherDevice(name=name, got=x.device, expected=moment.device)
        check_captured(self, moment.tensors, moment.scalars, moment.sizes, moment.device)


_programs: WeakKeyDictionary[MaskMod, MaskProgram] = WeakKeyDictionary()


def mask_program(mask_mod: MaskMod) -> MaskProgram:
    """The program of a mask_mod, traced again only where the same function could give another one now."""
    try:
        found = _programs.get(mask_mod)
    except TypeError:  # neither hashable nor weakly referenced
        return MaskProgram(trace_plain_mask(mask_mod))
    if found is None or found.stale():
        found = _programs[mask_mod] = MaskProgram(trace_plain_mask(mask_mod))
    return found

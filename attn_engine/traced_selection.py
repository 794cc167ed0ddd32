"""From the functions of a selection to its program, and from the program back to what they capture at a call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from attn_engine.frontend import OnlineFunc, Trace, trace_mask_mod
from attn_engine.frontend.names import KernelNames
from attn_engine.frontend.trace import MaskMod
from attn_engine.ir.ops import Number, Storage
from attn_engine.ir.program import Sequences
from attn_engine.ir.selection import Overlap, Selection
from attn_engine.traced_program import Description, TracedProgram


class Importance(OnlineFunc):
    """The row rule of a selection: scores count as they are."""

    @staticmethod
    def online_fwd(scores: Any, online_rowscales: Any, b: Any, h: Any, q_idx: Any) -> Any:
        return scores, {}, 1.0

    @staticmethod
    def online_fwd_epilogue(o: Any, online_rowscales: Any, b: Any, h: Any, q_idx: Any) -> Any:
        return o, {}


@dataclass(frozen=True)
class SelectionDescription:
    """What the user wrote."""

    pairs: Description
    pool: Overlap | None
    forced_mod: MaskMod | None

    def trace(self, storages: Mapping[str, Storage]) -> TracedSelection:
        """Run the functions on symbols; `storages` says how the custom inputs lie."""
        names = KernelNames()
        pairs = self.pairs.trace(storages, names)
        forced = None
        if self.forced_mod is not None:
            forced = trace_mask_mod(self.forced_mod, self.pairs.custom_io, storages, names)
        program = Selection(pairs.program, self.pool, None if forced is None else forced.fn)
        return TracedSelection(program, pairs, forced)


@dataclass(eq=False)
class TracedSelection:
    """A program and where its captured values come from. machines: what runs it, by backend; the engine fills it."""

    program: Selection
    pairs: TracedProgram
    forced: Trace | None
    machines: dict[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self._variants: dict[Sequences, TracedSelection] = {}

    def with_sequences(self, sequences: Sequences) -> TracedSelection:
        """The same program where a call says where its sequences lie."""
        if sequences not in self._variants:
            program = self.program.with_sequences(sequences)
            self._variants[sequences] = replace(
                self, program=program, pairs=self.pairs.with_sequences(sequences), machines={}
            )
        return self._variants[sequences]

    def stale(self, storages: Mapping[str, Storage]) -> bool:
        """Whether tracing again could give another program."""
        forced = self.forced is not None and (self.forced.opaque or self.forced.stale())
        return forced or self.pairs.stale(storages)

    def tensors(self, custom: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The captured tensors of this moment, by kernel name."""
        found = self.pairs.tensors(custom)
        if self.forced is not None:
            found |= {t.name: t.accessor() for t in self.forced.tensors}
            found |= {name: custom[given] for name, given in self.forced.custom}
        return found

    def scalars(self) -> dict[str, Number]:
        """The captured numbers of this moment."""
        found = self.pairs.scalars()
        if self.forced is not None:
            found |= {s.var.name: s.accessor() for s in self.forced.scalars}
        return found

"""From the user's functions to a program, and from a program back to the tensors and numbers of one call.

Functions are traced once. A call re-reads what they capture; only a change that the program itself depends on (a
captured tensor of another dtype, a number that decided a Python branch or that an OnlineFunc read) traces them again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from attn_engine.errors import NotACustomIO, UnknownOption, WrongCustomIO
from attn_engine.frontend import (
    CustomIO,
    OnlineFunc,
    RuleTrace,
    Trace,
    given_methods,
    trace_combine,
    trace_mask_mod,
    trace_online,
    trace_score_mod,
)
from attn_engine.frontend.custom_io import LINEAR_DIMENSIONS
from attn_engine.frontend.names import KernelNames, type_name
from attn_engine.frontend.pooling import without_pooled
from attn_engine.frontend.trace import MaskMod, ScoreMod
from attn_engine.ir.ops import Number, Storage
from attn_engine.ir.passes.check_rule import MethodReport, check_methods
from attn_engine.ir.passes.pack_heads import Packing, pack_heads
from attn_engine.ir.passes.row_gradients import with_row_gradients
from attn_engine.ir.program import Attention, ListedBlocks, OnlineRule, Sequences
from attn_engine.runtime.call import Call
from attn_engine.runtime.storage import STORAGES

# A captured tensor: its name in the kernel, how to read it, or else which custom input it is.
TensorRead = tuple[str, Callable[[], Tensor] | None, str]


@dataclass(frozen=True)
class Description:
    """What the user wrote: everything that is needed to trace a program."""

    score_mod: ScoreMod | None
    mask_mod: MaskMod | None
    custom_io: CustomIO
    online_func: OnlineFunc
    dtype: torch.dtype
    dim_qk: int
    dim_v: int

    def __post_init__(self) -> None:
        given: object = self.custom_io
        if not isinstance(given, CustomIO):
            raise NotACustomIO(argument="custom_fwd_inputs", got=type_name(given), expected="a CustomIO")
        for name, shape in given.shapes.items():
            for size in LINEAR_DIMENSIONS:
                if size in shape:
                    reason = f"{size!r} is a dimension of a LinearAttentionEngine alone"
                    raise WrongCustomIO(name=name, shape=shape, reason=reason)

    def trace(self, storages: Mapping[str, Storage], names: KernelNames | None = None) -> TracedProgram:
        """Run the user's functions on symbols; `storages` says how the custom inputs lie."""
        names = names or KernelNames()  # one for all, so that no two captures or row values share a name
        score = mask = None
        if self.score_mod is not None:
            score = trace_score_mod(self.score_mod, self.custom_io, storages, names)
        if self.mask_mod is not None:
            mask = trace_mask_mod(self.mask_mod, self.custom_io, storages, names)
        online_func, pooled = without_pooled(self.online_func)
        rule = trace_online(online_func, names)
        row_rule = replace(with_row_gradients(rule.rule), pooled=pooled)
        for p in pooled:
            if any(name == p.name for name, _ in row_rule.saved):
                known = f'0, because the normaliser has a row value named "{p.name}" of its own'
                raise UnknownOption(option=p.kind, value=p.block, where="with_pooled", known=known)
        program = self.program(score, mask, row_rule)
        return TracedProgram(program, score, mask, rule, dict(storages))

    def check_methods(self, rule: OnlineRule) -> tuple[MethodReport, ...]:
        """The normaliser's methods against each other."""
        func, _ = without_pooled(self.online_func)
        return check_methods(rule, given_methods(func), trace_combine(func, rule))

    def program(self, score: Trace | None, mask: Trace | None, rule: OnlineRule) -> Attention:
        names = [t.fn.name for t in (score, mask) if t is not None and not t.fn.name.startswith("lambda")]
        return Attention(
            name="_".join([*names, rule.name]),
            score=score.fn if score else None,
            mask=mask.fn if mask else None,
            rule=rule,
            element=STORAGES[self.dtype],
            dim_qk=self.dim_qk,
            dim_v=self.dim_v,
        )


@dataclass(eq=False)
class TracedProgram:
    """A program and where its captured values come from.

    calls: the kernels that run it, by backend; the engine fills it. What each call needs is laid out once.
    """

    program: Attention
    score: Trace | None
    mask: Trace | None
    rule: RuleTrace
    storages: dict[str, Storage]
    calls: dict[str, tuple[Call, int]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.traces: tuple[Trace, ...] = tuple(t for t in (self.score, self.mask) if t is not None)
        self._variants: dict[ListedBlocks | Sequences | Storage, TracedProgram] = {}
        self._opaque = any(t.opaque for t in (*self.traces, self.rule))
        tensors: dict[str, TensorRead] = {}
        for trace in self.traces:
            tensors.update({t.name: (t.name, t.accessor, "") for t in trace.tensors})
            tensors.update({name: (name, None, given) for name, given in trace.custom})
        tensors.update({t.name: (t.name, t.accessor, "") for t in self.rule.tensors})
        scalars = {s.var.name: s.accessor for trace in (*self.traces, self.rule) for s in trace.scalars}
        self._tensor_reads = [tensors[c.name] for c in self.program.captures]
        self._scalar_reads = [(s.name, scalars[s.name]) for s in self.program.scalars]

    def with_lists(self, listed: ListedBlocks) -> TracedProgram:
        """The same program where a call brings lists of such blocks."""
        if listed not in self._variants:
            program = self.program
            if listed.group > 1:
                program = pack_heads(program, Packing.QUERIES, listed.group)
            self._variants[listed] = replace(self, program=replace(program, listed=listed), calls={})
        return self._variants[listed]

    def with_sequences(self, sequences: Sequences) -> TracedProgram:
        """The same program where a call says where its sequences lie."""
        if sequences not in self._variants:
            program = replace(self.program, sequences=sequences)
            self._variants[sequences] = replace(self, program=program, calls={})
        return self._variants[sequences]

    def with_cache(self, cache: Storage) -> TracedProgram:
        """The same program where a call brings keys and values that lie like this, and their scales."""
        if cache not in self._variants:
            self._variants[cache] = replace(self, program=replace(self.program, cache=cache), calls={})
        return self._variants[cache]

    def with_layout(self, listed: ListedBlocks | None, sequences: Sequences | None) -> TracedProgram:
        """The same program for what a call brings of the two."""
        traced = self if listed is None else self.with_lists(listed)
        return traced if sequences is None else traced.with_sequences(sequences)

    def stale(self, storages: Mapping[str, Storage]) -> bool:
        """Whether tracing again could give another program."""
        if self.storages != storages or self._opaque:
            return True
        return self.rule.stale() or any(t.stale() for t in self.traces)

    def tensors(self, custom: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The captured tensors of this moment, by kernel name, in the program's order."""
        return {
            name: read() if read is not None else custom[given] for name, read, given in self._tensor_reads
        }

    def scalars(self) -> dict[str, Number]:
        """The captured numbers of this moment, in the program's order."""
        return {name: read() for name, read in self._scalar_reads}

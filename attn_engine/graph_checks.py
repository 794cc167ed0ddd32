"""What torch's operators check before a kernel runs: the graph that calls them was made once and may be out of date."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from attn_engine.errors import AttnEngineError, StaleGraph
from attn_engine.ir.ops import Number
from attn_engine.runtime.bind import check_kind
from attn_engine.runtime.block_lists import tensor_names
from attn_engine.runtime.call_checks import CallChecks
from attn_engine.traced_program import Description, TracedProgram


@dataclass(frozen=True, eq=False)
class GraphChecks:
    """The checks of a program that a graph holds."""

    description: Description
    traced: TracedProgram
    checks: CallChecks

    @property
    def _checked_before(self) -> bool:
        """Calls that give blocks are in no graph: what they bring is checked before heads are laid side by side."""
        listed = self.traced.program.listed
        return listed is not None and listed.tested

    def shapes(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        """dtypes, devices and shapes of q, k and v."""
        if self._checked_before:
            return
        program = self.traced.program
        self.checks.check_shapes(q, k, v, program.sequences, program.cache is not None)

    def everything(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        captured: Sequence[Tensor],
        scalars: Mapping[str, Number],
    ) -> None:
        """All that a call outside of a graph checks; StaleGraph where the functions now mean another program."""
        if self._checked_before:
            return
        program = self.traced.program
        tensors = dict(zip(tensor_names(program), captured, strict=False))
        for described in program.captures:
            check_kind(described, tensors[described.name])
        self._check_fresh(tensors)
        given = {custom: tensors[name] for t in self.traced.traces for name, custom in t.custom}
        unread = [name for name in self.checks.custom_shapes if name not in given]
        given.update(zip(unread, captured[len(tensors) :], strict=False))
        numbers = {name: x for name, x in scalars.items() if name != "scale"}
        self.checks(program, q, k, v, given, tensors, numbers)

    def _check_fresh(self, tensors: Mapping[str, Tensor]) -> None:
        """Only a trace that cannot be watched is repeated: it may have found other tensors, too."""
        traced = self.traced
        if not traced.stale(traced.storages):
            return
        try:
            now = self.description.trace(traced.storages)
        except AttnEngineError as error:
            raise StaleGraph(
                what=f"the functions can no longer be traced ({type(error).__name__})"
            ) from error
        was = traced.program
        of_call = {"listed": was.listed, "sequences": was.sequences, "cache": was.cache}
        if replace(now.program, **of_call) != traced.program:
            raise StaleGraph(what="its functions now compute something else")
        for trace in (*now.traces, now.rule):
            for bound in trace.tensors:
                if trace.opaque and not _same_memory(bound.accessor(), tensors[bound.name]):
                    raise StaleGraph(what=f"{bound.name!r} is another tensor now")


def _same_memory(now: Tensor, given: Tensor) -> bool:
    return now.shape == given.shape and now.stride() == given.stride() and now.data_ptr() == given.data_ptr()

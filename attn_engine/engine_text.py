"""What an engine shows a person: kernel texts, schedules, explanations. Needs no device and no compiler."""

from __future__ import annotations

from typing import Any

from attn_engine.card import card
from attn_engine.codegen.schedule import Schedule
from attn_engine.codegen.targets import target_named
from attn_engine.explain import Circumstances, Explanation, Kernel, explain, sources
from attn_engine.ir.program import Attention
from attn_engine.runtime.backends import backend_for, backend_named
from attn_engine.runtime.call_checks import CallChecks
from attn_engine.runtime.compiled import CompiledAttention
from attn_engine.runtime.gpu_target import current_target
from attn_engine.runtime.schedule_choice import GPUS
from attn_engine.schedules import Schedules
from attn_engine.traced_program import Description, TracedProgram


class EngineText:
    """The part of AttentionEngine that runs nothing."""

    layout: str
    backend: str
    scale: float
    _schedules: Schedules
    _checks: CallChecks
    _description: Description

    @property
    def program(self) -> Attention:
        raise NotImplementedError

    @property
    def _shown(self) -> TracedProgram:
        raise NotImplementedError

    def _compiled(self, traced: TracedProgram, name: str, target: str | None = None) -> CompiledAttention:
        raise NotImplementedError

    def source(
        self,
        backend: str | None = None,
        kernel: Kernel = "forward",
        target: str | None = None,
    ) -> str:
        """The text of a generated kernel: "forward", "decode" (the forward pass of one query over split keys, and the
        merge), "delta" (the backward's row sums) or "backward" (all the rest).

        backend: "cpu", "triton", ...; None: the engine's own. target: the GPU that tiles are chosen for, "sm_80",
        "sm_90", "sm_100" or "gfx942"; None: the one at hand, else "sm_90". The backward text includes the gradients of
        every captured tensor that can have one and that the backend can compute.
        """
        name = backend_for(self.backend) if backend is None else backend
        return "\n\n".join(sources(self._compiled(self._shown, name, target), kernel))

    def graph(self) -> Any:
        """The program's dataflow as a networkx.DiGraph; see `attn_engine.runtime.graph` for its attributes."""
        from attn_engine.runtime.graph import program_graph

        return program_graph(self.program)

    def explain(self, target: str | None = None, backend: str | None = None, **sizes: int) -> Explanation:
        """What was traced, what the mask plan is and why, what is saved for the backward pass, the tiles, the work and
        what bounds its speed. Print it.

        target: as for `source`. sizes: "batches", "heads", "kv_heads", "q_len", "kv_len" that the work is counted for,
        where the meta_tensors do not say.
        """
        name = backend_for(self.backend) if backend is None else backend
        compiled = self._compiled(self._shown, name, target)
        origin = self._schedules.choose(compiled.program, backend_named(name), target).origin
        gpu = None if name not in GPUS else current_target() if target is None else target_named(target)
        known, numbers = self._checks.expected.sizes, {"scale": self.scale, **self._shown.scalars()}
        about = Circumstances(origin, known, sizes, numbers, gpu)
        return explain(compiled.program, self.scale, compiled, about)

    @property
    def schedule(self) -> Schedule:
        """Tiles and launch options of this engine's kernels."""
        return self._schedules.choose(self.program, backend_named(backend_for(self.backend))).schedule

    def __repr__(self) -> str:
        p = self.program
        return (
            f"AttentionEngine({p.name}, {p.element.value}, D={p.dim_qk}, Dv={p.dim_v}, layout={self.layout!r}, "
            f"backend={self.backend!r})"
        )

    def _repr_html_(self) -> str:
        return card(repr(self), self.program, self._description.mask_mod, self._checks.expected.sizes)

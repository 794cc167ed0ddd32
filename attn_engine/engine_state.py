"""What an engine holds between calls: its description, traced program, checks, schedules and compiled kernels."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from attn_engine.codegen.schedule import Schedule
from attn_engine.dump import dump_stages
from attn_engine.engine_text import EngineText
from attn_engine.frontend import CustomIO, MetaTensor, OnlineFunc
from attn_engine.graph_checks import GraphChecks
from attn_engine.ir.ops import Storage
from attn_engine.ir.program import Attention
from attn_engine.listed_calls import blocks_of
from attn_engine.masks.lists import BlockLists
from attn_engine.options import (
    block_lists,
    check_options,
    checked_rule,
    checked_scale,
    fixed_sizes,
    three_metas,
)
from attn_engine.runtime.backends import DEVICES, backend_for, backend_named
from attn_engine.runtime.bind import Expected
from attn_engine.runtime.call import Call, register
from attn_engine.runtime.call_checks import CallChecks
from attn_engine.runtime.compiled import CompiledAttention
from attn_engine.schedules import Schedules
from attn_engine.traced_program import Description, TracedProgram
from attn_engine.tracing import Tracing


class EngineState(EngineText, Tracing[TracedProgram]):
    """The part of AttentionEngine that stays from call to call."""

    def _set_up(
        self,
        qkv_meta: Sequence[MetaTensor],
        score_mod: Callable[..., Any] | None,
        custom_fwd_inputs: CustomIO | None,
        online_func: OnlineFunc | None,
        mask_mod: Callable[..., Any] | None,
        layout: str,
        backend: str,
        scale: float | None,
        block_mask: Any,
        schedules: tuple[Schedule | None, bool, float],
        unknown: dict[str, Any] | None = None,
    ) -> None:
        """Everything but the first trace."""
        from attn_engine.library.dense.softmax import OnlineSoftmax  # the library is made of engines

        check_options(layout, unknown or {})
        mask_mod = getattr(block_mask, "mask_mod", None) if mask_mod is None else mask_mod
        self._block_mask = block_mask
        q, k, v = three_metas(qkv_meta)
        self.layout, self.backend = layout, backend
        self.custom_io = CustomIO() if custom_fwd_inputs is None else custom_fwd_inputs
        self.scale = checked_scale(scale, 1.0 if score_mod is not None else 1.0 / math.sqrt(q.dim))
        self._description = Description(
            score_mod=score_mod,
            mask_mod=mask_mod,
            custom_io=self.custom_io,
            online_func=checked_rule(OnlineSoftmax() if online_func is None else online_func),
            dtype=q.dtype,
            dim_qk=q.dim,
            dim_v=v.dim,
        )
        self._lists_of(None)
        if backend != "auto":
            backend_named(backend)
        self._schedules = Schedules(*schedules, backend)
        sizes = tuple(fixed_sizes(m) for m in (q, k, v))
        expected = Expected(layout, q.dtype, (q.dim, k.dim, v.dim), sizes)
        self._checks = CallChecks(expected, self.custom_io.shapes, backend, DEVICES.get(backend))
        self._first_error = self._traced = None
        self._calls: dict[tuple[object, str], tuple[Call, int]] = {}
        self._retired: list[tuple[Call, int]] = []

    @property
    def program(self) -> Attention:
        """The traced program; before the first call custom inputs are taken for float32."""
        return self._shown.program

    @property
    def _shown(self) -> TracedProgram:
        """The program, with the blocks of the engine's own lists."""
        lists = self._lists_of(None)
        return self._present if lists is None else self._present.with_lists(blocks_of(lists))

    # -- programs and kernels

    def _trace(self, storages: dict[str, Storage]) -> TracedProgram:
        return self._description.trace(storages)

    def _lists_of(self, block_mask: Any) -> BlockLists | None:
        """Those of this moment: of the call's mask, else of the engine's own."""
        block_mask = self._block_mask if block_mask is None else block_mask
        return block_lists(block_mask, self._description.mask_mod is not None)

    def _forget_calls(self, traced: TracedProgram, name: str) -> None:
        """Make kernels anew at the next call; those of a call that has begun stay for its gradients."""
        self._retired += [found for found in (self._calls.pop((traced.program, name), None),) if found]
        traced.calls.pop(name, None)

    def _call(self, traced: TracedProgram, device: str) -> tuple[Call, int]:
        name = backend_for(self.backend, device)
        found = traced.calls.get(name)
        if found is None:
            found = traced.calls[name] = self._call_of(traced, name)
        return found

    def _call_of(self, traced: TracedProgram, name: str) -> tuple[Call, int]:
        found = self._calls.get((traced.program, name))
        if found is None:
            checks = GraphChecks(self._description, traced, self._checks)
            call = Call(self._compiled(traced, name), self.layout, checks)
            found = self._calls[traced.program, name] = call, register(call)
            dump_stages(call.compiled, self.scale)
        return found

    def _compiled(self, traced: TracedProgram, name: str, target: str | None = None) -> CompiledAttention:
        backend = backend_named(name)
        chosen = self._schedules.choose(traced.program, backend, target)
        return CompiledAttention(traced.program, backend, chosen.schedule)

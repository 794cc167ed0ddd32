"""AttentionEngine: the one place where the front end, the compiler and the runtime meet."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal, overload

import torch
from torch import Tensor

from attn_engine.block_calls import BlocksOfCall, attend, blocks_given
from attn_engine.codegen.schedule import Schedule
from attn_engine.engine_state import EngineState
from attn_engine.frontend import CustomIO, MetaTensor, OnlineFunc
from attn_engine.graph_calls import in_graph, numbered
from attn_engine.ir.ops import Number
from attn_engine.runtime.bind import custom_by_name
from attn_engine.runtime.call_checks import refuse_transforms
from attn_engine.runtime.launch_plan import CallKind
from attn_engine.runtime.operator import apply
from attn_engine.runtime.reference import reference
from attn_engine.runtime.scaled import CACHE, scales_given
from attn_engine.runtime.strides import logical_view, of_logical
from attn_engine.schedules import TUNE_SECONDS, tune_for_call
from attn_engine.sequence_calls import of_call, sequence_places
from attn_engine.token_calls import over_tokens
from attn_engine.traced_program import TracedProgram


class AttentionEngine(EngineState):
    """A compiled attention: softmax(mask(score_mod(q k^T * scale))) v, with any of its parts replaced by yours.

    qkv_meta: three `meta_tensor`s for q (B, H, S, D), k (B, Hkv, Skv, D) and v (B, Hkv, Skv, Dv), always in this
        order. H is a multiple of Hkv. D, Dv and the dtype (float32, bfloat16, float16, float64) are compiled in;
        sizes that are None or names may change from call to call without compiling anything again.
    score_mod: (score, b, h, q_idx, kv_idx) or (score, custom_fwd_inputs, b, h, q_idx, kv_idx) -> score.
    custom_fwd_inputs: `CustomIO`, the names and shapes of tensors passed to each call after v.
    online_func: an `OnlineFunc`, the normaliser; softmax when None.
    mask_mod: (b, h, q_idx, kv_idx) or (b, h, q_idx, kv_idx, custom_fwd_inputs) -> bool; True keeps the pair. It acts
        after score_mod; a row that keeps nothing gives 0.
    layout: how tensors lie, "bshd" (batch, length, heads, dim) or "bhsd"; strides are free.
    backend: "auto" (by the tensors' device), "cpu", "torch", "triton", "triton-interpreter", "tilelang",
        "tilelang-cpu", or "reference" (dense, float64, O(S^2) memory: the definition).
    block_mask: the blocks that are visible at all, made ahead of the calls: `BlockLists`, or what gives some by
        `.lists()`. mask_mod (its own, where none is given) is asked in partial blocks alone. A call may bring another.
    schedule: tiles and launch options, such as `replace(engine.schedule, block_kv=32)`, which run so or are refused;
        None: tuned ones where they were stored, else the target's default.
    tune: measure schedules on the tensors of the first call, for up to tune_seconds per direction, and store the best
        for later engines of the same program. Not while torch.compile traces.
    scale: multiplies q k^T before score_mod. None: 1 where a score_mod is given (it scales itself), else 1/sqrt(D).

    Functions may use plain Python and torch operators; numbers and tensors they capture are read at every call, and
    floating tensors that require it get gradients.

    Raises the typed errors of `attn_engine.errors` for wrong arguments, here and in calls.
    """

    def __init__(
        self,
        qkv_meta: Sequence[MetaTensor],
        score_mod: Callable[..., Any] | None = None,
        custom_fwd_inputs: CustomIO | None = None,
        online_func: OnlineFunc | None = None,
        mask_mod: Callable[..., Any] | None = None,
        *,
        layout: str = "bshd",
        backend: str = "auto",
        scale: float | None = None,
        block_mask: Any = None,
        schedule: Schedule | None = None,
        tune: bool = False,
        tune_seconds: float = TUNE_SECONDS,
        **unknown: Any,
    ) -> None:
        self._arguments = {
            "qkv_meta": qkv_meta,
            "score_mod": score_mod,
            "custom_fwd_inputs": custom_fwd_inputs,
            "online_func": online_func,
            "mask_mod": mask_mod,
            "layout": layout,
            "backend": backend,
            "scale": scale,
            "block_mask": block_mask,
            "schedules": (schedule, tune, tune_seconds),
        }
        self._set_up(**self._arguments, unknown=unknown)
        self._number = numbered(self)
        self._traced = self._first_trace()

    # -- calls

    @overload
    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *custom_inputs: Tensor,
        return_final_rowscales: Literal[False] = False,
        block_mask: Any = None,
        **named: Tensor,
    ) -> Tensor: ...
    @overload
    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *custom_inputs: Tensor,
        return_final_rowscales: Literal[True],
        block_mask: Any = None,
        **named: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor]]: ...

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *custom_inputs: Tensor,
        return_final_rowscales: bool = False,
        block_mask: Any = None,
        **named: Tensor,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """o, of q's shape with v's head dimension; with return_final_rowscales also {"lse": (B, H, Sq), ...}.

        custom_inputs: the tensors of custom_fwd_inputs in its order, or by name. Row values are float32 (float64 for
        float64 inputs), lse is a natural logarithm and -inf in a row that sees no key. A loss may use them where they
        require a gradient: lse does, a row maximum does not.
        cu_len_q, cu_len_kv (packed), or start_q, len_q, start_kv, len_kv (in a batch): sequences of their own lengths,
        as docs/packed.md says; block_table, k_scale and v_scale: keys in a cache, docs/serving.md.
        block_sparse_mask, or block_sparse_indices (with block_num), and block_size: the blocks of keys that blocks of
        queries, or query tokens, may see, as docs/sparse.md says.
        token_indices or token_slots, and token_counts: the keys that each query sees, as docs/dsa.md says.
        """
        found = over_tokens(self, (q, k, v), custom_inputs, named, block_mask) if named else None
        if found is not None:
            return found if return_final_rowscales else found[0]
        if self.backend == "reference":
            o, saved = self._dense(q, k, v, custom_inputs, named, torch.float64, block_mask)
            return (o.to(q.dtype), saved) if return_final_rowscales else o.to(q.dtype)
        given = blocks_given(self, named, block_mask) if named else None
        if given is not None:
            o, rows = attend(self, given, (q, k, v), custom_inputs, named, return_final_rowscales)
        elif torch.compiler.is_compiling():
            o, *rows = in_graph(self, self._number, q, k, v, custom_inputs, named, block_mask)
        else:
            refuse_transforms((q, k, v, *custom_inputs, *named.values()))
            traced, captured, numbers, kind = self._bind(q, k, v, custom_inputs, named, block_mask)
            refuse_transforms(captured.values())
            if self._schedules.tuning:
                tune_for_call(self, traced, (q, k, v), captured, numbers)
            call, key = self._call(traced, q.device.type)
            o, rows = apply(call, key, q, k, v, captured, numbers, kind, return_final_rowscales)
        if return_final_rowscales:
            return o, dict(zip(self.program.rule.row_outputs, rows, strict=True))
        return o

    def reference(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *custom_inputs: Tensor,
        dtype: torch.dtype = torch.float64,
        return_final_rowscales: bool = False,
        block_mask: Any = None,
        **named: Tensor,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """The same attention evaluated densely in `dtype`: the definition; O(S^2) in memory, differentiable."""
        found = over_tokens(self, (q, k, v), custom_inputs, named, block_mask, dtype) if named else None
        o, rows = found or self._dense(q, k, v, custom_inputs, named, dtype, block_mask)
        return (o, rows) if return_final_rowscales else o

    def _dense(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        custom_inputs: Sequence[Tensor],
        named: dict[str, Tensor],
        dtype: torch.dtype,
        block_mask: Any,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """o and the row values, evaluated densely."""
        given = blocks_given(self, named, block_mask) if named else None
        traced, captured, numbers, _ = self._bind(q, k, v, custom_inputs, named, block_mask)
        views = self._logical(q), self._logical(k), self._logical(v)
        blocks = None if given is None else BlocksOfCall(self, given)
        visible = None if blocks is None else blocks.visible(traced.program, captured, *views[:2])
        o, rows = reference(traced.program, *views, captured, numbers, dtype, visible)
        return of_logical(o, self.layout, q.ndim == 3), rows

    def check(self, q: Tensor, k: Tensor, v: Tensor, *custom_inputs: Tensor, **named: Tensor) -> Any:
        """Run output and gradients against the float64 reference; print the report to read it.

        Gradients are those of a random weighting of the output, for q, k, v and every floating captured tensor. The
        methods of an OnlineFunc are compared with each other: forward, backward and combine with what follows from
        online_fwd, and that with itself in smaller tiles.
        """
        from attn_engine.checked_calls import check_call

        report = check_call(self, (q, k, v), custom_inputs, named)
        return replace(report, methods=self._description.check_methods(self.program.rule))

    # -- copies

    def __deepcopy__(self, memo: dict[int, Any]) -> AttentionEngine:
        """A fresh engine of a copied description.

        Modules and other objects whose methods were given are copied too, and in a copied module the copy's engine
        follows the copied parameters. Plain functions are not copied by Python: what they capture stays shared.
        """
        built = AttentionEngine.__new__(AttentionEngine)
        memo[id(self)] = built
        built._arguments = copy.deepcopy(self._arguments, memo)
        built._set_up(**built._arguments)  # not traced yet: the module around it may be half copied
        built._number = numbered(built)
        return built

    def __reduce__(self) -> Any:
        """Pickled by its description, where the functions can be; kernels are made anew from the cache."""
        return _remade, (dict(self._arguments),)

    # -- from a call to its kernels

    def _bind(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        custom_inputs: Sequence[Tensor],
        named: dict[str, Tensor],
        block_mask: Any = None,
    ) -> tuple[TracedProgram, dict[str, Tensor], dict[str, Number], CallKind | None]:
        """The program of this call, its captured tensors and lists, its numbers ("scale" first), all checked; and what
        is remembered of such calls."""
        places = sequence_places(named, self._checks.custom_shapes) if named else None
        scales = scales_given(named, self._checks.custom_shapes, k, v, self.layout) if named else None
        custom = custom_by_name(self._checks.custom_shapes, custom_inputs, named)
        traced = self._current(self._storages(custom))
        tensors, numbers = traced.tensors(custom), traced.scalars()
        lists = self._lists_of(block_mask)
        if lists is not None or places is not None:
            sequences = places and places.sequences(k, self.layout)
            self._checks.check_shapes(q, k, v, sequences, scales is not None)
            found = of_call(lists, places, self._logical(q), self._logical(k))
            traced, tensors = traced.with_layout(found.blocks, found.sequences), tensors | found.tensors
        if scales is not None:
            traced, tensors = traced.with_cache(CACHE), tensors | scales
        kind = self._checks(traced.program, q, k, v, custom, tensors, numbers)
        return traced, tensors, {"scale": self.scale, **numbers}, None if places else kind

    def _logical(self, x: Tensor) -> Tensor:
        return logical_view(x, self.layout)


def _remade(arguments: dict[str, Any]) -> AttentionEngine:
    schedule, tune, tune_seconds = arguments.pop("schedules")
    return AttentionEngine(**arguments, schedule=schedule, tune=tune, tune_seconds=tune_seconds)

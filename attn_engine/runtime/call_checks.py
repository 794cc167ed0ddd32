"""The checks of one engine's calls, made once for each kind of call, in graphs of torch.compile and outside."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from attn_engine.codegen.lower.paged import BLOCK_TABLE
from attn_engine.errors import BackendDeviceMismatch, TransformNotSupported
from attn_engine.ir.expr import Const, loads
from attn_engine.ir.ops import Number
from attn_engine.ir.program import Attention, Sequences
from attn_engine.runtime.bind import (
    Expected,
    call_signature,
    check_captured,
    check_custom_input,
    check_inputs,
    shape_signature,
)
from attn_engine.runtime.block_lists import check_lists
from attn_engine.runtime.captured_indices import POSITIONS
from attn_engine.runtime.compiled import sizes_of
from attn_engine.runtime.gpu_device import check_gpu, check_strides, missing_gpu
from attn_engine.runtime.launch_plan import CallKind
from attn_engine.runtime.paged_checks import check_caches, check_table
from attn_engine.runtime.scaled import check_scales, like_queries, refuse_bare
from attn_engine.runtime.sequence_checks import check_sequences
from attn_engine.runtime.sequences import sequences_of_call
from attn_engine.runtime.shared_values import values_in_keys
from attn_engine.runtime.strides import logical_view

MOST_REMEMBERED = 1024


@dataclass(frozen=True, slots=True)
class Passed:
    """What is known of a program's calls: those that were checked, and the tensors to look into.

    signatures: all that the checks depend on; kinds: the same without captured numbers.
    """

    program: Attention
    contents: frozenset[str]
    signatures: dict[object, CallKind] = field(default_factory=dict[object, CallKind])
    kinds: dict[object, CallKind] = field(default_factory=dict[object, CallKind])

    def kind_of(
        self, q: Tensor, k: Tensor, v: Tensor, custom: Mapping[str, Tensor], tensors: Mapping[str, Tensor]
    ) -> tuple[object, ...]:
        """What the checks and the plan of a call depend on, but for captured numbers."""
        of_k, of_v = shape_signature(k), shape_signature(v)
        kind: tuple[object, ...] = (shape_signature(q), of_k, of_v)
        if len(of_k) > 1 and of_k[1:] == of_v[1:] and values_in_keys(k, v, tensors):
            kind += ("values in keys",)  # a plan's kernels read one memory
        for name, x in custom.items():
            kind += (name, *call_signature(x, name in self.contents))
        for name, x in tensors.items():
            kind += (name, *call_signature(x, name in self.contents))
        return kind


@dataclass(eq=False)
class CallChecks:
    """What q, k, v and the custom inputs of an engine must be.

    custom_shapes: the declared shapes. device: the only type of device that the backend runs on; None: any.
    """

    expected: Expected
    custom_shapes: Mapping[str, Sequence[str | int]]
    backend: str
    device: str | None
    _passed: dict[Attention, Passed] = field(default_factory=dict[Attention, Passed])
    _latest: Passed | None = None
    _known_shapes: tuple[object, ...] = ()  # of the latest q, k and v that were found right

    def __call__(
        self,
        program: Attention,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        custom: Mapping[str, Tensor],
        tensors: Mapping[str, Tensor],
        numbers: Mapping[str, Number],
    ) -> CallKind:
        """Raise a typed error for the first thing that is wrong; `custom` may lack inputs that nothing reads."""
        passed = self._latest
        if passed is None or passed.program is not program:
            passed = self._latest = self._passed_of(program)
        kind = passed.kind_of(q, k, v, custom, tensors)
        signature = (kind, *numbers.values()) if numbers else kind
        found = passed.signatures.get(signature)
        if found is not None:
            return found
        self.check_shapes(q, k, v, program.sequences, program.cache is not None)
        layout = self.expected.layout
        if program.cache is not None:
            check_scales(k, v, tensors, layout)
        of_tensors = sizes = sizes_of(logical_view(q, layout), logical_view(k, layout))
        if (tables := sequences_of_call(program, tensors)) is not None and program.sequences is not None:
            if page := program.sequences.page:
                table = tensors[BLOCK_TABLE]
                check_table(table, tables.lengths["kv"], page, k.shape[0])
                of_tensors = {**of_tensors, "kv_len": table.shape[1] * page}
            check_sequences(program.sequences, tables, of_tensors)
            sizes = tables.sizes(of_tensors)
        declared = {**sizes, "q_len": of_tensors["q_len"], "kv_len": of_tensors["kv_len"]}
        for name, x in custom.items():
            check_custom_input(name, x, self.custom_shapes[name], declared)
        captured = {c.name: tensors[c.name] for c in program.captures}
        check_captured(program, captured, numbers, sizes, q.device)
        if program.listed is not None and not program.listed.tested:  # those are made by block_calls.py
            check_lists(program.listed, tensors, sizes, q.device, program.sequences is not None)
        if len(passed.signatures) >= MOST_REMEMBERED:
            passed.signatures.clear()
            passed.kinds.clear()
        found = passed.signatures[signature] = passed.kinds.setdefault(kind, CallKind())
        return found

    def check_shapes(
        self, q: Tensor, k: Tensor, v: Tensor, sequences: Sequences | None = None, scaled: bool = False
    ) -> None:
        """The part that needs no contents: dtypes, devices and shapes of q, k and v; scaled: these have scales."""
        known = (shape_signature(q), shape_signature(k), shape_signature(v), sequences, scaled)
        if known == self._known_shapes:
            return
        self._check_shapes(q, k, v, sequences, scaled)
        self._known_shapes = known

    def _check_shapes(
        self, q: Tensor, k: Tensor, v: Tensor, sequences: Sequences | None, scaled: bool
    ) -> None:
        if scaled:
            k, v = like_queries(q, k, v)
        else:
            refuse_bare(k, v)
        packed = sequences is not None and sequences.packed
        check = check_caches if sequences is not None and sequences.page else check_inputs
        check(q, k, v, self.expected, packed)
        if self.device is not None and q.device.type != self.device:
            instead = 'Move the tensors, or use backend="auto".'
            missing = missing_gpu(self.backend) if self.device == "cuda" else None
            raise missing or BackendDeviceMismatch(backend=self.backend, device=q.device, instead=instead)
        if q.device.type == "cuda":
            check_gpu(q.device)
            for name, x in (("q", q), ("k", k), ("v", v)):
                check_strides(name, logical_view(x, self.expected.layout))

    def _passed_of(self, program: Attention) -> Passed:
        """The memory that equal programs share."""
        found = self._passed.get(program)
        if found is None:
            return self._passed.setdefault(program, Passed(program, content_tensors(program)))
        return replace(found, program=program)


def content_tensors(program: Attention) -> frozenset[str]:
    """Captured tensors whose contents decide which indices are reached: the mask's, where an index is computed."""
    computed = any(
        index not in POSITIONS and not isinstance(index, Const)
        for fn in program.functions
        for load in loads(fn.result)
        for index in load.indices
    )
    return frozenset(c.name for c in program.mask.captures) if computed and program.mask else frozenset()


def refuse_transforms(tensors: Iterable[object]) -> None:
    """Raise TransformNotSupported under torch.func's transforms and forward-mode differentiation."""
    dual = torch.autograd.forward_ad._current_level >= 0
    for x in tensors:
        if not isinstance(x, Tensor):
            continue
        if torch._C._functorch.is_functorch_wrapped_tensor(x):  # pyright: ignore[reportAttributeAccessIssue]
            raise TransformNotSupported(
                transform="the transforms of torch.func (vmap, grad, jvp, ...)",
                instead="Make a mapped dimension part of the batch and take gradients with torch.autograd.grad or "
                "backward(); for the rest use engine.reference, which is plain torch.",
            )
        if dual and torch.autograd.forward_ad.unpack_dual(x).tangent is not None:
            raise TransformNotSupported(
                transform="forward-mode differentiation",
                instead="Use reverse mode, or engine.reference, which is plain torch.",
            )

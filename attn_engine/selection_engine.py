"""SelectionEngine: the keys, or blocks of keys, that count most for each query."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from attn_engine.errors import (
    UnknownLayout,
    UnknownOption,
    WrongArgument,
    WrongMeta,
)
from attn_engine.frontend import CustomIO, MetaTensor
from attn_engine.ir.ops import Number, Storage
from attn_engine.ir.selection import Overlap, Selection
from attn_engine.options import checked_scale, fixed_sizes, three_metas
from attn_engine.runtime.backends import DEVICES
from attn_engine.runtime.bind import LAYOUTS, Expected, custom_by_name
from attn_engine.runtime.call_checks import CallChecks, refuse_transforms
from attn_engine.runtime.cpu_compile import find_compiler
from attn_engine.runtime.selection_checks import check_forced
from attn_engine.runtime.selection_cpu import CpuSelection
from attn_engine.runtime.selection_dense import DenseSelection
from attn_engine.runtime.selection_machine import SelectionMachine
from attn_engine.runtime.selection_triton import TritonSelection
from attn_engine.runtime.storage import compute_dtype
from attn_engine.runtime.strides import logical_view, of_logical
from attn_engine.selection_text import SelectionText, checked_backend
from attn_engine.sequence_calls import sequence_places
from attn_engine.traced_program import Description
from attn_engine.traced_selection import Importance, SelectionDescription, TracedSelection
from attn_engine.tracing import Tracing


class SelectionEngine(SelectionText, Tracing[TracedSelection]):
    """A compiled selection: for each query and kv head the indices of the topk keys of the highest importance.

        importance[b, t, g, u] = sum over the query heads h of kv head g of score_mod(scale * q k^T, b, h, t, u)

    qk_metas: two `meta_tensor`s, for q (B, H, T, D) and k (B, Hkv, S, D). H is a multiple of Hkv.
    score_mod, mask_mod, custom_fwd_inputs: as for AttentionEngine. Pairs whose mask is False add nothing, and a key
        that no head of the group sees is no candidate; neither is one whose importance is -inf or NaN.
    pool: an `Overlap`: keys stand for windows of tokens, and blocks of tokens are selected, by the importances of the
        windows that reach into them.
    forced_mod: (b, h, q_idx, kv_idx) -> bool, with the kv head for h and the candidate (key or block) for kv_idx: what
        is always taken, first, visible or not; of more than topk the lowest.
    layout, scale, backend: as for AttentionEngine; the backends are "auto", "cpu", "triton", "triton-interpreter",
        "torch" and "reference".

    Importances are float32 (float64 for float64 inputs). Of equal ones the lower index is taken: results are the same
    from run to run. Memory is O(T * topk), and there is no gradient.
    """

    def __init__(
        self,
        qk_metas: Sequence[MetaTensor],
        score_mod: Callable[..., Any] | None = None,
        mask_mod: Callable[..., Any] | None = None,
        custom_fwd_inputs: CustomIO | None = None,
        *,
        pool: Overlap | None = None,
        forced_mod: Callable[..., Any] | None = None,
        layout: str = "bshd",
        scale: float | None = None,
        backend: str | None = None,
        **unknown: Any,
    ) -> None:
        self._arguments = {n: x for n, x in locals().items() if n not in ("self", "unknown")}
        for option, value in unknown.items():
            known = "score_mod, mask_mod, custom_fwd_inputs, pool, forced_mod, layout, scale, backend"
            raise UnknownOption(option=option, value=value, where="SelectionEngine", known=known)
        self._set_up(**self._arguments)
        self._traced = self._first_trace()

    def _set_up(
        self,
        qk_metas: Sequence[MetaTensor],
        score_mod: Callable[..., Any] | None,
        mask_mod: Callable[..., Any] | None,
        custom_fwd_inputs: CustomIO | None,
        pool: Overlap | None,
        forced_mod: Callable[..., Any] | None,
        layout: str,
        scale: float | None,
        backend: str | None,
    ) -> None:
        """Everything but the first trace."""
        if layout not in LAYOUTS:
            raise UnknownLayout(layout=layout)
        q, k = _two_metas(qk_metas)
        self.layout, self.backend = layout, checked_backend(backend)
        self.custom_io = CustomIO() if custom_fwd_inputs is None else custom_fwd_inputs
        self.scale = checked_scale(scale, 1.0 if score_mod is not None else 1.0 / math.sqrt(q.dim))
        pairs = Description(score_mod, mask_mod, self.custom_io, Importance(), q.dtype, q.dim, q.dim)
        self._description = SelectionDescription(pairs, _checked_pool(pool), forced_mod)
        sizes = tuple(fixed_sizes(m) for m in (q, k, k))
        expected = Expected(layout, q.dtype, (q.dim, k.dim, k.dim), sizes)
        device = None if self.backend == "torch" else DEVICES.get(self.backend)
        self._checks = CallChecks(expected, self.custom_io.shapes, self.backend, device)
        self._first_error = self._traced = None

    @property
    def program(self) -> Selection:
        """The traced program; before the first call custom inputs are taken for float32."""
        return self._present.program

    # -- calls

    @torch.no_grad()
    def __call__(self, q: Tensor, k: Tensor, *custom_inputs: Tensor, topk: int, **named: Tensor) -> Tensor:
        """int32 (B, T, kv heads, topk) in layout "bshd", (B, kv heads, T, topk) in "bhsd": ascending, -1 behind.

        custom_inputs: the tensors of custom_fwd_inputs in its order, or by name. cu_len_q, cu_len_kv (packed), or
        start_q, len_q, start_kv, len_kv (in a batch), or block_table with len_kv (k is a cache in pages): as for
        AttentionEngine; packed results have no batch, and candidates count from the first key of a sequence.
        """
        traced, tensors, numbers = self._bind(q, k, custom_inputs, named)
        views = self._logical(q), self._logical(k)
        chosen = _checked_topk(topk)
        if self.backend == "reference":
            found = DenseSelection(traced.program, *views, tensors, numbers, torch.float64).indices(chosen)
        elif (machine := self._machine(traced, q)) is not None:
            found = machine(*views, tensors, numbers, chosen)
        else:
            found = self._dense(traced, views, tensors, numbers).indices(chosen)
        return of_logical(found, self.layout, q.ndim == 3)

    @torch.no_grad()
    def reference(self, q: Tensor, k: Tensor, *custom_inputs: Tensor, topk: int, **named: Tensor) -> Tensor:
        """The same in torch and float64: the definition."""
        traced, tensors, numbers = self._bind(q, k, custom_inputs, named)
        views = self._logical(q), self._logical(k)
        found = DenseSelection(traced.program, *views, tensors, numbers, torch.float64)
        return of_logical(found.indices(_checked_topk(topk)), self.layout, q.ndim == 3)

    @torch.no_grad()
    def importance(
        self,
        q: Tensor,
        k: Tensor,
        *custom_inputs: Tensor,
        dtype: torch.dtype | None = None,
        **named: Tensor,
    ) -> Tensor:
        """The importances themselves, of `dtype` (None: that of a call), shaped as the indices of a call with one
        column for each candidate, and -inf where there is none; O(T * candidates) memory."""
        traced, tensors, numbers = self._bind(q, k, custom_inputs, named)
        views = self._logical(q), self._logical(k)
        found = self._dense(traced, views, tensors, numbers, dtype).importances()
        return of_logical(found, self.layout, q.ndim == 3)

    # -- copies

    def __deepcopy__(self, memo: dict[int, Any]) -> SelectionEngine:
        """A fresh engine of a copied description: modules whose methods are mods are copied, plain functions shared."""
        built = SelectionEngine.__new__(SelectionEngine)
        memo[id(self)] = built
        built._arguments = copy.deepcopy(self._arguments, memo)
        built._set_up(**built._arguments)  # not traced yet: the module around it may be half copied
        return built

    def __reduce__(self) -> Any:
        """Pickled by its description, where the functions can be."""
        return _remade, (dict(self._arguments),)

    # -- from a call to what runs it

    def _trace(self, storages: dict[str, Storage]) -> TracedSelection:
        return self._description.trace(storages)

    def _bind(
        self, q: Tensor, k: Tensor, custom_inputs: Sequence[Tensor], named: dict[str, Tensor]
    ) -> tuple[TracedSelection, dict[str, Tensor], dict[str, Number]]:
        """The program of this call, its captured tensors and tables, its numbers ("scale" first), all checked."""
        refuse_transforms((q, k, *custom_inputs, *named.values()))
        places = sequence_places(named, self._checks.custom_shapes) if named else None
        custom = custom_by_name(self._checks.custom_shapes, custom_inputs, named)
        traced = self._current(self._storages(custom))
        tensors, numbers = traced.tensors(custom), traced.scalars()
        if places is not None:
            sequences = places.sequences(k, self.layout)
            self._checks.check_shapes(q, k, k, sequences)
            tensors |= places.spans(self._logical(q), self._logical(k))
            traced = traced.with_sequences(sequences)
        pairs = traced.program.pairs
        own = {c.name for c in pairs.captures}
        spans = {n: x for n, x in tensors.items() if n in own or n not in _names(traced.program)}
        scalars = {s.name: numbers[s.name] for s in pairs.scalars}
        self._checks(pairs, q, k, k, custom, spans, scalars)
        check_forced(traced.program, self._logical(q), self._logical(k), tensors, numbers)
        return traced, tensors, {"scale": self.scale, **numbers}

    def _machine(self, traced: TracedSelection, q: Tensor) -> SelectionMachine | None:
        """The generated kernels that answer; None: torch does, where it was chosen or "auto" knows of no kernels."""
        name = self.backend
        if name == "auto":
            compiles = q.device.type != "cpu" or find_compiler() is not None
            name = {"cpu": "cpu", "cuda": "triton"}.get(q.device.type, "torch") if compiles else "torch"
        if name == "torch":
            return None
        found = traced.machines.get(name)
        if found is None:
            found = traced.machines[name] = machine_named(name, traced.program)
        return found

    def _dense(
        self,
        traced: TracedSelection,
        views: tuple[Tensor, Tensor],
        tensors: dict[str, Tensor],
        numbers: dict[str, Number],
        dtype: torch.dtype | None = None,
    ) -> DenseSelection:
        wide = compute_dtype(traced.program.pairs.element) if dtype is None else dtype
        return DenseSelection(traced.program, *views, tensors, numbers, wide)

    def _logical(self, x: Tensor) -> Tensor:
        return logical_view(x, self.layout)


def _names(program: Selection) -> set[str]:
    return {c.name for c in program.captures}


def machine_named(backend: str, program: Selection) -> SelectionMachine:
    """The generated kernels of "cpu", "triton" or "triton-interpreter"; raises UnsupportedOnBackend."""
    if backend == "cpu":
        return CpuSelection(program)
    return TritonSelection(program, interpret=backend == "triton-interpreter")


def _two_metas(qk_metas: Sequence[MetaTensor]) -> tuple[MetaTensor, MetaTensor]:
    metas = tuple(qk_metas) if isinstance(qk_metas, list | tuple) else ()
    if len(metas) != 2 or not all(isinstance(m, MetaTensor) for m in metas):
        raise WrongMeta(argument="qk_metas", got=qk_metas, expected="two meta_tensors, for q and k")
    q, k, _ = three_metas((*metas, metas[1]))
    return q, k


def _checked_pool(pool: object) -> Overlap | None:
    if pool is None or isinstance(pool, Overlap):
        return pool
    instead = "Give the sizes in tokens: Overlap(length=32, stride=16, block=64)."
    raise WrongArgument(argument="pool", got=pool, expected="an Overlap", instead=instead)


def _checked_topk(topk: object) -> int:
    if isinstance(topk, bool) or not isinstance(topk, int) or topk < 1:
        instead = "It is how many indices a row of the result has; rows with fewer candidates end with -1."
        raise WrongArgument(argument="topk", got=topk, expected="an int, 1 or more", instead=instead)
    return topk


def _remade(arguments: dict[str, Any]) -> SelectionEngine:
    return SelectionEngine(**arguments)

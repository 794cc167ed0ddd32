"""From functions to kernels: one program per make of score_mod and mask_mod, found again at each call."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from attn_engine.errors import UnsupportedOnBackend
from attn_engine.flex.functions import Composition, StandIns
from attn_engine.frontend import CustomIO
from attn_engine.ir.ops import Number
from attn_engine.ir.program import Attention
from attn_engine.library.dense.softmax import OnlineSoftmax
from attn_engine.listed_calls import lists_of_call
from attn_engine.masks import BlockLists
from attn_engine.runtime.backends import DEVICES, backend_named, schedule_for
from attn_engine.runtime.bind import Expected, check_kind
from attn_engine.runtime.block_lists import tensor_names
from attn_engine.runtime.call import Call, register
from attn_engine.runtime.call_checks import CallChecks
from attn_engine.runtime.compiled import CompiledAttention
from attn_engine.runtime.launch_plan import CallKind
from attn_engine.traced_program import Description, TracedProgram

Function = Callable[..., Any]
SAVED_ROWS = tuple(OnlineSoftmax().final_rowscales)  # what the kernels return besides the output
MOST_PROGRAMS = 512  # how many makes of functions are remembered; kernels are kept by program, beyond that


@dataclass(frozen=True, slots=True)
class Bound:
    """A call, bound: its kernels and their operator key, the captured tensors by name, the numbers ("scale" first),
    and the plans of calls of its shapes."""

    call: Call
    key: int
    captured: dict[str, Tensor]
    numbers: dict[str, Number]
    plans: CallKind

    @property
    def program(self) -> Attention:
        return self.call.compiled.program

    def rows(self, values: Iterable[Tensor]) -> dict[str, Tensor]:
        """Row values by their names in the rule; none where none were asked for."""
        return dict(zip(self.call.rows, values, strict=False))


@dataclass(frozen=True, eq=False)
class ArgumentChecks:
    """What the registered operators check. The graph that calls them hands everything in, so nothing can be stale."""

    program: Attention
    checks: CallChecks

    def shapes(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        self.checks.check_shapes(q, k, v)

    def everything(
        self, q: Tensor, k: Tensor, v: Tensor, captured: Sequence[Tensor], scalars: Mapping[str, Number]
    ) -> None:
        tensors = dict(zip(tensor_names(self.program), captured, strict=False))
        for described in self.program.captures:
            check_kind(described, tensors[described.name])
        numbers = {name: x for name, x in scalars.items() if name != "scale"}
        self.checks(self.program, q, k, v, {}, tensors, numbers)


@dataclass(frozen=True, slots=True)
class Kind:
    """What is compiled in besides the functions: dtype, head dimensions, and the backend asked for."""

    dtype: torch.dtype
    dim_qk: int
    dim_v: int
    backend: str

    @classmethod
    def of(cls, q: Tensor, v: Tensor, backend: str) -> Kind:
        return cls(q.dtype, q.shape[3], v.shape[3], backend)


# The kernels of a program: made once per process, whichever functions led to it. Compiled graphs hold their keys.
_calls: dict[tuple[Attention, str, str], tuple[Call, int]] = {}
_checks: dict[Kind, CallChecks] = {}


def call_of(program: Attention, kind: Kind, device: str) -> tuple[Call, int]:
    """The kernels of a program on the backend asked for, or on that of the device."""
    name = kind.backend if kind.backend != "auto" else _backend_of(device)
    found = _calls.get((program, kind.backend, name))
    if found is None:
        backend = backend_named(name)
        compiled = CompiledAttention(program, backend, schedule_for(program, backend))
        call = Call(compiled, "bhsd", ArgumentChecks(program, checks_of(kind)), twice=True)
        found = _calls.setdefault((program, kind.backend, name), (call, register(call)))
    return found


def checks_of(kind: Kind) -> CallChecks:
    found = _checks.get(kind)
    if found is None:
        anything = (None, None, None)
        dims = (kind.dim_qk, kind.dim_qk, kind.dim_v)
        expected = Expected("bhsd", kind.dtype, dims, (anything, anything, anything))
        found = _checks[kind] = CallChecks(expected, {}, kind.backend, DEVICES.get(kind.backend))
    return found


def _backend_of(device: str) -> str:
    match device:
        case "cpu" | "meta":
            return "cpu"
        case "cuda":
            return "triton"
        case _:
            raise UnsupportedOnBackend(
                backend="auto",
                feature=f"{device} tensors",
                instead="Move them to the CPU or to a CUDA device.",
            )


def describe(score_mod: Function | None, mask_mod: Function | None, kind: Kind) -> Description:
    """Softmax attention with these functions."""
    return Description(score_mod, mask_mod, CustomIO(), OnlineSoftmax(), kind.dtype, kind.dim_qk, kind.dim_v)


@dataclass(eq=False)
class FlexProgram:
    """A make of functions: traced on stand-ins, whose captured values are exchanged at every call."""

    description: Description
    kind: Kind
    stand_ins: StandIns
    alive: list[object]
    lock: threading.RLock = field(default_factory=threading.RLock)
    traced: TracedProgram | None = None

    def bind(
        self,
        values: Sequence[Any],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        lists: BlockLists | None,
    ) -> Bound:
        """The kernels, tensors and numbers of a call, all checked."""
        with self.lock:
            self.stand_ins.put(values)
            try:
                traced = self._current()
                captured, numbers = traced.tensors({}), traced.scalars()
            finally:
                self.stand_ins.forget()
        if lists is not None:
            listed = lists_of_call(lists, q, k)
            traced, captured = traced.with_lists(listed.blocks), captured | listed.tensors
        plans = checks_of(self.kind)(traced.program, q, k, v, {}, captured, numbers)
        device = q.device.type
        found = traced.calls.get(device)
        if found is None:
            found = traced.calls[device] = call_of(traced.program, self.kind, device)
        return Bound(*found, captured, {"scale": scale, **numbers}, plans)

    def _current(self) -> TracedProgram:
        if self.traced is None or self.traced.stale({}):
            self.traced = self.description.trace({})
        return self.traced


_programs: OrderedDict[Hashable, FlexProgram] = OrderedDict()
_lock = threading.Lock()


def bind_call(
    functions: tuple[Function | None, Function | None],
    kind: Kind,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    lists: BlockLists | None = None,
) -> Bound:
    """A call with these score_mod and mask_mod, bound to its kernels; lists: where mask_mod is asked (partial blocks),
    and what counts besides (full blocks)."""
    made = Composition.of(functions)
    key = (made.key, kind)
    found = _programs.get(key)
    if found is None:
        stand_ins = StandIns(functions)
        score_mod, mask_mod = stand_ins.functions
        found = FlexProgram(describe(score_mod, mask_mod, kind), kind, stand_ins, made.alive)
        with _lock:
            found = _programs.setdefault(key, found)
            if len(_programs) > MOST_PROGRAMS:
                _programs.popitem(last=False)
    return found.bind(made.values, q, k, v, scale, lists)


def kernels_made() -> int:
    """How many programs have got kernels in this process."""
    return len(_calls)

"""From the mods of a linear attention to its program, and from the program back to what they capture at a call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from attn_engine.frontend import CustomIO, Trace
from attn_engine.frontend.linear import Mod, ModInputs, trace_mod
from attn_engine.frontend.names import KernelNames
from attn_engine.ir.expr import Const, Expr, Var
from attn_engine.ir.kernel_words import CHUNK_WORDS
from attn_engine.ir.linear import BETA, KEY, QUERY, VALUE, WEIGHT_SUM, LinearProgram, Rank, decay_var
from attn_engine.ir.ops import DType, Number, Storage
from attn_engine.ir.program import Captured
from attn_engine.runtime.storage import STORAGES


@dataclass(frozen=True, slots=True)
class LinearKind:
    """What a program depends on besides the mods: how a call's decay, beta and custom inputs lie."""

    decay: Rank
    decay_storage: Storage
    beta: Storage | None
    custom: tuple[tuple[str, Storage], ...]


@dataclass(frozen=True)
class LinearDescription:
    """What the user wrote."""

    q_mod: Mod | None
    k_mod: Mod | None
    v_mod: Mod | None
    decay_mod: Mod | None
    beta_mod: Mod | None
    erase_mod: Mod | None
    bonus_mod: Mod | None
    normalizer_mod: Mod | None
    custom_io: CustomIO
    delta: bool
    exclusive: bool
    reverse: bool
    scale: float
    dtype: torch.dtype
    dim_qk: int
    dim_v: int

    def trace(self, kind: LinearKind) -> TracedLinear:
        """Run the mods on symbols."""
        run = _Tracing(self, kind)
        key = run.mod("k_mod", "d", KEY)
        query = run.mod("q_mod", "d", QUERY)
        strength = self._strength(run, kind)
        decay = run.decay(kind.decay)
        program = LinearProgram(
            name=self.name(),
            query=query if self.scale == 1.0 else query * self.scale,
            write=key if strength is None else key * strength,
            value=run.mod("v_mod", "dv", VALUE),
            decay=decay,
            erase=run.mod("erase_mod", "d", KEY, key) if self.delta else None,
            bonus=run.mod("bonus_mod", "d", KEY) if self.bonus_mod is not None else None,
            divisor=run.mod("normalizer_mod", "dv", WEIGHT_SUM) if self.normalizer_mod is not None else None,
            exclusive=self.exclusive,
            reverse=self.reverse,
            element=STORAGES[self.dtype],
            dim_qk=self.dim_qk,
            dim_v=self.dim_v,
            decay_given=kind.decay,
            decay_storage=kind.decay_storage,
            beta_storage=kind.beta,
            captures=run.captures(),
            scalars=run.scalars(),
            names={e: n for t in run.traces for e, n in t.fn.names.items()},
            sources={e: s for t in run.traces for e, s in t.fn.sources.items()},
        )
        return TracedLinear(program, tuple(run.traces), kind)

    def _strength(self, run: _Tracing, kind: LinearKind) -> Expr | None:
        if self.beta_mod is None and kind.beta is None:
            return None
        return run.mod("beta_mod", "d", BETA if kind.beta is not None else Const(1.0))

    def name(self) -> str:
        mods = (self.q_mod, self.k_mod, self.v_mod, self.decay_mod, self.beta_mod)
        names = [getattr(m, "__name__", "") for m in mods if m is not None]
        return "_".join(["linear", *(n for n in names if n.isidentifier())])


class _Tracing:
    """The traces of one program."""

    def __init__(self, description: LinearDescription, kind: LinearKind) -> None:
        self.description = description
        self.names = KernelNames(CHUNK_WORDS)
        inputs = {"q": QUERY, "k": KEY, "v": VALUE}
        if kind.decay is not Rank.NONE:
            inputs["decay"] = decay_var(kind.decay)
        if kind.beta is not None:
            inputs["beta"] = BETA
        self.inputs = ModInputs(description.custom_io, dict(kind.custom), inputs)
        self.traces: list[Trace] = []

    def mod(self, what: str, row: str, argument: Expr, default: Expr | None = None) -> Expr:
        """What a mod makes of its argument; without a mod the default, or else the argument itself."""
        fn = getattr(self.description, what)
        if fn is None:
            return argument if default is None else default
        trace = trace_mod(fn, what, row, argument, self.inputs, self.names)
        self.traces.append(trace)
        return trace.fn.result

    def decay(self, given: Rank) -> Expr | None:
        if given is Rank.NONE:
            return None if self.description.decay_mod is None else self.mod("decay_mod", "d", Const(0.0))
        return self.mod("decay_mod", "d", decay_var(given))

    def captures(self) -> tuple[Captured, ...]:
        return tuple(dict.fromkeys(c for t in self.traces for c in t.fn.captures))

    def scalars(self) -> tuple[Var, ...]:
        return tuple(dict.fromkeys(s for t in self.traces for s in t.fn.scalars))


@dataclass(eq=False)
class TracedLinear:
    """A program and where its captured values come from. The engine fills
    machines (what runs it, by backend) and checked (kinds of calls whose indices stay inside their tensors)."""

    program: LinearProgram
    traces: tuple[Trace, ...]
    kind: LinearKind
    machines: dict[str, Any] = field(default_factory=dict, repr=False)
    checked: set[tuple[object, ...]] = field(default_factory=set[tuple[object, ...]], repr=False)

    def __post_init__(self) -> None:
        self.watched = any(t.guards or t.tensors or t.scalars or t.opaque for t in self.traces)
        self._reads: dict[str, Callable[[], Tensor]] = {
            b.name: b.accessor for t in self.traces for b in t.tensors
        }
        self._custom = {name: given for t in self.traces for name, given in t.custom}
        self._numbers = {s.var.name: s.accessor for t in self.traces for s in t.scalars}

    def stale(self) -> bool:
        """Whether tracing again could give another program."""
        return self.watched and any(t.opaque or t.stale() for t in self.traces)

    def tensors(self, custom: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The captured tensors of this moment, by kernel name."""
        return {
            c.name: self._reads[c.name]() if c.name in self._reads else custom[self._custom[c.name]]
            for c in self.program.captures
        }

    def bound(self) -> dict[str, Tensor]:
        """Those of them that the mods reach by themselves."""
        return {name: read() for name, read in self._reads.items()}

    def custom_names(self) -> dict[str, str]:
        """The custom input behind each of the others."""
        return self._custom

    def scalars(self) -> dict[str, Number]:
        """The captured numbers of this moment."""
        kinds = {s.name: s.dtype for s in self.program.scalars}
        found = {name: read() for name, read in self._numbers.items() if name in kinds}
        return {n: float(x) if kinds[n] is DType.FLOAT else x for n, x in found.items()}

"""LinearAttentionEngine: linear attentions and state space models from their mods."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from attn_engine.errors import (
    UnknownBackend,
    UnknownLayout,
    UnknownOption,
)
from attn_engine.frontend import CustomIO, MetaTensor
from attn_engine.frontend.linear import Mod
from attn_engine.ir.linear import Rank
from attn_engine.ir.ops import Storage
from attn_engine.linear_checks import (
    LinearExpected,
    check_captured,
    check_custom,
    check_parts,
    check_qkv,
    checked_beta,
    checked_decay,
    checked_state,
    sequences_of,
)
from attn_engine.linear_graph import in_graph, numbered
from attn_engine.linear_steps import StepPlan, step
from attn_engine.linear_text import LinearText
from attn_engine.options import checked_scale, fixed_sizes, three_metas
from attn_engine.runtime.backends import backend_named
from attn_engine.runtime.bind import LAYOUTS, custom_by_name
from attn_engine.runtime.call_checks import refuse_transforms
from attn_engine.runtime.cpu_compile import find_compiler
from attn_engine.runtime.linear_autograd import LinearMachine, attend
from attn_engine.runtime.linear_cpu import CpuChunks
from attn_engine.runtime.linear_indices import check_linear_indices
from attn_engine.runtime.linear_inputs import LinearInputs
from attn_engine.runtime.linear_reference import token_recurrence
from attn_engine.runtime.linear_tilelang import TileLangChunks
from attn_engine.runtime.linear_torch import TorchChunks
from attn_engine.runtime.linear_triton import TritonChunks
from attn_engine.runtime.storage import STORAGES
from attn_engine.traced_linear import LinearDescription, LinearKind, TracedLinear

BACKENDS = ("auto", "cpu", "torch", "triton", "triton-interpreter", "tilelang", "tilelang-cpu", "reference")
CHUNKS = (16, 32, 64, 128)


class LinearAttentionEngine(LinearText):
    """A compiled linear attention: a state per head that each token decays, writes to and reads.

        S~_t = Diag(e^{decay_t}) S_{t-1}
        S_t  = S~_t + k_t v_t^T                                    or, with the delta rule,
        S_t  = S~_t + beta_t k_t (v_t - S~_t^T e_t)^T
        o_t  = scale * S_t^T q_t

    qkv_meta: three `meta_tensor`s for q (B, HQ, T, D), k (B, HK, T, D), v (B, H, T, Dv), in this order. HQ and HK
        divide H: heads of v share heads of q and k. D, Dv and the dtype are compiled in; other sizes may be None.
    q_mod, k_mod, v_mod, decay_mod: what is used in place of q, k, v and decay: functions of one token's row, (x),
        (x, custom_io), (x, b, h, t) or (x, custom_io, b, h, t). Rows are reduced with x.sum(-1) and the like.
        `custom_io.input_tensors` has the custom inputs, and the token's own "q", "k", "v", "decay", "beta".
    custom_io: `CustomIO`, names and shapes of the tensors that a call passes after decay.
    delta: the delta rule, which takes away what the state holds for e_t before it writes. beta_mod gives the strength
        (implies delta), erase_mod e_t from the row of k (implies delta; k_mod(k) where there is none).
    normalizer_mod: (w) or as the mods: what an output row is divided by, of the sum of the weights that made it. The
        state then has one more column.
    phase: "exclusive" reads the state before the token's own decay and write; bonus_mod, of the row of k, then adds
        (bonus_t . q_t) v_t.
    reverse: from the last token to the first.
    decay_rank: "none", "head" (H,), "token" (B, T, H) or "vector" (B, T, H, D): what a call's decay must be. None: any.
    layout: "bshd" (batch, length, heads, dim) or "bhsd", for q, k, v, o, decay and beta alike.
    chunk: tokens of a chunk, 16, 32, 64 or 128; None: chosen. Results differ by rounding alone.
    backend: "auto" (by the tensors' device), "cpu" (generated C++), "triton" (on a GPU), "triton-interpreter" (the same
        kernels on the CPU, slowly), "torch", or "reference" (token by token in float64: the definition).

    A decay is a natural logarithm, at most 0; a decay_mod may compute it from anything. Raises typed errors.
    """

    def __init__(
        self,
        qkv_meta: Sequence[MetaTensor],
        q_mod: Mod | None = None,
        k_mod: Mod | None = None,
        v_mod: Mod | None = None,
        decay_mod: Mod | None = None,
        custom_io: CustomIO | None = None,
        *,
        beta_mod: Mod | None = None,
        erase_mod: Mod | None = None,
        bonus_mod: Mod | None = None,
        normalizer_mod: Mod | None = None,
        delta: bool = False,
        phase: str = "inclusive",
        reverse: bool = False,
        scale: float | None = None,
        decay_rank: str | None = None,
        layout: str = "bshd",
        chunk: int | None = None,
        backend: str = "auto",
        **unknown: Any,
    ) -> None:
        self._arguments = {n: x for n, x in locals().items() if n not in ("self", "unknown", "__class__")}
        self._set_up(unknown)
        self._present = self._first_trace()

    def _set_up(self, unknown: dict[str, Any]) -> None:
        """Everything but the first trace."""
        given = self._arguments
        self.layout, self.backend, self.chunk = given["layout"], given["backend"], given["chunk"]
        self._check_options(given["phase"], given["decay_rank"], unknown)
        q, k, v = three_metas(given["qkv_meta"])
        self.custom_io = CustomIO() if given["custom_io"] is None else given["custom_io"]
        self._rank = None if given["decay_rank"] is None else Rank(given["decay_rank"])
        mods = {n: x for n, x in given.items() if n.endswith("_mod")}
        self._description = LinearDescription(
            **mods,
            custom_io=self.custom_io,
            delta=given["delta"] or mods["beta_mod"] is not None or mods["erase_mod"] is not None,
            exclusive=given["phase"] == "exclusive",
            reverse=bool(given["reverse"]),
            scale=checked_scale(given["scale"], 1.0),
            dtype=q.dtype,
            dim_qk=q.dim,
            dim_v=v.dim,
        )
        check_parts(self._description)
        sizes = tuple(fixed_sizes(m) for m in (q, k, v))
        self._expected = LinearExpected(self.layout, q.dtype, (q.dim, k.dim, v.dim), sizes)  # pyright: ignore[reportArgumentType]
        self._traced: dict[LinearKind, TracedLinear] = {}
        self._steps: dict[tuple[object, ...], StepPlan] = {}
        self._present: TracedLinear | None = None
        self._number = numbered(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> LinearAttentionEngine:
        """A fresh engine of a copied description: modules whose methods are mods are copied, plain functions shared."""
        built = type(self).__new__(type(self))
        memo[id(self)] = built
        built._arguments = copy.deepcopy(self._arguments, memo)
        built._set_up({})  # not traced yet: the module around it may be half copied
        return built

    def __reduce__(self) -> Any:
        """Pickled by its description, where the mods can be; kernels are made anew from the cache."""
        return _remade, (type(self), dict(self._arguments))

    def _check_options(self, phase: str, decay_rank: str | None, unknown: dict[str, Any]) -> None:
        known = "beta_mod, erase_mod, bonus_mod, normalizer_mod, delta, phase, reverse, scale, decay_rank, layout, "
        known += "chunk, backend"
        for option, value in unknown.items():
            raise UnknownOption(option=option, value=value, where="LinearAttentionEngine", known=known)
        if self.layout not in LAYOUTS:
            raise UnknownLayout(layout=self.layout)
        if self.backend not in BACKENDS:
            raise UnknownBackend(backend=self.backend, known=", ".join(map(repr, BACKENDS)))
        if phase not in ("inclusive", "exclusive"):
            raise UnknownOption(
                option="phase", value=phase, where="LinearAttentionEngine", known="'inclusive', 'exclusive'"
            )
        ranks = [r.value for r in Rank]
        if decay_rank is not None and decay_rank not in ranks:
            known = ", ".join(map(repr, ranks))
            raise UnknownOption(
                option="decay_rank", value=decay_rank, where="LinearAttentionEngine", known=known
            )
        if self.chunk is not None and self.chunk not in CHUNKS:
            raise UnknownOption(
                option="chunk",
                value=self.chunk,
                where="LinearAttentionEngine",
                known=", ".join(map(str, CHUNKS)),
            )

    def _first_trace(self) -> TracedLinear:
        """So that mistakes show when the engine is made. Custom inputs are taken for float32 until a call."""
        element = STORAGES[self._description.dtype]
        rank = self._rank or (Rank.NONE if self._description.decay_mod is None else Rank.TOKEN)
        custom = tuple((n, Storage.FLOAT32) for n in self.custom_io)
        beta = element if self._description.beta_mod is not None else None
        return self._program_of(LinearKind(rank, element, beta, custom))

    @property
    def shown(self) -> TracedLinear:
        if self._present is None:
            self._present = self._first_trace()
        return self._present

    @property
    def state_columns(self) -> int:
        """Columns of the state: those of v, and one for the sum of the weights where that is divided by."""
        return self._description.dim_v + (self._description.normalizer_mod is not None)

    @overload
    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        decay: Tensor | None = None,
        *custom: Tensor,
        beta: Tensor | None = None,
        initial_state: Tensor | None = None,
        return_final_state: Literal[False] = False,
        cu_seqlens: Tensor | None = None,
        **named: Tensor,
    ) -> Tensor: ...
    @overload
    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        decay: Tensor | None = None,
        *custom: Tensor,
        beta: Tensor | None = None,
        initial_state: Tensor | None = None,
        return_final_state: Literal[True],
        cu_seqlens: Tensor | None = None,
        **named: Tensor,
    ) -> tuple[Tensor, Tensor]: ...

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        decay: Tensor | None = None,
        *custom: Tensor,
        beta: Tensor | None = None,
        initial_state: Tensor | None = None,
        return_final_state: bool = False,
        cu_seqlens: Tensor | None = None,
        **named: Tensor,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """o of v's shape; with return_final_state also the states after the last tokens, (N, H, D, Dv), float32
        (float64 for float64 inputs), one for each batch element or packed sequence.

        initial_state: the states before the first tokens, of that shape. cu_seqlens: where packed sequences begin in a
        batch of 1, and the end. All but cu_seqlens may have gradients.
        """
        dense = self.backend == "reference"
        if torch.compiler.is_compiling() or (torch._C._len_torch_dispatch_stack() and not dense):
            rows = (q, k, v, decay, beta)
            o, states = in_graph(self, self._number, rows, custom, named, initial_state, cu_seqlens)
            return (o, states) if return_final_state else o
        traced, inputs = self.bind(q, k, v, decay, custom, named, beta, initial_state, cu_seqlens)
        refuse_transforms(inputs.tensors().values())
        if self.backend == "reference":
            o, states = token_recurrence(traced.program, inputs)
            o = o.to(q.dtype)
        else:
            o, states = attend(self.machine(traced, q.device), inputs)
        o = o.transpose(1, 2) if self.layout == "bshd" else o
        return (o, states) if return_final_state else o

    def step(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        decay: Tensor | None,
        state: Tensor,
        *custom: Tensor,
        beta: Tensor | None = None,
        t: int = 0,
        **named: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """One token, for decoding: o (B, H, Dv), and the state, which is changed in place to that after the token.

        q, k, v, decay and beta as in a call, without their token dimension; custom inputs with a "seq_len" of 1. t: the
        token's position, for mods that use it. No gradients. The same numbers as a call that has all tokens, but for
        rounding; with reverse=True give the tokens from the last to the first.
        """
        return step(self, (q, k, v, decay), state, custom, beta, t, named, self._steps)

    def reference(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        decay: Tensor | None = None,
        *custom: Tensor,
        beta: Tensor | None = None,
        initial_state: Tensor | None = None,
        return_final_state: bool = False,
        cu_seqlens: Tensor | None = None,
        form: str = "recurrent",
        dtype: torch.dtype = torch.float64,
        **named: Tensor,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The same in torch and in `dtype`, differentiable by autograd: form "recurrent" (token by token: the
        definition), "parallel" (one chunk; O(T^2) memory) or "chunk"."""
        traced, inputs = self.bind(q, k, v, decay, custom, named, beta, initial_state, cu_seqlens)
        match form:
            case "recurrent":
                o, states = token_recurrence(traced.program, inputs, dtype)
            case "parallel" | "chunk":
                chunk = max(1, q.shape[1], q.shape[2]) if form == "parallel" else self.chunk
                o, states, _ = TorchChunks(traced.program, chunk, dtype).forward(inputs)
            case _:
                known = "'recurrent', 'parallel', 'chunk'"
                raise UnknownOption(option="form", value=form, where="reference", known=known)
        o = o.transpose(1, 2) if self.layout == "bshd" else o
        return (o, states) if return_final_state else o

    # -- from a call to what runs it

    def bind(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        decay: Tensor | None,
        custom: Sequence[Tensor],
        named: dict[str, Tensor],
        beta: Tensor | None,
        initial_state: Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> tuple[TracedLinear, LinearInputs]:
        """The program of this call and its tensors in logical order, all checked."""
        q, k, v = check_qkv(q, k, v, self._expected)
        decay = checked_decay(decay, v, q.shape[3], self.layout, self._rank)
        beta = checked_beta(beta, v, self.layout, self._description.delta)
        by_name = custom_by_name(self.custom_io.shapes, custom, named)
        check_custom(by_name, self.custom_io.shapes, q, v)
        traced = self._program_of(self._kind(decay, beta, by_name))
        captured = traced.tensors(by_name)
        check_captured(captured, v)
        sequences = sequences_of(cu_seqlens, v.shape[0], v.shape[2])
        inputs = LinearInputs(q, k, v, decay, beta, captured, traced.scalars(), None, sequences)
        check_linear_indices(traced.program, inputs, traced.checked)
        shape = inputs.state_shape(traced.program.state_columns)
        state = checked_state("initial_state", initial_state, shape, v)
        self._present = traced
        if state is None:
            return traced, inputs
        return traced, LinearInputs(q, k, v, decay, beta, captured, inputs.scalars, state, sequences)

    def _kind(self, decay: Tensor | None, beta: Tensor | None, custom: dict[str, Tensor]) -> LinearKind:
        ranks = {1: Rank.HEAD, 3: Rank.TOKEN, 4: Rank.VECTOR}
        element = STORAGES[self._description.dtype]
        return LinearKind(
            Rank.NONE if decay is None else ranks[decay.ndim],
            element if decay is None else STORAGES[decay.dtype],
            None if beta is None else STORAGES[beta.dtype],
            tuple((name, STORAGES[x.dtype]) for name, x in custom.items()),
        )

    def _program_of(self, kind: LinearKind) -> TracedLinear:
        found = self._traced.get(kind)
        if found is None or found.stale():
            fresh = self._description.trace(kind)
            if found is not None and fresh.program == found.program:
                fresh.machines = found.machines
            found = self._traced[kind] = fresh
        return found

    def machine(self, traced: TracedLinear, device: torch.device) -> LinearMachine:
        name = self.backend
        if name == "auto":
            on_gpu = device.type == "cuda" and traced.program.element is not Storage.FLOAT64
            name = "triton" if on_gpu else "cpu" if device.type == "cpu" else "torch"
        found = traced.machines.get(name)
        if found is None:
            found = traced.machines[name] = self._made(traced, name)
        return found

    def _made(self, traced: TracedLinear, name: str) -> LinearMachine:
        if name == "cpu" and find_compiler() is not None:
            return CpuChunks(traced.program, self.chunk)
        if name in ("triton", "triton-interpreter"):
            return TritonChunks(traced.program, self.chunk, name == "triton-interpreter")
        if name in ("tilelang", "tilelang-cpu"):
            return TileLangChunks(traced.program, self.chunk, name == "tilelang-cpu")
        if name == "cpu":
            backend_named("cpu")  # warns, once
        return TorchChunks(traced.program, self.chunk)


def _remade(kind: type[LinearAttentionEngine], arguments: dict[str, Any]) -> LinearAttentionEngine:
    return kind(**arguments)

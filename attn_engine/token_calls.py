"""A call that gives a list of tokens for every query: from its arguments to pieces of gathered keys."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attn_engine.errors import UnsupportedOnBackend
from attn_engine.ir.passes.pack_heads import packable
from attn_engine.ir.passes.token_lists import HEADS_OF_LIST, over_token_lists
from attn_engine.ir.program import Attention, Sequences
from attn_engine.runtime.backends import backend_for, backend_named
from attn_engine.runtime.call import Call, register
from attn_engine.runtime.call_checks import refuse_transforms
from attn_engine.runtime.compiled import CompiledAttention
from attn_engine.runtime.dense_tokens import dense_tokens
from attn_engine.runtime.paged_checks import CacheNotDifferentiable
from attn_engine.runtime.scaled import check_scales, like_queries, refuse_bare, scales_given
from attn_engine.runtime.shared_values import values_in_keys
from attn_engine.runtime.strides import of_logical
from attn_engine.runtime.token_attention import Keys, TokenAttention, TokenCall
from attn_engine.runtime.token_checks import BLOCK_TABLE, COUNTS, LEN_KV, LISTS, NO_NAMES, checked_lists
from attn_engine.runtime.token_errors import refuse
from attn_engine.runtime.token_lists import TokenLists

if TYPE_CHECKING:
    from attn_engine.engine import AttentionEngine

_OTHER_WAYS = (
    "cu_len_q", "cu_len_kv", "start_q", "len_q", "start_kv", "block_sparse_mask", "block_sparse_indices",
)  # fmt: skip


def over_tokens(
    engine: AttentionEngine,
    inputs: tuple[Tensor, Tensor, Tensor],
    custom: tuple[Tensor, ...],
    named: dict[str, Any],
    block_mask: Any = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, dict[str, Tensor]] | None:
    """o and the row values of a call that gives lists of tokens, None for others; dtype as of `GivenTokens.attend`."""
    given = tokens_given(named, engine._checks.custom_shapes, block_mask)
    return None if given is None else given.attend(engine, inputs, custom, named, dtype)


def tokens_given(
    named: dict[str, Any], custom: Collection[str], block_mask: Any = None
) -> GivenTokens | None:
    """Takes the arguments that give lists of tokens out of a call's; None where there are none."""
    given = {n: named.pop(n) for n in (*LISTS, COUNTS) if n in named and n not in custom}
    given = {n: x for n, x in given.items() if x is not None}
    lists = [n for n in LISTS if n in given]
    if not lists:
        if given:
            raise refuse(
                COUNTS, "it", "given", "left out where there is neither token_indices nor token_slots"
            )
        return None
    if len(lists) == 2:
        raise refuse(LISTS[1], "an argument beside token_indices", "given", "left out")
    others = [n for n in _OTHER_WAYS if named.get(n) is not None and n not in custom]
    others += ["block_mask"] if block_mask is not None else []
    if others:
        instead = "Queries of a batch bring lists; of keys there are len_kv and block_table."
        raise refuse(others[0], f"an argument beside {lists[0]}", "given", "left out", instead)
    return GivenTokens(lists[0], given[lists[0]], given.get(COUNTS))


@dataclass(frozen=True, slots=True, eq=False)
class GivenTokens:
    """The lists of a call: the argument's name, the lists, how many entries of each count."""

    name: str
    indices: Tensor
    counts: Tensor | None

    def attend(
        self,
        engine: AttentionEngine,
        inputs: tuple[Tensor, Tensor, Tensor],
        custom: tuple[Tensor, ...],
        named: dict[str, Any],
        dtype: torch.dtype | None = None,
        *,
        shared: bool = False,
        sets: bool = False,
        called: Mapping[str, str] = NO_NAMES,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """o and the row values; dtype: of the dense definition, None: with the engine's kernels.

        shared: v is the first columns of k, which gets the gradients of both. sets: refuse lists that name a token
        twice. called: names of arguments, where the caller has others.
        """
        if torch.compiler.is_compiling():
            raise UnsupportedOnBackend(
                backend="torch.compile",
                feature="lists of tokens, whose pieces depend on what is in them",
                instead="Call the engine outside of the compiled graph: torch.compiler.disable(engine)(q, k, v, ...).",
            )
        refuse_transforms((*inputs, *custom, *named.values(), self.indices))
        bound, lists = self.bound(engine, inputs, custom, named, called)
        if sets:
            lists.refuse_duplicates()
        keys = keys_of(engine, inputs, bound.scales, shared=shared)
        o, rows = attend_over(engine, bound, lists, *keys, dtype)
        return of_logical(o, engine.layout, False), rows

    def bound(
        self,
        engine: AttentionEngine,
        inputs: tuple[Tensor, Tensor, Tensor],
        custom: tuple[Tensor, ...],
        named: dict[str, Any],
        called: Mapping[str, str] = NO_NAMES,
    ) -> tuple[Bound, TokenLists]:
        """The program and what it reads, and the lists, after the checks of a call."""
        table, length = (named.pop(n, None) for n in (BLOCK_TABLE, LEN_KV))
        in_cache = table is not None or self.name == LISTS[1]
        scales = scales_given(named, engine._checks.custom_shapes, *inputs[1:], engine.layout)
        stand_ins = inputs[1:]
        if scales is None:
            refuse_bare(*inputs[1:])
        else:
            stand_ins = like_queries(*inputs)
            check_scales(*inputs[1:], scales, engine.layout)
        bound = self._bound(engine, (inputs[0], *stand_ins), custom, named, in_cache, table)
        q, k, _ = (engine._logical(x) for x in inputs)
        lists = checked_lists(self.name, self.indices, self.counts, q, k, table, length, called)
        return replace(bound, scales=scales or {}), lists

    def _bound(
        self,
        engine: AttentionEngine,
        inputs: tuple[Tensor, Tensor, Tensor],
        custom: tuple[Tensor, ...],
        named: dict[str, Any],
        in_cache: bool,
        table: Any,
    ) -> Bound:
        """The program without lists and what it reads, after the checks of a call."""
        q, k, v = inputs
        if in_cache:
            engine._checks.check_shapes(q, k, v, Sequences(packed=False, page=1))
            # Checks of captured tensors ask for sizes alone: of keys as many as a sequence can have.
            dimension = 1 if engine.layout == "bshd" else 2
            pages = table.shape[1] if isinstance(table, Tensor) and table.ndim == 2 else k.shape[0]
            shape = [q.shape[0], *k.shape[1:-1]]
            shape[dimension] *= pages
            k, v = (x.new_empty(1).expand(*shape, x.shape[-1]) for x in (k, v))
        traced, tensors, numbers, _ = engine._bind(q, k, v, custom, named)
        if traced.program.listed is not None:
            raise refuse(self.name, "an argument of an engine with a block_mask", "given", "left out")
        return Bound(traced.program, {c.name: tensors[c.name] for c in traced.program.captures}, numbers)


def keys_of(
    engine: AttentionEngine,
    inputs: tuple[Tensor, Tensor, Tensor],
    scales: Mapping[str, Tensor],
    *,
    shared: bool = False,
) -> tuple[Tensor, Keys]:
    """q as (B, H, rows, D), and K and V, which are read once where v is the first columns of k: known to be (shared),
    or seen to be where nobody asks for the gradient of either. scales: of both, by the kernels' names, or none."""
    q, k, v = (engine._logical(x) for x in inputs)
    learned = torch.is_grad_enabled() and (k.requires_grad or v.requires_grad)
    of_both = tuple(scales.values())
    if shared or (values_in_keys(k, v, scales) and not learned):
        return q, Keys((k,), (), v.shape[3], of_both[:1])
    return q, Keys((k,), (v,), 0, of_both)


@dataclass(frozen=True, slots=True, eq=False)
class Bound:
    """A program without lists, its captured tensors and its numbers ("scale" among them); scales of K and V by the
    kernels' names, where they are float8."""

    program: Attention
    captured: dict[str, Tensor]
    numbers: dict[str, Any]
    scales: dict[str, Tensor] = field(default_factory=dict[str, Tensor])


def attend_over(
    engine: AttentionEngine,
    bound: Bound,
    lists: TokenLists,
    q: Tensor,
    keys: Keys,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """o (B, H, rows, D) and the row values (B, H, rows) of checked tensors; q is (B, H, rows, D).

    dtype: of the dense definition, None: with the engine's kernels.
    """
    program, captured = bound.program, bound.captured
    if keys.scales and torch.is_grad_enabled():
        tensors = {"q": q, **captured}
        for name in (n for n, x in tensors.items() if x.requires_grad):
            raise CacheNotDifferentiable(argument=name)
    if not packable(program.rule):
        raise UnsupportedOnBackend(
            backend=engine.backend,
            feature="lists of tokens with a normaliser that pools, or reads h or q_idx",
            instead="Ask for the head in score_mod, or pool weights in a call without lists.",
        )
    numbers = {**bound.numbers, HEADS_OF_LIST.name: lists.heads // lists.kv_heads}
    if dtype is not None or engine.backend == "reference":
        over = over_token_lists(program, ragged=True)
        o, rows = dense_tokens(over, lists, q, keys, captured, numbers, dtype or torch.float64)
        o = o if dtype is not None else o.to(q.dtype)
    else:
        name = backend_for(engine.backend, q.device.type)
        full, ragged = (_call_of(engine, over_token_lists(program, ragged=x), name) for x in (False, True))
        names, parts = tuple(captured), len(keys.keys)
        call = TokenCall(full, ragged, lists, numbers, names, parts, keys.dim_v, keys.scales)
        tensors = (*keys.keys, *keys.values)
        o, *rows = TokenAttention.apply(call, len(tensors), q, *tensors, *captured.values())
    return o, dict(zip(program.rule.row_outputs, rows, strict=True))


def _call_of(engine: AttentionEngine, program: Attention, name: str) -> Call:
    key = (program, f"{name}, tokens")
    found = engine._calls.get(key)
    if found is None:
        backend = backend_named(name)
        compiled = CompiledAttention(program, backend, engine._schedules.choose(program, backend).schedule)
        call = Call(compiled, "bhsd", _CheckedBefore())
        found = engine._calls[key] = call, register(call)
    return found[0]


class _CheckedBefore:
    """Calls with lists are in no graph, and are checked when they come."""

    def shapes(self, q: Tensor, k: Tensor, v: Tensor) -> None: ...
    def everything(self, q: Tensor, k: Tensor, v: Tensor, captured: Any, scalars: Any) -> None: ...

"""What `AttentionEngine.check` compares: a call of any kind, bound once, computed by kernels and by its definition."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attn_engine.block_calls import BlocksOfCall, blocks_given
from attn_engine.ir.ops import Number
from attn_engine.runtime.call import Call
from attn_engine.runtime.check import CheckReport, Inputs, Results, Ways, compare
from attn_engine.runtime.operator import apply
from attn_engine.runtime.reference import reference
from attn_engine.runtime.token_lists import TokenLists
from attn_engine.token_calls import Bound, attend_over, keys_of, tokens_given

if TYPE_CHECKING:
    from attn_engine.engine import AttentionEngine
    from attn_engine.traced_program import TracedProgram


def check_call(
    engine: AttentionEngine, inputs: Inputs, custom: tuple[Tensor, ...], named: dict[str, Any]
) -> CheckReport:
    """The report of one call, over all keys or over the blocks or the tokens that it gives."""
    device = inputs[0].device.type
    tokens = tokens_given(named, engine._checks.custom_shapes)
    if tokens is not None:
        bound, lists = tokens.bound(engine, inputs, custom, named)
        ways: Ways = _OverTokens(engine, bound, lists)
        call, _ = engine._call(engine._present, device)
        return compare(bound.program, call.compiled, ways, inputs, bound.captured)
    given = blocks_given(engine, named, None)
    traced, captured, numbers, _ = engine._bind(*inputs, custom, named)
    call, key = engine._call(traced, device)
    blocks = None if given is None else BlocksOfCall(engine, given)
    ways = _OverKeys(traced, call, key, numbers, blocks)
    return compare(traced.program, call.compiled, ways, inputs, captured)


@dataclass(frozen=True, slots=True, eq=False)
class _OverKeys:
    """All keys that the mask lets through, or those of them in given blocks."""

    traced: TracedProgram
    call: Call
    key: int
    numbers: Mapping[str, Number]
    blocks: BlocksOfCall | None

    def compiled(self, inputs: Inputs, captured: Mapping[str, Tensor]) -> tuple[Tensor, Results]:
        if self.blocks is None:
            o, rows = apply(self.call, self.key, *inputs, captured, self.numbers, with_rows=True)
        else:
            o, rows = self.blocks.attend(self.traced, inputs, captured, self.numbers, with_rows=True)
        names = self.traced.program.rule.row_outputs
        return self.call.logical(o), dict(zip(names, rows, strict=True))

    def dense(
        self, inputs: Inputs, captured: Mapping[str, Tensor], dtype: torch.dtype
    ) -> tuple[Tensor, Results]:
        program = self.traced.program
        q, k, v = (self.call.logical(x) for x in inputs)
        visible = None if self.blocks is None else self.blocks.visible(program, captured, q, k)
        return reference(program, q, k, v, captured, self.numbers, dtype, visible)


@dataclass(frozen=True, slots=True, eq=False)
class _OverTokens:
    """The keys that each query lists."""

    engine: AttentionEngine
    bound: Bound
    lists: TokenLists

    def compiled(self, inputs: Inputs, captured: Mapping[str, Tensor]) -> tuple[Tensor, Results]:
        return self._attend(inputs, captured, None)

    def dense(
        self, inputs: Inputs, captured: Mapping[str, Tensor], dtype: torch.dtype
    ) -> tuple[Tensor, Results]:
        return self._attend(inputs, captured, dtype)

    def _attend(
        self, inputs: Inputs, captured: Mapping[str, Tensor], dtype: torch.dtype | None
    ) -> tuple[Tensor, Results]:
        bound = replace(self.bound, captured=dict(captured))
        return attend_over(self.engine, bound, self.lists, *keys_of(self.engine, inputs, bound.scales), dtype)

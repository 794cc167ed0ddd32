"""The program that a case's call runs on: with the sequences and the blocks that it brings, and nothing run."""

from __future__ import annotations

from attn_engine.block_calls import blocks_given, extent_of, lists_of_call, packed_group
from attn_engine.gpu_check.cases import Case
from attn_engine.gpu_check.checks import engine_of, options_of
from attn_engine.gpu_check.given import draw
from attn_engine.ir.program import Attention


def program_of(case: Case) -> Attention:
    """As a call of these shapes makes it; numbers in the tensors do not matter."""
    given = draw(case, "cpu")
    tensors = {name: x.requires_grad_(name in case.learned) for name, x in given.tensors.items()}
    engine = engine_of(case, tensors, "torch")
    named = options_of(case, tensors, given.q.device)
    if not named:
        return engine.program
    q, k, v = (x[0] if case.lengths else x for x in (given.q, given.k, given.v))
    blocks = blocks_given(engine, named, None)
    traced, captured, _, _ = engine._bind(q, k, v, (), named)  # pyright: ignore[reportPrivateUsage]
    if blocks is None:
        return traced.program
    extent = extent_of(traced.program, captured, given.q, given.k)
    group = packed_group(traced.program, captured, extent)
    return traced.with_lists(lists_of_call(blocks, extent, group, given.q.device).blocks).program

"""Who is tested: this package's backends, and torch's own FlexAttention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Attend = Callable[..., Any]


@dataclass(frozen=True)
class Subject:
    """An implementation of FlexAttention's interface.

    attend: called as flex_attention, each call by itself. repeated: the same, many times in one process. in_graph: what
    a function calls that is compiled as a whole, by graph_backend. compilations: how many there have been.
    """

    name: str
    attend: Attend
    repeated: Attend
    in_graph: Attend
    graph_backend: str
    compilations: Callable[[], int]
    create_block_mask: Callable[..., Any]
    block_mask: Any
    aux_request: Callable[..., Any]
    masks: Any  # what holds and_masks, or_masks and noop_mask

    def mask(
        self, mask_mod: Any, batches: int | None, heads: int | None, *lengths: int, **options: Any
    ) -> Any:
        return self.create_block_mask(mask_mod, batches, heads, *lengths, device="cpu", **options)


def ours(backend: str = "auto") -> Subject:
    """attn_engine.flex_attention on one of its backends."""
    import attn_engine
    from attn_engine import flex
    from attn_engine.flex.programs import kernels_made

    def attend(*args: Any, kernel_options: dict[str, Any] | None = None, **kwargs: Any) -> Any:
        return flex.flex_attention(*args, kernel_options=kernel_options or {"BACKEND": backend}, **kwargs)

    return Subject(
        f"attn_engine, {backend}",
        attend=attend,
        repeated=attend,
        in_graph=attend,
        graph_backend="aot_eager",
        compilations=kernels_made,
        create_block_mask=flex.create_block_mask,
        block_mask=flex.BlockMask,
        aux_request=flex.AuxRequest,
        masks=attn_engine,
    )


def torch_flex(compiled: bool) -> Subject:
    """torch's flex_attention: compiled by inductor, as its documentation asks for, or its dense evaluation."""
    import torch.nn.attention.flex_attention as theirs

    def eager(*args: Any, **kwargs: Any) -> Any:
        before = theirs._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG
        theirs._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG = True
        try:
            return theirs.flex_attention(*args, **kwargs)
        finally:
            theirs._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG = before

    once = torch.compile(theirs.flex_attention, fullgraph=True)

    def attend(*args: Any, **kwargs: Any) -> Any:
        torch._dynamo.reset()  # each case as in a process of its own
        return once(*args, **kwargs)

    return Subject(
        "torch, compiled" if compiled else "torch, dense eager",
        attend=attend if compiled else eager,
        repeated=once if compiled else eager,
        in_graph=theirs.flex_attention,
        graph_backend="inductor",
        compilations=lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"],
        create_block_mask=theirs.create_block_mask,
        block_mask=theirs.BlockMask,
        aux_request=theirs.AuxRequest,
        masks=theirs,
    )


def close(got: Tensor, want: Tensor, rtol: float = 1e-5, atol: float = 1e-5) -> None:
    torch.testing.assert_close(got, want.to(got.dtype), rtol=rtol, atol=atol)

"""Who is tested: this package's backends, and torch's own FlexAttention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Subject:
    """An implementation of FlexAttention's interface.

    attend: called as flex_attention. gradients: whether it has a backward pass on this machine. factor: how much a
    backend may differ from eager torch beyond torch's own allowance, 1 for all that compute in the input's precision.
    """

    name: str
    attend: Callable[..., Any]
    create_block_mask: Callable[..., Any]
    block_mask: type
    aux_request: Callable[..., Any]
    gradients: bool = True
    compiled: Callable[[Callable[..., Any]], Callable[..., Any]] = field(default=lambda f: f)

    def mask(self, mask_mod: Any, batches: int | None, heads: int | None, *lengths: int, **options: Any) -> Any:
        return self.create_block_mask(mask_mod, batches, heads, *lengths, device="cpu", **options)


def ours(backend: str = "auto") -> Subject:
    """attn_engine.flex_attention on one of its backends."""
    from attn_engine import flex

    options = {"BACKEND": backend}

    def attend(*args: Any, kernel_options: dict[str, Any] | None = None, **kwargs: Any) -> Any:
        return flex.flex_attention(*args, kernel_options={**options, **(kernel_options or {})}, **kwargs)

    def compiled(fn: Callable[..., Any]) -> Callable[..., Any]:
        return torch.compile(fn, backend="aot_eager", fullgraph=True)

    return Subject(
        f"attn_engine, {backend}",
        attend,
        flex.create_block_mask,
        flex.BlockMask,
        flex.AuxRequest,
        compiled=compiled,
    )


def torch_flex(compile_calls: bool) -> Subject:
    """torch's flex_attention: compiled by inductor, as its documentation asks for, or its dense evaluation."""
    import torch.nn.attention.flex_attention as theirs

    def eager(*args: Any, **kwargs: Any) -> Any:
        before = theirs._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG
        theirs._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG = True
        try:
            return theirs.flex_attention(*args, **kwargs)
        finally:
            theirs._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG = before

    def attend(*args: Any, **kwargs: Any) -> Any:
        torch._dynamo.reset()  # each case as in a process of its own
        return torch.compile(theirs.flex_attention, fullgraph=True)(*args, **kwargs)

    def compiled(fn: Callable[..., Any]) -> Callable[..., Any]:
        return torch.compile(fn, fullgraph=True)

    return Subject(
        "torch, compiled" if compile_calls else "torch, dense eager",
        attend if compile_calls else eager,
        theirs.create_block_mask,
        theirs.BlockMask,
        theirs.AuxRequest,
        gradients=True,
        compiled=compiled,
    )


def close(got: Tensor, want: Tensor, rtol: float = 1e-5, atol: float = 1e-5) -> None:
    torch.testing.assert_close(got, want.to(got.dtype), rtol=rtol, atol=atol)

"""The contenders: attn_engine, and the other implementations of the same attention, each as a function of q, k, v.

`sdpa` is PyTorch's scaled_dot_product_attention, with a mask or bias tensor made beforehand where the pattern needs
one; `flex`, torch.compile of flex_attention, forward only because it has no backward on a CPU; `eager`, the formula in
plain PyTorch operators. None: that contender cannot compute the case.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from attn_engine import AttentionEngine, meta_tensor
from benchmarks.cases import Case
from benchmarks.measure import Contender, Run
from benchmarks.patterns import Pattern, causal, pattern
from benchmarks.variants import VARIANTS, Variant

BATCH = 1
Attention = Callable[..., Any]
# Beyond these a contender takes minutes, or more memory than a small machine has.
LONGEST = {"eager": 4096, "flex": 8192, "sdpa": 8192}


def dtype_of(case: Case) -> torch.dtype:
    return getattr(torch, case.dtype)


def ours(case: Case, p: Pattern, variant: Variant | None = None) -> Attention:
    metas = (meta_tensor(None, None, None, case.dim, dtype=dtype_of(case)),) * 3
    online_func = None if variant is None else variant.online_func
    return AttentionEngine(
        metas,
        p.score_mod,
        online_func=online_func,
        mask_mod=p.mask_mod,
        layout="bhsd",
        scale=case.dim**-0.5,
    )


def indices(case: Case) -> tuple[Tensor, ...]:
    """b, h, q_idx, kv_idx, so shaped that they broadcast to all pairs."""
    sizes = (BATCH, case.heads, case.queries, case.keys)
    return tuple(
        torch.arange(n).reshape([-1 if i == j else 1 for j in range(4)]) for i, n in enumerate(sizes)
    )


def sdpa(case: Case, p: Pattern) -> Attention | None:
    if p.sdpa == "cannot" or (p.sdpa in ("mask", "bias") and case.keys > LONGEST["sdpa"]):
        return None
    options: dict[str, Any] = {"enable_gqa": True} if case.heads != case.kv_heads else {}
    if p.sdpa == "is_causal":
        options["is_causal"] = True
    elif p.mask_mod is not None:
        index = indices(case)
        mask: Tensor = p.mask_mod(*index)
        if p.score_mod is not None:
            bias: Tensor = p.score_mod(torch.zeros(1, 1, case.queries, case.keys), *index)
            mask = bias.masked_fill(~mask, -math.inf).to(dtype_of(case))
        options["attn_mask"] = mask
    return functools.partial(F.scaled_dot_product_attention, **options)


def flex(case: Case, p: Pattern) -> Attention | None:
    if case.direction != "forward" or case.keys > LONGEST["flex"]:
        return None
    torch.compiler.reset()
    sizes = (case.queries, case.keys)
    block_mask = create_block_mask(p.mask_mod, None, None, *sizes, device="cpu") if p.mask_mod else None
    return functools.partial(torch.compile(flex_attention), score_mod=p.score_mod, block_mask=block_mask)


def eager(case: Case, p: Pattern) -> Attention | None:
    if case.keys > LONGEST["eager"]:
        return None
    index = indices(case)
    mask = None if p.mask_mod is None else ~p.mask_mod(*index)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        score = (q @ k.transpose(-1, -2)).float() * case.dim**-0.5
        score = score if p.score_mod is None else p.score_mod(score, *index)
        score = score if mask is None else score.masked_fill(mask, -math.inf)
        return torch.softmax(score, -1).to(v.dtype) @ v

    return attention


def tensors(case: Case) -> list[Tensor]:
    """q, k, v and the output's gradient, each (batch, heads, length, dim)."""
    shapes = (
        (case.heads, case.queries),
        (case.kv_heads, case.keys),
        (case.kv_heads, case.keys),
        (case.heads, case.queries),
    )
    return [torch.randn(BATCH, *shape, case.dim).to(dtype_of(case)) for shape in shapes]


def call(function: Attention, case: Case, qkvd: Sequence[Tensor], learned: Sequence[Tensor] = ()) -> Run:
    """One call in the case's direction; backward is the gradient alone, on a graph that is kept."""
    *qkv, d_out = qkvd

    def forward() -> object:
        with torch.no_grad():
            return function(*qkv)

    def leaves() -> list[Tensor]:
        return [t.detach().requires_grad_() for t in qkv]

    def both() -> object:
        inputs = leaves()
        return torch.autograd.grad(function(*inputs), [*inputs, *learned], d_out)

    if case.direction == "forward":
        return forward
    if case.direction == "forward+backward":
        return both
    inputs = leaves()
    out = function(*inputs)
    return lambda: torch.autograd.grad(out, [*inputs, *learned], d_out, retain_graph=True)


def against_others(case: Case, with_flex: bool) -> dict[str, Contender]:
    """The parts table, decode, small and sweep: ours, and whoever else can."""
    p = pattern(case.pattern, case.keys)
    makers: dict[str, Callable[[Case, Pattern], Attention | None]] = {"ours": ours, "sdpa": sdpa}
    if case.part in ("table", "sweep"):
        makers["eager"] = eager
        if with_flex:
            makers["flex"] = flex
    qkvd = tensors(case)
    functions = {name: make(case, p) for name, make in makers.items()}
    return {name: Contender(call(f, case, qkvd)) for name, f in functions.items() if f is not None}


def against_softmax(case: Case) -> dict[str, Contender]:
    """The part mods: a variant, over our own softmax under the same causal mask."""
    variant = VARIANTS[case.pattern](case.keys, case.heads)
    qkvd = tensors(case)
    plain = ours(case, Pattern(mask_mod=causal))
    varied = ours(case, Pattern(variant.score_mod, causal), variant)
    return {
        "softmax": Contender(call(plain, case, qkvd)),
        "ours": Contender(call(varied, case, qkvd, variant.learned)),
    }


def against_one_thread(case: Case, most: int) -> dict[str, Contender]:
    """The part threads: one thread's time over that of all."""
    run = call(ours(case, pattern(case.pattern, case.keys)), case, tensors(case))
    return {
        "ours": Contender(run, functools.partial(torch.set_num_threads, most)),
        "one thread": Contender(run, functools.partial(torch.set_num_threads, 1)),
    }

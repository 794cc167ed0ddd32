"""Who computes the same attention on a GPU: attn_engine's backends, PyTorch's SDPA and flex_attention, and libraries
that may be installed. Each is a function of q, k, v, all (batch, heads, length, dim); Cannot says why there is none.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from attn_engine import AttentionEngine, meta_tensor
from benchmarks.gpu_cases import CAP, NORMALISERS, WINDOW, Attention, GpuCase

Function = Callable[[Tensor, Tensor, Tensor], Tensor]
Maker = Callable[[GpuCase, Attention, str], Function]
# A mask or a bias of all pairs is made up to here, and a formula of dense operators is tried.
LONGEST_DENSE = {"mask": 8192, "formula": 4096}
MOST_BIASES = 2**31


class Cannot(Exception):
    """A contender that does not compute this case, or is not installed; the message says why."""


def ours(backend: str) -> Maker:
    def make(case: GpuCase, a: Attention, device: str) -> Function:
        metas = (meta_tensor(None, None, None, case.dim, dtype=getattr(torch, case.dtype)),) * 3
        rule = NORMALISERS[a.normaliser]() if a.normaliser != "softmax" else None
        mask_mod = a.mask_mod if a.sparse is None or a.sparse.ours is None else a.sparse.ours
        engine = AttentionEngine(
            metas, a.score_mod, online_func=rule, mask_mod=mask_mod, layout="bhsd",
            backend=backend, scale=case.dim**-0.5,
        )  # fmt: skip
        if a.sparse is None or not a.sparse.options:
            return engine
        options = a.sparse.options
        if a.sparse.lengths:
            return lambda q, k, v: engine(q[0], k[0], v[0], **options)[None]
        return functools.partial(engine, **options)

    return make


def _only_softmax(a: Attention) -> None:
    if a.normaliser != "softmax":
        raise Cannot("it knows softmax only")


def _no_blocks(case: GpuCase, a: Attention) -> None:
    if a.sparse is not None and not a.sparse.lengths:
        raise Cannot("it takes no such mask")


def sdpa(backend: SDPBackend) -> Maker:
    """One of SDPA's kernels, with a mask or bias of all pairs where the pattern needs one."""

    def make(case: GpuCase, a: Attention, device: str) -> Function:
        _only_softmax(a)
        options: dict[str, Any] = {}
        if case.pattern == "causal":
            options["is_causal"] = True
        elif case.pattern == "soft-cap":
            raise Cannot("it has no soft-cap")
        elif case.pattern != "full":
            if backend is SDPBackend.FLASH_ATTENTION:
                raise Cannot("it takes no mask")
            options["attn_mask"] = _bias(case, a, device)
        grouped = case.heads != case.kv_heads
        repeats = (
            grouped and backend is SDPBackend.EFFICIENT_ATTENTION
        )  # it has no grouped heads: they are copied

        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if repeats:
                k, v = (x.repeat_interleave(case.heads // case.kv_heads, 1) for x in (k, v))
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, **options, enable_gqa=grouped and not repeats)

        return run

    return make


def _bias(case: GpuCase, a: Attention, device: str) -> Tensor:
    """The mask, or the score function's addition with -inf where the mask hides. (1, H or 1, S, S)"""
    if case.length > LONGEST_DENSE["mask"]:
        raise Cannot("a mask of all pairs would be too large")
    b, h, q_idx, kv_idx = _indices(case, device)
    assert a.mask_mod is not None
    mask: Tensor = a.mask_mod(b, h, q_idx, kv_idx)
    if a.score_mod is None:
        if mask.shape[1] * case.length**2 > MOST_BIASES:
            raise Cannot("a mask of all pairs and heads would be too large")
        return mask.expand(1, -1, case.length, case.length)
    if case.heads * case.length**2 > MOST_BIASES:
        raise Cannot("a bias of all pairs and heads would be too large")
    zero = torch.zeros(1, 1, case.length, case.length, device=device)
    bias: Tensor = a.score_mod(zero, b, h, q_idx, kv_idx)
    return bias.masked_fill(~mask, -math.inf).to(getattr(torch, case.dtype))


def _indices(case: GpuCase, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def along(n: int, dimension: int) -> Tensor:
        return torch.arange(n, device=device).reshape([-1 if dimension == i else 1 for i in range(4)])

    return along(1, 0), along(case.heads, 1), along(case.length, 2), along(case.length, 3)


def flex(mode: str | None) -> Maker:
    """torch.compile of flex_attention."""

    def make(case: GpuCase, a: Attention, device: str) -> Function:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        _only_softmax(a)
        lengths = (case.length, case.length)
        block_mask = (
            create_block_mask(a.mask_mod, None, None, *lengths, device=device) if a.mask_mod else None
        )
        compiled: Any = torch.compile(flex_attention, dynamic=False, mode=mode)
        return functools.partial(
            compiled,
            score_mod=a.score_mod,
            block_mask=block_mask,
            enable_gqa=case.heads != case.kv_heads,
        )

    return make


def module_named(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except Exception as error:  # a library that is there and does not load is as good as missing
        raise Cannot(f"{name} is not installed ({type(error).__name__})") from error


def flash(module: str) -> Maker:
    """flash-attn (FA2), or FA3's flash_attn_interface; documents are packed one after the other."""

    def make(case: GpuCase, a: Attention, device: str) -> Function:
        library = module_named(module)
        _only_softmax(a)
        _no_blocks(case, a)
        options: dict[str, Any] = {"causal": case.pattern != "full"}
        if case.pattern == "window 1024":
            options["window_size"] = (WINDOW - 1, 0)
        elif case.pattern == "soft-cap":
            options["softcap"] = CAP
        elif case.pattern == "alibi":
            if module == "flash_attn_interface":
                raise Cannot("it has no slopes")
            options["alibi_slopes"] = a.slopes
        if case.pattern in ("causal documents", "packed"):
            return _packed(library.flash_attn_varlen_func, case, a, device)

        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = library.flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), **options)
            return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

        return run

    return make


def ends_of_documents(a: Attention) -> Tensor:
    """Where documents begin and the last one ends, int32."""
    if a.sparse is not None:
        return a.sparse.options["cu_len_q"]
    counts = torch.bincount(a.document)
    return F.pad(counts[counts > 0].cumsum(0), (1, 0)).int()


def _packed(attend: Any, case: GpuCase, a: Attention, device: str) -> Function:
    """Documents one after the other, every sequence of the batch with its own."""
    ends = ends_of_documents(a)
    longest = int(ends.diff().max())
    starts = torch.arange(case.batches, device=ends.device)[:, None] * case.length + ends[:-1]
    ends = F.pad(starts.flatten(), (0, 1), value=case.batches * case.length).int()

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        packed = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
        out = attend(
            *packed, cu_seqlens_q=ends, cu_seqlens_k=ends,
            max_seqlen_q=longest, max_seqlen_k=longest, causal=True,
        )  # fmt: skip
        out = out[0] if isinstance(out, tuple) else out
        return out.unflatten(0, (case.batches, case.length)).transpose(1, 2)

    return run


def flashinfer(case: GpuCase, a: Attention, device: str) -> Function:
    library = module_named("flashinfer")
    _only_softmax(a)
    if case.batches != 1:
        raise Cannot("one sequence at a time only")
    if case.pattern in ("causal documents", "alibi") or a.sparse is not None:
        raise Cannot("not with this pattern in one call")
    options: dict[str, Any] = {"causal": case.pattern != "full"}
    if case.pattern == "window 1024":
        options["window_left"] = WINDOW - 1
    if case.pattern == "soft-cap":
        options["logits_soft_cap"] = CAP

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.requires_grad:
            raise Cannot("forward only")
        heads_inside = (x[0].transpose(0, 1).contiguous() for x in (q, k, v))
        return library.single_prefill_with_kv_cache(*heads_inside, **options).transpose(0, 1)[None]

    return run


def fla(case: GpuCase, a: Attention, device: str) -> Function:
    """flash-linear-attention's softmax attention; its retention has another normaliser."""
    library = module_named("fla.ops.attn.parallel")
    _only_softmax(a)
    if case.pattern not in ("causal", "causal documents") or case.batches != 1:
        raise Cannot("causal attention of one sequence only")
    ends = ends_of_documents(a).long() if case.pattern == "causal documents" else None

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        inside = (x.transpose(1, 2).contiguous() for x in (q, k, v))
        return library.parallel_attn(*inside, scale=case.dim**-0.5, cu_seqlens=ends).transpose(1, 2)

    return run


def dense(case: GpuCase, a: Attention, device: str) -> Function:
    """The formula in PyTorch operators, compiled on a GPU: the only other one with other normalisers."""
    if a.normaliser == "softmax":
        raise Cannot("only where nobody else has the normaliser")
    if case.length > LONGEST_DENSE["formula"]:
        raise Cannot("scores of all pairs would be too large")
    index = _indices(case, device)

    def formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(case.heads // case.kv_heads, 1) for x in (k, v))
        score = (q @ k.mT).float() * case.dim**-0.5
        weights = FORMULAS[a.normaliser](score, True if a.mask_mod is None else a.mask_mod(*index))
        return weights.to(v.dtype) @ v

    return torch.compile(formula, dynamic=False) if device == "cuda" else formula


def _retention(score: Tensor, visible: Any) -> Tensor:
    score = score * visible
    return score / score.abs().sum(-1, keepdim=True).clamp(min=1.0)


FORMULAS: Mapping[str, Callable[[Tensor, Any], Tensor]] = {
    "sigmoid": lambda score, visible: torch.sigmoid(score) * visible,
    "relu": lambda score, visible: torch.relu(score) * visible,
    "retention": _retention,
}


FLEX = ("flex", "flex, max-autotune")
OURS: Mapping[str, Maker] = {"ours, triton": ours("triton"), "ours, tilelang": ours("tilelang")}
PEERS: Mapping[str, Maker] = {
    "SDPA, flash": sdpa(SDPBackend.FLASH_ATTENTION),
    "SDPA, cuDNN": sdpa(SDPBackend.CUDNN_ATTENTION),
    "SDPA, efficient": sdpa(SDPBackend.EFFICIENT_ATTENTION),
    "flex": flex(None),
    "flex, max-autotune": flex("max-autotune-no-cudagraphs"),
    "flash-attn": flash("flash_attn"),
    "FA3": flash("flash_attn_interface"),
    "FlashInfer": flashinfer,
    "fla": fla,
    "dense": dense,
}


def tensors(case: GpuCase, device: str) -> list[Tensor]:
    """q, k, v and the output's gradient."""
    generator = torch.Generator(device).manual_seed(0)
    counts = (case.heads, case.kv_heads, case.kv_heads, case.heads)
    return [
        torch.randn(
            case.batches, n, case.length, case.dim, device=device,
            dtype=getattr(torch, case.dtype), generator=generator,
        )
        for n in counts
    ]  # fmt: skip

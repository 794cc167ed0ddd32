"""The loss that trains an indexer to tell which tokens the attention looks at (DeepSeek-V3.2, arXiv:2512.02556,
section 2.1).

    I[t, u] = sum_j weights[t, j] * relu(index_scale * index_q[t, j] . index_k[u])
    p[t, u] = mean over heads of softmax_u(sm_scale * q[t, h] . k[u])
    loss[t] = sum_u p[t, u] * (log p[t, u] - log softmax_u(I[t])[u])

u runs over the keys in sight (warm-up), or over those that were chosen for t (sparse stage). p is a target: q and k get
no gradient. That of I is softmax(I) - p, all others follow from it, and a scalar loss makes them beside itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from attn_engine.errors import WrongArgument
from attn_engine.library.arguments import divisible, scale_of
from attn_engine.library.tokens.arguments import refuse_shape, shaped
from attn_engine.library.tokens.indexer_rows import ChosenRows, Indexer, RowsInSight, Targets
from attn_engine.runtime.token_checks import checked_lists

REDUCTIONS = ("mean", "sum", "none")


def indexer_loss(
    q: Tensor,
    k: Tensor,
    index_q: Tensor,
    index_k: Tensor,
    weights: Tensor,
    indices: Tensor | None = None,
    *,
    sm_scale: float | None = None,
    index_scale: float | None = None,
    topk_length: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """The loss, float32 (float64 for float64): its mean or sum over queries that see a key, or all, (B, S).

    q: (B, S, H, D). k: (B, L, Hkv, D), H a multiple of Hkv. index_q: (B, S, HI, DI). index_k: (B, L, DI) or
    (B, L, 1, DI). weights: (B, S, HI), any factor (HI^-0.5, say) in them.
    indices: None, the warm-up: query i sees keys up to L - S + i. Or int32, int64 (B, S, k) or (B, S, 1, k): positions
    of the chosen keys; -1 or any number outside of the keys counts for nothing, topk_length (B, S) as for
    `sparse_attention`, and causality is in them. sm_scale: None is D^-0.5; index_scale: None is DI^-0.5.

    Gradients of index_q, index_k and weights, added up in a fixed order. Memory beside them: some rows of scores at a
    time, 2^22 numbers of each kind, never S x L. A query that sees no key has loss 0.
    Raises WrongArgument and WrongTokens.
    """
    for name, x, layout in (
        ("q", q, "(batch, queries, heads, dim)"),
        ("k", k, "(batch, keys, kv heads, dim)"),
    ):
        shaped(name, x, layout)
    divisible(q.shape[2], k.shape[2])
    if k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
        refuse_shape("k", k, f"({q.shape[0]}, keys, kv heads, {q.shape[3]})")
    keys = index_k.unsqueeze(2) if isinstance(index_k, Tensor) and index_k.ndim == 3 else index_k
    _check_indexer(q, k, index_q, keys, weights)
    if reduction not in REDUCTIONS:
        known = " or ".join(map(repr, REDUCTIONS))
        raise WrongArgument(
            argument="reduction", got=reduction, expected=known, instead='Leave it out for "mean".'
        )
    scales = (
        scale_of("sm_scale", sm_scale, q.shape[3]),
        scale_of("index_scale", index_scale, index_q.shape[3]),
    )
    if indices is None:
        if topk_length is not None:
            expected, instead = "left out without indices", "The warm-up is over all keys in sight."
            raise WrongArgument(argument="topk_length", got="given", expected=expected, instead=instead)
        targets: Targets = RowsInSight(q.detach(), k.detach(), scales[0])
    else:
        called = {"token_indices": "indices", "token_counts": "topk_length"}
        views = q.detach().transpose(1, 2), k.detach().transpose(1, 2)
        if isinstance(indices, Tensor) and indices.ndim == 4 and indices.shape[2] != 1:
            refuse_shape("indices", indices, f"({q.shape[0]}, {q.shape[1]}, 1, k): all heads share a list")
        lists = checked_lists("token_indices", indices, topk_length, *views, called=called)
        targets = ChosenRows(views[0], views[1], lists, scales[0])
    return _IndexerLoss.apply(targets, reduction, scales[1], index_q, keys, weights)


def _check_indexer(q: Tensor, k: Tensor, index_q: Tensor, index_k: Tensor, weights: Tensor) -> None:
    shaped("index_q", index_q, "(batch, queries, index heads, index dim)")
    shaped("index_k", index_k, "(batch, keys, 1, index dim)")
    shaped("weights", weights, "(batch, queries, index heads)")
    heads, dim = index_q.shape[2:]
    wanted = {
        "index_q": (index_q, (*q.shape[:2], heads, dim)),
        "index_k": (index_k, (*k.shape[:2], 1, dim)),
        "weights": (weights, (*q.shape[:2], heads)),
    }
    for name, (x, shape) in wanted.items():
        if tuple(x.shape) != shape:
            refuse_shape(name, x, str(shape))


class _IndexerLoss(torch.autograd.Function):
    """The loss of (targets, reduction, index_scale, index_q, index_k, weights)."""

    @staticmethod
    def forward(
        ctx: Any,
        targets: Targets,
        reduction: str,
        scale: float,
        index_q: Tensor,
        index_k: Tensor,
        weights: Tensor,
    ):
        ctx.targets, ctx.reduction, ctx.scale = targets, reduction, scale
        indexer = Indexer(index_q, index_k, weights, scale)
        if reduction == "none":
            ctx.save_for_backward(index_q, index_k, weights)
            return targets.losses(indexer, None)
        seen = targets.seen().to(indexer.compute)
        total = seen.sum().clamp(min=1) if reduction == "mean" else seen.new_ones(())
        losses = targets.losses(indexer, seen / total if any(ctx.needs_input_grad) else None)
        ctx.save_for_backward(*indexer.gradients())
        return losses.sum() / total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, arriving: Tensor):
        if ctx.reduction == "none":
            index_q, index_k, weights = ctx.saved_tensors
            indexer = Indexer(index_q, index_k, weights, ctx.scale)
            ctx.targets.losses(indexer, arriving)
            return None, None, None, *indexer.gradients()
        return None, None, None, *(g * arriving.to(g.dtype) for g in ctx.saved_tensors)

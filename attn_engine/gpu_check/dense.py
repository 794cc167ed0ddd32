"""The formulas of a case evaluated densely, some query rows at a time: in float64, or as plain torch code would."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from attn_engine.gpu_check.cases import NORMALISERS, Case, Tensors
from attn_engine.gpu_check.given import Given
from attn_engine.gpu_check.sparse import places, visible_blocks

BYTES_OF_SCORES = 2**28


@dataclass(frozen=True, slots=True)
class Precision:
    """What is computed in, and to what the operands and results of matrix products are rounded (None: not)."""

    between: torch.dtype
    rounded: torch.dtype | None = None


EXACT = Precision(torch.float64)


def straightforward(dtype: torch.dtype) -> Precision:
    """As plain PyTorch code computes in `dtype`: products rounded to it, everything between them in float32."""
    if dtype in (torch.float64, torch.float32):
        return Precision(dtype)
    return Precision(torch.float32, dtype)


def dense(case: Case, given: Given, precision: Precision, kept: Tensor | None = None) -> dict[str, Tensor]:
    """o, lse (of softmax) and the gradients dq, dk, dv and of learned tensors; o, lse, dq of the rows `kept` alone.

    The sums over query rows that gradients of keys need are not rounded on the way, as in one product over all rows.
    """
    dtype = precision.between
    k, v = (x.detach().to(dtype).requires_grad_(case.gradients) for x in (given.k, given.v))
    tensors = {
        name: x.detach().to(dtype).requires_grad_(case.gradients and name in case.learned)
        if x.is_floating_point()
        else x
        for name, x in given.tensors.items()
    }
    summed = {"dk": k, "dv": v, **{f"d {name}": tensors[name] for name in case.learned}}
    totals = {name: torch.zeros_like(x) for name, x in summed.items()}
    pieces: dict[str, list[Tensor]] = {}
    for rows in _stretches(case):
        q = given.q[:, :, rows.start : rows.stop].detach().to(dtype).requires_grad_(case.gradients)
        o, lse = _some_rows(case, q, k, v, tensors, rows, precision)
        results = {"o": o.detach()} | ({} if lse is None else {"lse": lse.detach()})
        if case.gradients:
            weight = given.d_out[:, :, rows.start : rows.stop].to(dtype)
            outputs, weights = [o], [weight]
            if lse is not None and precision.rounded is not None:
                outputs, weights = [o, lse], [weight, _lost_in_output(o, weight, precision.rounded)]
            results["dq"], *others = torch.autograd.grad(outputs, [q, *summed.values()], weights)
            for name, x in zip(summed, others, strict=True):
                totals[name] += x
        for name, x in results.items():
            pieces.setdefault(name, []).append(_of_kept(x, rows, kept))
    found = {name: torch.cat(parts, 2) for name, parts in pieces.items()}
    if case.gradients:
        found |= {name: x.detach() for name, x in totals.items()}
    return {name: _as_result(name, x, precision) for name, x in found.items()}


def _lost_in_output(o: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """What the softmax's backward pass misses when it reads the output as a call returns it, in `dtype`.

    Its term sum(dO * o) of a row is multiplied with the row's weights, and these are the gradient of lse.
    """
    return ((o - o.to(dtype).to(o.dtype)) * weight).sum(-1).detach()


def kept_rows(case: Case, device: str) -> Tensor | None:
    """Where only some rows are compared: the first, the last and some between."""
    if not case.sampled:
        return None
    length = case.sizes.q_len
    some = torch.randint(length, (64,), generator=torch.Generator().manual_seed(1))
    ends = torch.cat([torch.arange(min(length, 8)), torch.arange(max(0, length - 8), length)])
    return torch.cat([some, ends]).unique().to(device)


def _stretches(case: Case) -> Iterator[range]:
    s = case.sizes
    step = max(1, BYTES_OF_SCORES // (8 * s.batches * s.heads * s.kv_len))
    for start in range(0, s.q_len, step):
        yield range(start, min(start + step, s.q_len))


def _of_kept(x: Tensor, rows: range, kept: Tensor | None) -> Tensor:
    if kept is None:
        return x
    return x[:, :, kept[(kept >= rows.start) & (kept < rows.stop)] - rows.start]


def _as_result(name: str, x: Tensor, precision: Precision) -> Tensor:
    """In the type that a call returns: rows and gradients of captured tensors are not in that of q."""
    if precision.rounded is None or name == "lse" or name.startswith("d "):
        return x
    return x.to(precision.rounded)


def _some_rows(
    case: Case, q: Tensor, k: Tensor, v: Tensor, tensors: Tensors, rows: range, precision: Precision
) -> tuple[Tensor, Tensor | None]:
    """o (B, H, rows, Dv), and lse (B, H, rows) of softmax."""
    batches, heads, count, _ = q.shape
    key, value = (x[:, :, None] for x in (k, v))  # (B, Hkv, 1, Skv, D)

    def grouped(x: Tensor) -> Tensor:
        return x.reshape(batches, k.shape[1], heads // k.shape[1], count, x.shape[-1])

    score = rounded(grouped(q) @ key.mT, precision.rounded).reshape(batches, heads, count, k.shape[2])
    index, there = _pairs(case, tensors, score, rows)
    score = score * case.scale
    if (score_mod := case.score_mod(tensors)) is not None:
        score = score_mod(score, *index)
    mask_mod = case.mask_mod(tensors)
    visible = there if mask_mod is None else there & mask_mod(*index)
    visible = visible.expand(score.shape)
    weights = rounded(NORMALISERS[case.normaliser][1](score, visible), precision.rounded)
    o = (grouped(weights) @ value).reshape(batches, heads, count, v.shape[3])
    if case.normaliser != "softmax":
        return o, None
    return o, _log_sum(score, visible)


def _log_sum(score: Tensor, visible: Tensor) -> Tensor:
    """-inf in a row that sees nothing, with no gradient there."""
    some = visible.any(-1, keepdim=True)
    hidden = score.masked_fill(~visible, -torch.inf).masked_fill(~some, 0.0)
    return torch.logsumexp(hidden, -1).masked_fill(~some[..., 0], -torch.inf)


def rounded(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    """x as `dtype` can hold it, and so the gradient that comes back."""
    return x if dtype is None else x.to(dtype).to(x.dtype)


def _pairs(case: Case, tensors: Tensors, score: Tensor, rows: range) -> tuple[tuple[Tensor, ...], Tensor]:
    """The indices of a mask_mod, and which pairs the call leaves: those of one sequence, in a visible block."""
    index = _indices(score, rows)
    there = torch.ones((), dtype=torch.bool, device=score.device)
    if case.lengths:
        sequence, position = places(case.lengths, score.device)
        own = slice(rows.start, rows.stop)
        b, q_idx = (x[own].view(1, 1, -1, 1) for x in (sequence, position))
        there = b == sequence
        index = b, index[1], q_idx, position.view(1, 1, 1, -1)
    if case.blocks:
        b, _, q_idx, kv_idx = index
        there = there & visible_blocks(case.blocks, tensors["blocks"], case.sizes.heads, b, q_idx, kv_idx)
    return index, there


def _indices(score: Tensor, rows: range) -> tuple[Tensor, ...]:
    """b, h, q_idx, kv_idx, so shaped that they broadcast to the scores."""
    starts = (0, 0, rows.start, 0)
    return tuple(
        torch.arange(start, start + n, device=score.device).reshape([-1 if i == j else 1 for j in range(4)])
        for i, (start, n) in enumerate(zip(starts, score.shape, strict=True))
    )


def of_rows(found: Mapping[str, Tensor], kept: Tensor | None) -> dict[str, Tensor]:
    """A call's results, of the rows that are compared."""
    if kept is None:
        return dict(found)
    return {name: x[:, :, kept] if name in ("o", "dq", "lse") else x for name, x in found.items()}

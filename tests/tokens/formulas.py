"""Attention over lists of tokens, written from the formulas in float64: one query after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

OUTSIDE = (-(2**31), -123456, -1, 2**31 - 1)  # no positions of keys, whatever there is


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    scale: float,
    *,
    limits: Any = None,
    counts: Any = None,
    logit: Callable[..., Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """o (B, S, H, Dv) and lse (B, H, S); keys that no list names are never touched.

    limits, counts: [b, s] -> keys there are, entries that count. logit: (scores (H, n), b, s, tokens) -> scores.
    """
    batches, rows, heads, _ = q.shape
    group = heads // k.shape[2]
    out, lse = [], []
    for b in range(batches):
        for s in range(rows):
            limit = k.shape[1] if limits is None else int(limits[b][s])
            for head in range(heads):
                of_list = indices[b, s, head // (heads // indices.shape[2])].tolist()
                of_list = of_list if counts is None else of_list[: int(counts[b][s])]
                tokens = [u for u in of_list if 0 <= u < limit]
                if not tokens:
                    out.append(q.new_zeros(v.shape[3], dtype=torch.float64))
                    lse.append(q.new_full((), float("-inf"), dtype=torch.float64))
                    continue
                keys, values = (x[b, tokens, head // group].double() for x in (k, v))
                score = keys @ q[b, s, head].double() * scale
                if logit is not None:
                    score = logit(score, b, head, s, torch.tensor(tokens))
                lse.append(score.logsumexp(0))
                out.append(score.softmax(0).nan_to_num(0.0) @ values)
    o = torch.stack(out).view(batches, rows, heads, -1)
    return o, torch.stack(lse).view(batches, rows, heads).transpose(1, 2)


def drawn(batches: int, rows: int, lists: int, keys: int, topk: int, *, ragged: bool) -> Tensor:
    """Lists of different tokens, int64; ragged: some entries are none, anywhere, and one list holds none at all."""
    every = [torch.randperm(keys)[:topk] for _ in range(batches * rows * lists)]
    found = torch.stack(every).view(batches, rows, lists, -1)
    if ragged:
        none = torch.tensor([*OUTSIDE, keys])[torch.randint(len(OUTSIDE) + 1, found.shape)]
        found = torch.where(torch.rand(found.shape) < 0.4, none, found)
        found[-1, -1] = -1
    return found

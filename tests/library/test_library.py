"""The library's masks and scores against their formulas, element by element."""

from __future__ import annotations

import math

import pytest
import torch

from attn_engine.frontend import trace_mask_mod, trace_score_mod
from attn_engine.ir.evaluate import evaluate
from attn_engine.ir.program import BATCH, HEAD, KV_IDX, Q_IDX, SCORE
from attn_engine.library import (
    alibi,
    and_masks,
    causal,
    document,
    not_mask,
    or_masks,
    pair_bias,
    prefix,
    relative_bias,
    sliding_window,
    soft_cap,
)  # fmt: skip

IDS = torch.tensor([0, 0, 1, 1, 1, 2, 2, 3])
BATCHED = torch.stack([IDS, IDS.flip(0)])
SLOPES, RELATIVE = torch.rand(3), torch.rand(3, 7)
PAIRS, HEAD_PAIRS = torch.rand(8, 8), torch.rand(3, 8, 8)

MASKS = {
    "causal": (causal(), lambda b, h, q, k: k <= q),
    "shifted": (causal(2), lambda b, h, q, k: k <= q + 2),
    "window": (sliding_window(3), lambda b, h, q, k: 0 <= q - k <= 3),
    "prefix": (prefix(4), lambda b, h, q, k: k < 4 or k <= q),
    "document": (document(IDS), lambda b, h, q, k: IDS[q] == IDS[k]),
    "batched": (document(BATCHED), lambda b, h, q, k: BATCHED[b, q] == BATCHED[b, k]),
    "and": (and_masks(causal(), document(IDS)), lambda b, h, q, k: k <= q and IDS[q] == IDS[k]),
    "or": (or_masks(causal(), prefix(5)), lambda b, h, q, k: k <= q or k < 5),
    "not": (not_mask(causal()), lambda b, h, q, k: k > q),
}
SCORES = {
    "alibi": (alibi(SLOPES), lambda s, b, h, q, k: s - float(SLOPES[h]) * (q - k)),
    "soft_cap": (soft_cap(5.0), lambda s, b, h, q, k: 5 * math.tanh(s / 5)),
    "relative": (
        relative_bias(RELATIVE), lambda s, b, h, q, k: s + float(RELATIVE[h, min(max(k - q, -3), 3) + 3]),
    ),
    "pair": (pair_bias(PAIRS), lambda s, b, h, q, k: s + float(PAIRS[q, k])),
    "head_pair": (pair_bias(HEAD_PAIRS), lambda s, b, h, q, k: s + float(HEAD_PAIRS[h, q, k])),
}  # fmt: skip


def value(trace, score, *where):
    tensors = {t.name: t.accessor() for t in trace.tensors}
    env = dict(zip((SCORE, BATCH, HEAD, Q_IDX, KV_IDX), (score, *where), strict=True))
    env |= {s.var: s.accessor() for s in trace.scalars}
    return evaluate(trace.fn.result, env, lambda name, i: tensors[name][i].item())


def points():
    return [(b, h, q, k) for b in range(2) for h in range(3) for q in range(8) for k in range(8)]


@pytest.mark.parametrize("name", MASKS)
def test_mask(name):
    mask, formula = MASKS[name]
    trace = trace_mask_mod(mask)
    assert not trace.opaque and not trace.stale()
    for where in points():
        assert bool(value(trace, 0.0, *where)) == bool(formula(*where)), where


@pytest.mark.parametrize("name", SCORES)
def test_score(name):
    score_mod, formula = SCORES[name]
    trace = trace_score_mod(score_mod)
    assert not trace.opaque and not trace.stale()
    for n, where in enumerate(points()):
        score = 0.1 * n - 9
        assert math.isclose(
            value(trace, score, *where), formula(score, *where), rel_tol=1e-6, abs_tol=1e-7
        ), where

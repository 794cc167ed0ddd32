"""Indices of captured tensors that leave them, and integers that leave 32 bits: refused exactly where it matters."""

from __future__ import annotations

import pytest
import torch

from attn_engine import errors
from attn_engine.runtime import captured_indices
from tests.test_bad_input import engine, expect, qkv


def test_index_out_of_range_at_a_visible_pair() -> None:
    near, exact = torch.zeros(4), torch.zeros(5)
    causal = lambda b, h, q, kv: kv <= q
    for run in ("__call__", "reference"):
        built = engine(score_mod=lambda s, b, h, q, kv: s + near[q - kv], mask_mod=causal)
        error = expect(
            errors.IndexOutOfRange,
            "near reaches 4",
            "size there is 4",
            run=lambda: getattr(built, run)(*qkv()),
        )
        assert "test_captured_indices.py" in str(error)
        assert "near[q - kv]" in str(error), "the line of the user's function"
    engine(score_mod=lambda s, b, h, q, kv: s + exact[q - kv], mask_mod=causal)(*qkv())
    wide = engine(
        score_mod=lambda s, b, h, q, kv: s + exact[q - kv], mask_mod=lambda b, h, q, kv: kv <= q + 1
    )
    expect(errors.IndexOutOfRange, "-1", "negative", run=lambda: wide(*qkv()))


def test_index_through_an_index_tensor_out_of_range() -> None:
    bucket, table = torch.tensor([0, 1, 2, 3, 2]), torch.zeros(3)
    built = engine(score_mod=lambda s, b, h, q, kv: s + table[bucket[kv]])
    expect(errors.IndexOutOfRange, "table reaches 3", run=lambda: built(*qkv()))
    bucket[3] = 1
    built(*qkv())
    bucket = torch.tensor([0, 1, -1, 2, 2])
    expect(errors.IndexOutOfRange, "-1", "negative index is refused", run=lambda: built(*qkv()))
    hidden = engine(
        score_mod=lambda s, b, h, q, kv: s + table[bucket[kv]], mask_mod=lambda b, h, q, kv: bucket[kv] >= 0
    )
    hidden(*qkv())


def test_index_out_of_range_inside_a_mask() -> None:
    allowed = torch.ones(4, dtype=torch.bool)
    built = engine(mask_mod=lambda b, h, q, kv: (kv <= q) & allowed[q - kv])
    expect(errors.IndexOutOfRange, "allowed", "4", run=lambda: built(*qkv()))
    built(*qkv(4))


def test_no_more_pairs_are_evaluated_than_promised(monkeypatch: pytest.MonkeyPatch) -> None:
    table = torch.zeros(4)
    mask = lambda b, h, q, kv: (q * q - kv * kv) >= 0  # nothing linear
    built = engine(score_mod=lambda s, b, h, q, kv: s + table[q - kv], mask_mod=mask)
    monkeypatch.setattr(captured_indices, "MOST_ELEMENTS", 24)  # independent of b and h: 5 * 5 pairs
    built(*qkv())
    monkeypatch.setattr(captured_indices, "MOST_ELEMENTS", 25)
    monkeypatch.setattr(captured_indices, "BLOCK_ELEMENTS", 7)
    fresh = engine(score_mod=lambda s, b, h, q, kv: s + table[q - kv], mask_mod=mask)
    expect(errors.IndexOutOfRange, "table reaches 4", run=lambda: fresh(*qkv()))


def test_integers_beyond_32_bits() -> None:
    step = 10**9
    built = engine(score_mod=lambda s, b, h, q, kv: s + (q * step + kv * step) % 7)
    expect(errors.IntegerOverflow, r"q_idx \* step", "4000000000", "float", run=lambda: built(*qkv()))
    built(*qkv(2))
    scaled = engine(score_mod=lambda s, b, h, q, kv: s + (q * 1000 % 7) * (kv.float() * 1e9))
    scaled(*qkv())

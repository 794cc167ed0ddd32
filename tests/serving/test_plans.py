"""Steps of decoding that repeat: planned calls give the bits of first ones and notice what changed; bounded tables."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attn_engine import AttentionEngine, meta_tensor
from attn_engine.runtime.paged_checks import WrongPages
from attn_engine.runtime.sequences import OverTheseSequences
from tests.serving.caches import filled
from tests.serving.test_paged import CPU, decoder

pytestmark = pytest.mark.skipif(CPU != "cpu", reason="no C++ compiler")


@pytest.mark.parametrize("heads", [2, 4])
def test_calls_over_the_same_sequences_are_planned(heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    planned: list[int] = []
    launch = OverTheseSequences.launch
    monkeypatch.setattr(OverTheseSequences, "launch", lambda *a: (planned.append(1), launch(*a))[1])
    cache, built = filled([70, 33, 133], page=16), decoder("cpu")
    places: dict[str, Any] = {"len_kv": cache.lengths, "block_table": cache.table}

    def check() -> None:
        q, offset = torch.randn(3, 1, heads, 16), (cache.lengths - 1).to(torch.int64)
        given = (q, cache.k, cache.v, offset)
        o, rows = built(*given, **places, return_final_rowscales=True)
        known, known_rows = decoder("cpu")(*given, **places, return_final_rowscales=True)
        assert torch.equal(o, known)
        assert torch.equal(rows["lse"], known_rows["lse"])

    for _ in range(4):
        check()
    assert planned
    cache.lengths[2] -= 40
    for _ in range(3):
        check()
    cache.table[0, 0] = cache.table[1, 0]
    for _ in range(3):
        check()
    cache.table[0, 1] = len(cache.k)
    with pytest.raises(WrongPages, match="block_table"):
        check()


def test_sequences_that_leave_rows_out_and_training_stay_right() -> None:
    built = AttentionEngine([meta_tensor(None, None, None, 16, dtype=torch.float32)] * 3, backend="cpu")
    lengths = torch.tensor([1, 0], dtype=torch.int32)
    q, k, v = (torch.randn(2, n, 2, 16) for n in (1, 40, 40))
    for _ in range(3):  # the second sequence has no query
        o = built(q, k, v, len_q=lengths, len_kv=torch.tensor([40, 40]))
        assert torch.count_nonzero(o[1]) == 0
    for _ in range(3):
        x = q.clone().requires_grad_()
        built(x, k, v, len_kv=torch.tensor([40, 7])).sum().backward()
        assert x.grad is not None
        assert x.grad.isfinite().all()


@pytest.mark.parametrize("last", [40, 170, 500])
def test_positions_that_meet_a_bound_are_no_neighbours(last: int) -> None:
    """Bounds inside a vector of keys, in none, and beyond all of them; the table goes on behind both."""
    bias, start = torch.randn(2, last + 300), 90

    def biased(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        rising = bias[h, torch.clamp(kv_idx - q_idx + start, 7, last)]
        return score + rising * bias[h, torch.clamp(q_idx - kv_idx + 280, 7, last)]

    built = AttentionEngine(
        [meta_tensor(None, None, None, 16, dtype=torch.float32)] * 3, biased, backend="cpu"
    )
    for rows in (1, 70):
        q, k, v = torch.randn(1, rows, 2, 16), torch.randn(1, 200, 2, 16), torch.randn(1, 200, 2, 16)
        known = built.reference(q, k, v)
        assert isinstance(known, torch.Tensor)
        torch.testing.assert_close(built(q, k, v), known.float(), rtol=2e-5, atol=2e-5)

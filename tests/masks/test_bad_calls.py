"""A block mask that does not fit a call, and captured tensors that stop fitting: typed errors before anything runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from attn_engine import AttentionEngine, create_block_mask, errors, flex_attention, meta_tensor
from attn_engine.runtime.block_lists import BlockSizeNotSupported

B, H, S, D = 2, 4, 96, 16
META = [meta_tensor(None, None, None, D, dtype=torch.float32)] * 3


def causal(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return kv_idx <= q_idx


def by_place(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return kv_idx <= q_idx + b + h


@pytest.fixture(scope="module")
def engine() -> AttentionEngine:
    return AttentionEngine(META, mask_mod=by_place, layout="bhsd", backend="torch")


def made(*sizes: Any, **options: Any) -> Any:
    return create_block_mask(by_place, *sizes, "cpu", **options)


MASKS: dict[str, tuple[Callable[[], Any], type[errors.AttnEngineError], str]] = {
    "another q length": (lambda: made(B, H, S + 1, S), errors.AttnEngineError, str(S + 1)),
    "another kv length": (lambda: made(B, H, S, S - 7), errors.AttnEngineError, str(S - 7)),
    "another batch": (lambda: made(3, H, S, S), errors.AttnEngineError, "3"),
    "other heads": (lambda: made(B, 3, S, S), errors.AttnEngineError, "3"),
    "tiny blocks": (lambda: made(B, H, S, S, BLOCK_SIZE=8), BlockSizeNotSupported, "8"),
    "odd blocks": (lambda: made(B, H, S, S, BLOCK_SIZE=40), BlockSizeNotSupported, "40"),
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("how", ["engine", "flex_attention"])
def test_a_block_mask_that_does_not_fit(name: str, how: str, engine: AttentionEngine) -> None:
    make, error, words = MASKS[name]
    if how == "flex_attention" and error is BlockSizeNotSupported:
        pytest.skip("there the mask_mod alone decides, in any blocks")
    q = torch.randn(B, H, S, D)
    mask = make()
    with pytest.raises(error, match=words) as caught:
        engine(q, q, q, block_mask=mask) if how == "engine" else flex_attention(q, q, q, block_mask=mask)
    assert "test_bad_calls.py" in str(caught.value), str(caught.value)


def with_ids(ids: torch.Tensor) -> Callable[..., Any]:
    return lambda b, h, q_idx, kv_idx: ids[q_idx] == ids[kv_idx]


def test_a_captured_tensor_that_becomes_too_short() -> None:
    ids = torch.arange(S) // 10
    run = AttentionEngine(META, mask_mod=with_ids(ids), layout="bhsd", backend="torch")
    mask = create_block_mask(with_ids(ids), None, None, S, S)
    q = torch.randn(B, H, S, D)
    run(q, q, q)
    ids.resize_(S - 20)
    for call in (lambda: run(q, q, q), mask.lists):
        with pytest.raises(errors.AttnEngineError, match="ids") as caught:
            call()
        assert "test_bad_calls.py" in str(caught.value)
    ids.resize_(S).zero_()
    assert run(q, q, q).isfinite().all() and len(mask.lists().by_q.full.indices) == 0


def test_a_captured_tensor_of_another_rank() -> None:
    ids = torch.arange(S) // 10

    def same(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return ids[q_idx] == ids[kv_idx]

    mask = create_block_mask(same, None, None, S, S)
    run = AttentionEngine(META, mask_mod=same, layout="bhsd", backend="torch")
    q = torch.randn(B, H, S, D)
    run(q, q, q)
    ids = ids.reshape(2, -1)
    for call in (lambda: run(q, q, q), mask.lists):
        with pytest.raises(errors.AttnEngineError, match="ids"):
            call()

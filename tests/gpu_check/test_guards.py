"""Allocations lie between margins, hold NaN before they are written, and a write into a margin is seen."""

from __future__ import annotations

import torch

from attn_engine.gpu_check.guards import MARGIN, guarded_allocations


def test_what_is_allocated_is_nan_and_zeros_are_zero() -> None:
    x = torch.ones(3, 5)
    with guarded_allocations() as guards:
        made = [
            torch.empty(3, 5), torch.empty_strided((2, 2), (7, 3), dtype=torch.float64), torch.empty_like(x),
            x.new_empty(4, dtype=torch.bfloat16),
        ]  # fmt: skip
        zeros = [torch.zeros(3, 5), x.new_zeros(2, dtype=torch.int32)]
        assert len(guards) == 6
        assert all(bool(torch.isnan(y).all()) for y in made)
        assert all(not y.any() for y in zeros)
        assert made[1].stride() == (7, 3)
        assert guards.touched() == 0
        for y in made:
            y.fill_(1)
        assert guards.touched() == 0


def test_a_write_beside_is_counted() -> None:
    with guarded_allocations() as guards:
        x = torch.empty(4, 4)
        x.as_strided((1,), (1,), x.storage_offset() + 16).zero_()
        assert guards.touched() == 4
        x.as_strided((1,), (1,), x.storage_offset() - MARGIN // 4).zero_()
        assert guards.touched() == 8


def test_everything_is_as_before_afterwards() -> None:
    before = torch.empty, torch.zeros, torch.Tensor.new_empty
    with guarded_allocations():
        assert torch.empty is not before[0]
    assert (torch.empty, torch.zeros, torch.Tensor.new_empty) == before
    assert "new_empty" not in vars(torch.Tensor)


def test_what_has_no_memory_is_left_alone() -> None:
    with guarded_allocations() as guards:
        assert torch.empty(0, 3).shape == (0, 3)
        assert torch.empty(2, device="meta").device.type == "meta"
        assert len(guards) == 0

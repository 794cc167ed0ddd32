"""flex_attention with block masks whose lists say more than their mask_mod: kernels walk over the lists."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask as TorchMask
from torch.utils.checkpoint import checkpoint

from attn_engine import BlockMask, flex_attention

LENGTH, D, BLOCK = 96, 16, 16
LISTED = torch.tensor([0, 2])  # blocks of keys, the same for every query
COLUMNS = (LISTED[:, None] * BLOCK + torch.arange(BLOCK)).flatten()


def causal(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return q_idx >= kv_idx


def by_hand(made: Any) -> Any:
    counts = torch.full((1, 1, LENGTH // BLOCK), 2, dtype=torch.int32)
    indices = torch.arange(LENGTH // BLOCK, dtype=torch.int32).repeat(1, 1, LENGTH // BLOCK, 1)
    indices[..., :2] = LISTED  # the others are beyond the count
    return made.from_kv_blocks(counts, indices, BLOCK_SIZE=BLOCK, mask_mod=causal)


def drawn() -> list[Tensor]:
    return [torch.randn(2, heads, LENGTH, D, requires_grad=True) for heads in (4, 2, 2)]


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (x[:, :, COLUMNS].repeat_interleave(2, 1) for x in (k, v))
    hidden = torch.arange(LENGTH)[:, None] < COLUMNS
    return torch.softmax((q @ k.mT / D**0.5).masked_fill(hidden, -torch.inf), -1) @ v


@pytest.mark.parametrize("made", [BlockMask, TorchMask], ids=["ours", "torch's"])
def test_blocks_in_no_list_are_never_read(made: Any) -> None:
    q, k, v = drawn()
    with torch.no_grad():
        for x in (k, v):
            x[:, :, [i for i in range(LENGTH) if i not in COLUMNS]] = math.nan
    mask = by_hand(made)
    out = flex_attention(q, k, v, block_mask=mask, enable_gqa=True)
    wanted, d_out = dense(q, k, v), torch.randn_like(out)
    torch.testing.assert_close(out, wanted)
    for got, want in zip(
        torch.autograd.grad(out, (q, k, v), d_out), torch.autograd.grad(wanted, (q, k, v), d_out), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_checkpoints_and_second_derivatives() -> None:
    q, k, v = drawn()
    mask = by_hand(BlockMask)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flex_attention(q, k, v, block_mask=mask, enable_gqa=True)

    again = checkpoint(attend, q, k, v, use_reentrant=False)
    assert isinstance(again, Tensor)
    for got, want in zip(
        torch.autograd.grad(again.square().sum(), (q, k, v)),
        torch.autograd.grad(dense(q, k, v).square().sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)

    def curvature(function: Any) -> Tensor:
        (first,) = torch.autograd.grad(function(q, k, v).square().sum(), q, create_graph=True)
        return torch.autograd.grad(first.square().sum(), k)[0]

    torch.testing.assert_close(curvature(attend), curvature(dense), rtol=1e-3, atol=1e-4)


def test_lists_edited_in_place_count_at_the_next_call() -> None:
    q, k, v = drawn()
    mask = by_hand(TorchMask)
    flex_attention(q, k, v, block_mask=mask, enable_gqa=True)
    mask.kv_num_blocks[:] = 1
    got = flex_attention(q, k, v, block_mask=mask, enable_gqa=True)
    first = [x[:, :, :BLOCK].repeat_interleave(2, 1) for x in (k, v)]
    hidden = torch.arange(LENGTH)[:, None] < torch.arange(BLOCK)
    want = torch.softmax((q @ first[0].mT / D**0.5).masked_fill(hidden, -torch.inf), -1) @ first[1]
    torch.testing.assert_close(got, want)

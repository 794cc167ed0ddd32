"""Decoding over picked blocks against a dense float64 formula; what is beyond a cache's length holds NaN."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attn_engine import errors
from attn_engine.library import block_sparse_flash_decode_gqa_indice, block_sparse_flash_decode_gqa_mask
from tests.library.seer_formulas import attention

DIM, DIM_V, BLOCK, ROWS = 32, 48, 16, 150
BLOCKS = -(-ROWS // BLOCK)
MASKED, INDEXED = block_sparse_flash_decode_gqa_mask, block_sparse_flash_decode_gqa_indice


def draw(
    lengths: list[int], group: int = 2, n: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k_cache, v_cache, cache_seqlens; n = 0: one token, without a dimension for it."""
    batch = len(lengths)
    q = torch.randn(batch, *([n] if n else []), 2 * group, DIM)
    k, v = torch.randn(batch, ROWS, 2, DIM), torch.randn(batch, ROWS, 2, DIM_V)
    for b, length in enumerate(lengths):
        k[b, length:] = v[b, length:] = torch.nan
    return q.to(dtype), k.to(dtype), v.to(dtype), torch.tensor(lengths).int()


def dense(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, mask: Tensor, scale: float, block: int = BLOCK
) -> tuple[Tensor, Tensor]:
    """(batch, n, heads, Dv) and (batch, heads, n)."""
    outs: list[Tensor] = []
    logs: list[Tensor] = []
    rows = q if q.ndim == 4 else q[:, None]
    for b, length in enumerate(lengths.tolist()):
        j, i = torch.arange(length)[None], length - rows.shape[1] + torch.arange(rows.shape[1])[:, None]
        group = rows.shape[2] // mask.shape[1]
        keep = torch.stack([mask[b, h // group][j // block] & (j <= i) for h in range(rows.shape[2])])
        out, log = attention(rows[b].double(), k[b, :length].double(), v[b, :length].double(), keep, scale)
        outs.append(out)
        logs.append(log)
    return torch.stack(outs), torch.stack(logs)


def indices(mask: Tensor, holes: bool = True) -> Tensor:
    """The picked blocks in random order, with holes, named twice, and numbers beyond the cache."""
    picked = torch.where(mask, torch.arange(mask.shape[-1]), -1)
    more = torch.cat([picked, picked, torch.full_like(picked[..., :2], BLOCKS + 7)], -1) if holes else picked
    return more[..., torch.randperm(more.shape[-1])].int()


def agree(found: Any, want: tuple[Tensor, Tensor]) -> None:
    out, lse = found
    exact, log = want
    if out.ndim == 3:
        exact, log = exact[:, 0], log[..., 0]
    torch.testing.assert_close(out, exact.to(out.dtype), atol=2e-6, rtol=2e-5)
    torch.testing.assert_close(lse, log.float(), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("mask_of", ["q", "kv"])
@pytest.mark.parametrize("group", [1, 4])
def test_mask_and_indices(group: int, mask_of: str) -> None:
    lengths = [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 100, ROWS]
    q, k, v, filled = draw(lengths, group)
    mask = torch.rand(len(lengths), 2 * (group if mask_of == "q" else 1), BLOCKS) < 0.5
    mask[-1, 0] = False
    want = dense(q, k, v, filled, mask, DIM**-0.5)
    assert (want[1] == -torch.inf).any()
    agree(MASKED(q, k, v, filled, ROWS, mask, BLOCK, return_lse=True), want)
    named = indices(mask)
    agree(INDEXED(q, k, v, filled, ROWS, named.shape[2], named, BLOCK, return_lse=True), want)
    own = indices(mask, holes=False)
    out = INDEXED(q, k, v, filled, ROWS, own.shape[2], own.long(), BLOCK, sm_scale=0.5)
    torch.testing.assert_close(out.double(), dense(q, k, v, filled, mask, 0.5)[0][:, 0], atol=1e-5, rtol=1e-5)  # pyright: ignore[reportAttributeAccessIssue]


def test_every_length() -> None:
    """Each length modulo the block, in one batch."""
    lengths = list(range(ROWS - 2 * BLOCK, ROWS + 1))
    q, k, v, filled = draw(lengths)
    mask = torch.rand(len(lengths), 2, BLOCKS) < 0.5
    agree(
        MASKED(q, k, v, filled, ROWS, mask, BLOCK, return_lse=True), dense(q, k, v, filled, mask, DIM**-0.5)
    )


@pytest.mark.slow
@pytest.mark.parametrize("block", [32, 128])
def test_every_length_of_larger_blocks(block: int) -> None:
    lengths = list(range(ROWS - 128, ROWS + 1))
    q, k, v, filled = draw(lengths, 8)
    mask = torch.rand(len(lengths), 2, -(-ROWS // block)) < 0.5
    want = dense(q, k, v, filled, mask, DIM**-0.5, block)
    agree(MASKED(q, k, v, filled, ROWS, mask, block, return_lse=True), want)


def test_several_new_tokens() -> None:
    lengths = [5, 40, ROWS]
    q, k, v, filled = draw(lengths, n=5)
    mask = torch.rand(len(lengths), 2, BLOCKS) < 0.6
    want = dense(q, k, v, filled, mask, DIM**-0.5)
    agree(MASKED(q, k, v, filled, ROWS, mask, BLOCK, return_lse=True), want)


@pytest.mark.slow
def test_bfloat16() -> None:
    q, k, v, filled = draw([70, ROWS], dtype=torch.bfloat16)
    mask = torch.rand(2, 2, BLOCKS) < 0.6
    out = MASKED(q, k, v, filled, ROWS, mask, BLOCK)
    want = dense(q, k, v, filled, mask, DIM**-0.5)[0][:, 0]
    torch.testing.assert_close(out.double(), want, atol=1e-2, rtol=1e-2)  # pyright: ignore[reportAttributeAccessIssue]


Q, K, V, FILLED = draw([40, ROWS])
MASK = torch.ones(2, 2, BLOCKS, dtype=torch.bool)
INDICES = torch.zeros(2, 2, 3, dtype=torch.int32)


def masked(**changed: Any) -> Any:
    given: dict[str, Any] = {
        "q": Q, "k_cache": K, "v_cache": V, "cache_seqlens": FILLED, "max_cache_seqlen": ROWS,
        "block_mask": MASK, "block_size": BLOCK,
    }  # fmt: skip
    return MASKED(**(given | changed))


def indexed(most: int, numbers: Any) -> Any:
    return INDEXED(Q, K, V, FILLED, ROWS, most, numbers, BLOCK)


WRONG: dict[str, tuple[Any, str]] = {
    "longest": (lambda: masked(max_cache_seqlen=ROWS + 1), "max_cache_seqlen"),
    "beyond the cache": (lambda: masked(cache_seqlens=FILLED + 1), "cache_seqlens=151"),
    "negative length": (lambda: masked(cache_seqlens=FILLED - 41), "cache_seqlens=-1"),
    "lengths as floats": (lambda: masked(cache_seqlens=FILLED.float()), "cache_seqlens"),
    "number of lengths": (lambda: masked(cache_seqlens=FILLED[:1]), "cache_seqlens"),
    "blocks of mask": (lambda: masked(block_mask=MASK[..., 1:]), "block_mask"),
    "heads of mask": (lambda: masked(block_mask=MASK[:, :1]), "heads of block_mask"),
    "mask of numbers": (lambda: masked(block_mask=MASK.int()), "block_mask"),
    "block size": (lambda: masked(block_size=24), "block_size"),
    "heads of q": (lambda: masked(q=Q[:, :3]), "heads of q"),
    "q": (lambda: masked(q=Q[0]), "q="),
    "v_cache": (lambda: masked(v_cache=V[:, 1:]), "v_cache="),
    "number of indices": (lambda: indexed(4, INDICES), "block_indices"),
    "heads of indices": (lambda: indexed(3, INDICES[:, :1]), "heads of block_indices"),
    "indices as floats": (lambda: indexed(3, INDICES.float()), "block_indices"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_mistakes_are_typed(name: str) -> None:
    call, text = WRONG[name]
    with pytest.raises(errors.AttnEngineError, match=text):
        call()

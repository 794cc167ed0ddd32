"""Cases beyond one dense batch: sequences packed side by side, given blocks, and masks that look into tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

BLOCKS = {"2D": (64, 64), "per token": (1, 64)}
BUCKETS, DENSITY = 8, 0.4
LOCAL, STRIDE, BLOCK = 2, 4, 64
NO_KEY, NO_QUERY = 10**9, -1
Mask = Callable[..., Any]


def draw_blocks(
    blocks: str, batches: int, kv_heads: int, rows: int, keys: int, generator: torch.Generator
) -> Tensor:
    """bool (batches, kv heads, blocks of queries, blocks of keys)."""
    of_q, of_kv = BLOCKS[blocks]
    return torch.rand(batches, kv_heads, -(-rows // of_q), -(-keys // of_kv), generator=generator) < DENSITY


def visible_blocks(
    blocks: str, given: Tensor, heads: int, b: Tensor, q_idx: Tensor, kv_idx: Tensor
) -> Tensor:
    """Which pairs are in a visible block; indices as of a mask_mod."""
    of_q, of_kv = BLOCKS[blocks]
    h = torch.arange(heads, device=given.device).view(-1, 1, 1) // (heads // given.shape[1])
    return given[b, h, q_idx // of_q, kv_idx // of_kv]


def places(lengths: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """(sequence, position in it) of every packed row."""
    count = torch.tensor(lengths, device=device)
    sequence = torch.arange(len(lengths), device=device).repeat_interleave(count)
    first = count.cumsum(0) - count
    return sequence, torch.arange(int(count.sum()), device=device) - first[sequence]


def cumulative(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor([0, *lengths], device=device).cumsum(0).int()


# -- masks of library entries (attn_engine/library/sparse), as formulas


def in_bucket(t: Mapping[str, Tensor]) -> Mask:
    """Rows sorted by bucket: a query sees earlier keys of its own."""
    q_at, k_at, q_hash, k_hash = (t[n] for n in ("q_idx", "k_idx", "q_hash", "k_hash"))

    def mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return (q_hash[b, h, q_idx] == k_hash[b, h, kv_idx]) & (k_at[b, h, kv_idx] <= q_at[b, h, q_idx])

    return mask


def in_past(t: Mapping[str, Tensor]) -> Mask:
    """Compacted rows: a query sees the kept keys before it."""
    q_at, k_at = t["q_idx"], t["k_idx"]
    return lambda b, h, q_idx, kv_idx: k_at[b, h, kv_idx] <= q_at[b, h, q_idx]


def local_stride(t: Mapping[str, Tensor]) -> Mask:
    """The last blocks and every few-th one; which ones depends on the head."""
    offset = t["offset"]

    def mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        at = q_idx + offset[b]
        q_block, kv_block = at // BLOCK, kv_idx // BLOCK
        kept = (q_block - kv_block < LOCAL) | ((kv_block + h) % STRIDE == 0)
        return kept & (kv_idx <= at)

    return mask


def sorted_rows(
    shape: tuple[int, int], lengths: tuple[int, int], generator: torch.Generator
) -> dict[str, Tensor]:
    """Positions and buckets (batches, heads, rows) of rows sorted by bucket. lengths: of q and of k."""
    found: dict[str, Tensor] = {}
    for name, length in zip("qk", lengths, strict=True):
        buckets = torch.randint(BUCKETS, (*shape, length), generator=generator)
        ordered, index = torch.sort(buckets, dim=2, stable=True)
        found |= {f"{name}_hash": ordered.int(), f"{name}_idx": index.int()}
    return found


def kept_rows(
    shape: tuple[int, int], lengths: tuple[int, int], generator: torch.Generator
) -> dict[str, Tensor]:
    """Positions (batches, heads, rows) of kept rows, ascending; the last quarter is padding."""
    found: dict[str, Tensor] = {}
    for name, length, padding in zip("qk", lengths, (NO_QUERY, NO_KEY), strict=True):
        index = torch.rand(*shape, 2 * length, generator=generator).argsort(2)[..., :length].sort(2).values
        index[..., length - length // 4 :] = padding
        found[f"{name}_idx"] = index.int()
    return found

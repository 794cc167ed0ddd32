"""Random masks of every kind, and what they show by torch's own evaluation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import flex_attention as flex

from attn_engine import and_masks, not_mask, or_masks

LENGTH = 200  # positions that have an element in every captured tensor
BATCHES, HEADS = 2, 2


def dense(mask_mod: Callable[..., Any], batch: int, heads: int, q_len: int, kv_len: int) -> Tensor:
    """The mask itself, (batch, heads, q, kv), by torch's own create_mask."""
    return flex.create_mask(mask_mod, batch, heads, q_len, kv_len, "cpu")


def _random(seed: int, *shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


sorted_ids = torch.arange(LENGTH) // 13
batch_ids = torch.stack((torch.arange(LENGTH) // 9, torch.arange(LENGTH) // 31))
ids = (_random(1, LENGTH) * 4).long()
flags = _random(2, LENGTH) < 0.9
floats = torch.randn(LENGTH, generator=torch.Generator().manual_seed(3))
floats[17] = float("nan")
table = _random(4, LENGTH, LENGTH) < 0.97
blocks = _random(5, HEADS, 7, 7) < 0.6
windows = torch.tensor([3, 20])
prefixes = torch.tensor([11, 40])


def atoms_of(n: int) -> dict[str, Callable[..., Any]]:
    """One mask of each kind; n is a runtime number in those that read it."""
    return {
        "causal": lambda b, h, q, k: k <= q + n,
        "window": lambda b, h, q, k: (q - k <= n) & (k - q <= n),
        "prefix": lambda b, h, q, k: k < n,
        "batch prefix": lambda b, h, q, k: k < prefixes[b],
        "head window": lambda b, h, q, k: (q - k).abs() <= windows[h],
        "documents": lambda b, h, q, k: sorted_ids[q] == sorted_ids[k],
        "batch documents": lambda b, h, q, k: batch_ids[b, q] == batch_ids[b, k],
        "unsorted": lambda b, h, q, k: ids[q] != ids[k],
        "chunked": lambda b, h, q, k: q // (n + 1) == k // (n + 1),
        "chunks of 32": lambda b, h, q, k: q // 32 == k // 32,
        "dilated": lambda b, h, q, k: (q - k) % (n % 5 + 1) == 0,
        "dilated blocks": lambda b, h, q, k: (q // 32 - k // 32) % 3 == 0,
        "sink or window": lambda b, h, q, k: (k < 5) | ((k <= q) & (q - k <= n)),
        "strided": lambda b, h, q, k: (k // 16) % 3 == 0,
        "even rows": lambda b, h, q, k: q % 2 == h,
        "flags": lambda b, h, q, k: flags[k],
        "row flags": lambda b, h, q, k: ~flags[q],
        "floats": lambda b, h, q, k: floats[q] < floats[k],
        "blocks": lambda b, h, q, k: blocks[h, q // 32, k // 32],
        "table": lambda b, h, q, k: table[q, k],
        "product": lambda b, h, q, k: (q - k) * (q - k) <= n * n,
        "where": lambda b, h, q, k: torch.where(ids[k] > 1, k <= q, k + n >= q),
        "global": lambda b, h, q, k: (k < 4) | (q < 4) | (k >= q + n),
        "clamped": lambda b, h, q, k: torch.clamp(q - k, 0, n) < n,
        "nothing": lambda b, h, q, k: k < 0,
    }


def random_masks(largest: int, most: int = 4) -> st.SearchStrategy[Callable[..., Any]]:
    """`&`, `|` and `~` of at most `most` atoms whose numbers are at most `largest`."""
    kinds = st.sampled_from(list(atoms_of(0)))
    atoms = st.builds(lambda kind, n: atoms_of(n)[kind], kinds, st.integers(0, largest))
    return st.recursive(
        atoms,
        lambda inner: st.one_of(
            st.builds(and_masks, inner, inner), st.builds(or_masks, inner, inner), st.builds(not_mask, inner)
        ),
        max_leaves=most,
    )

"""Compressed rows of blocks: made, transposed, chosen from, and to and from the padded tensors that torch keeps."""

from __future__ import annotations

import torch
from torch import Tensor

from attn_engine.masks.classes import Listed
from attn_engine.masks.lists import Csr

Shape = tuple[int, int, int]  # (batch, heads, blocks)


def csr_of(listed: Listed, shape: Shape) -> Csr:
    """Rows in the order (batch, head, block)."""
    batch, heads, blocks = shape
    ends = torch.zeros(len(listed.counts) + 1, dtype=torch.int32, device=listed.counts.device)
    torch.cumsum(listed.counts, 0, dtype=torch.int32, out=ends[1:])
    starts = ends.new_empty(batch * heads, blocks + 1)
    starts[:, :blocks] = ends[:-1].reshape(-1, blocks)
    starts[:, blocks] = ends[blocks::blocks]
    return Csr(starts.reshape(batch, heads, blocks + 1), listed.columns)


def listed_of(csr: Csr) -> Listed:
    return Listed(csr.counts().reshape(-1).to(torch.int64), csr.indices)


def transposed(csr: Csr, blocks: int) -> Csr:
    """The rows of the other side, which has so many blocks: a stable sort by column."""
    batch, heads, n = csr.starts.shape
    groups = batch * heads
    rows = listed_of(csr).rows
    key = csr.indices
    if groups > 1:
        key = key + rows // (n - 1) * blocks
    columns, order = torch.sort(key, stable=True)
    counts = torch.bincount(columns, minlength=groups * blocks)
    del columns, key
    return csr_of(Listed(counts, (rows % (n - 1))[order]), (batch, heads, blocks))


def padded(csr: Csr, width: int) -> tuple[Tensor, Tensor]:
    """(number of blocks per row, their indices in rows of `width` with zeros behind), both int32, as torch has them."""
    counts = csr.counts()
    indices = csr.indices.new_zeros((*counts.shape, width))
    places = torch.arange(len(csr.indices), device=csr.indices.device)
    rows = listed_of(csr).rows.to(torch.int64)
    flat = counts.reshape(-1).to(torch.int64)
    indices.reshape(-1, width)[rows, places - (flat.cumsum(0) - flat)[rows]] = csr.indices
    return counts, indices


def from_padded(counts: Tensor, indices: Tensor, shape: Shape) -> Csr:
    """The opposite of `padded`; the indices of a row may come in any order."""
    width = indices.shape[-1]
    flat = counts.reshape(-1, 1)
    filled = torch.arange(width, device=indices.device) < flat
    # What lies behind a row's end is sorted behind everything.
    ordered = indices.reshape(-1, width).masked_fill(~filled, torch.iinfo(torch.int32).max).sort(-1).values
    return csr_of(Listed(flat[:, 0].to(torch.int64), ordered[filled].to(torch.int32)), shape)


def chosen(csr: Csr, rows: Tensor) -> Csr:
    """The rows with these numbers, counted over (batch, head, block). rows: (batch, heads, blocks) of the result."""
    batch, heads, blocks = rows.shape
    flat = rows.reshape(-1)
    counts = csr.counts().reshape(-1)[flat].to(torch.int64)
    first = csr.starts[..., :-1].reshape(-1)[flat].to(torch.int64)
    shift = first - (counts.cumsum(0) - counts)
    places = torch.repeat_interleave(shift, counts)
    places += torch.arange(len(places), device=flat.device)
    return csr_of(Listed(counts, csr.indices[places]), (batch, heads, blocks))

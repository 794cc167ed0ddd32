"""Compressed rows of blocks: made, chosen from, and to and from the padded tensors that torch keeps."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from attn_engine.masks.classes import Listed
from attn_engine.masks.lists import Csr

Shape = tuple[int, int, int]  # (batch, heads, blocks)


def csr_of(listed: Listed, shape: Shape, device: torch.device) -> Csr:
    """Rows in the order (batch, head, block), as tensors."""
    batch, heads, blocks = shape
    ends = np.zeros(len(listed.counts) + 1, dtype=np.int32)
    np.cumsum(listed.counts, out=ends[1:])
    starts = np.empty((batch * heads, blocks + 1), dtype=np.int32)
    starts[:, :blocks] = ends[:-1].reshape(-1, blocks)
    starts[:, blocks] = ends[blocks::blocks]
    tensors = (
        torch.from_numpy(x).to(device) for x in (starts.reshape(batch, heads, blocks + 1), listed.columns)
    )
    return Csr(*tensors)


def listed_of(csr: Csr) -> Listed:
    """The rows as arrays."""
    return Listed(csr.counts().reshape(-1).to(torch.int64).cpu().numpy(), csr.indices.cpu().numpy())


def rows_of(csr: Csr) -> Tensor:
    """The row (batch, head, block) of each index: int64."""
    counts = csr.counts().reshape(-1)
    places = torch.arange(len(counts), device=counts.device)
    return torch.repeat_interleave(places, counts, output_size=len(csr.indices))


def padded(csr: Csr, width: int) -> tuple[Tensor, Tensor]:
    """(number of blocks per row, their indices in rows of `width` with zeros behind), both int32, as torch has them."""
    counts = csr.counts()
    indices = csr.indices.new_zeros((*counts.shape, width))
    places = torch.arange(len(csr.indices), device=csr.indices.device)
    rows = rows_of(csr)
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
    return tensors_of(flat[:, 0], ordered[filled], shape)


def chosen(csr: Csr, rows: Tensor) -> Csr:
    """The rows with these numbers, counted over (batch, head, block). rows: (batch, heads, blocks) of the result."""
    batch, heads, blocks = rows.shape
    flat = rows.reshape(-1)
    counts = csr.counts().reshape(-1)[flat].to(torch.int64)
    first = csr.starts[..., :-1].reshape(-1)[flat].to(torch.int64)
    shift = first - (counts.cumsum(0) - counts)
    places = torch.repeat_interleave(shift, counts)
    places += torch.arange(len(places), device=flat.device)
    return tensors_of(counts, csr.indices[places], (batch, heads, blocks))


def tensors_of(counts: Tensor, columns: Tensor, shape: Shape) -> Csr:
    """Compressed rows of these counts, on their device."""
    listed = Listed(counts.to(torch.int64).cpu().numpy(), columns.to(torch.int32).cpu().numpy())
    return csr_of(listed, shape, counts.device)

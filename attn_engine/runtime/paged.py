"""Keys that lie in pages: the table as a tensor of a call, and the pages as the dense definition sees them.

The caches are (pages, kv_heads, rows of a page, dimension) in logical order. Beside the spans of its sequences a call
brings "block_table", int32 (sequences, pages of the longest): entry j of a sequence is the page that holds its
positions j * page to j * page + page - 1. Entries behind the last page of a sequence are never read.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from attn_engine.codegen.lower.paged import BLOCK_TABLE
from attn_engine.ir.program import Sequences
from attn_engine.runtime.sequence_rows import PaddedRows
from attn_engine.runtime.sequences import SequenceTables

PAGED_NAMES = (BLOCK_TABLE,)
LARGEST = 2**31 - 1


def table_of(given: Tensor) -> Tensor:
    """The table as kernels read it; what int32 cannot hold stays out of every cache's range."""
    return given.clamp(-LARGEST, LARGEST).to(torch.int32) if given.dtype is torch.int64 else given


class PagedRows(PaddedRows):
    """Where the rows of every sequence are in caches (pages, H, rows of a page, ...)."""

    def __init__(self, tables: SequenceTables, block_table: Tensor, page: int) -> None:
        device = block_table.device
        length = tables.lengths["kv"].to(device)
        position = torch.arange(tables.longest["kv"], device=device)
        self.valid = position < length[:, None]
        pages = block_table.to(torch.int64)[:, position // page]
        self._batch = torch.where(self.valid, pages, 0)
        self._row = torch.where(self.valid, position % page, 0)


def key_rows(
    sequences: Sequences, tables: SequenceTables, tensors: Mapping[str, Tensor], device: torch.device
) -> PaddedRows:
    """Where the keys of every sequence are."""
    if sequences.page:
        return PagedRows(tables, tensors[BLOCK_TABLE], sequences.page)
    return PaddedRows(sequences, tables, "kv", device)

"""Caches in pages: how many rows a page has, and which pages may be written to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attn_engine.library.arguments import at_least
from attn_engine.library.nsa.sizes import Compression, multiple
from attn_engine.library.serving.append import CheckedAppend
from attn_engine.runtime.paged_checks import WrongPages


def page_rows(capacity: int, page_size: int, compression: Compression) -> tuple[int, int]:
    """Pages of a sequence of so many tokens, and compressed rows of a page; raises WrongArgument."""
    at_least("page_size", page_size, 1)
    multiple("page_size", page_size, compression.stride)
    return -(-capacity // page_size), page_size // compression.stride


def check_own_pages(block_table: Tensor, appends: Sequence[CheckedAppend]) -> None:
    """Raise WrongPages where a page is written to that is another place of the table as well.

    appends: the tokens first, which say how much of the table counts. A compressed row lies in the page of its first
    token but depends on later ones: where sequences share the page, they would have different rows there.
    """
    tokens = appends[0]
    pages, size = tokens.targets[0].shape[:2]
    first = torch.arange(block_table.shape[1], device=block_table.device) * size
    counts = first < tokens.lengths[:, None]
    outside = counts & ((block_table < 0) | (block_table >= pages))
    if bool(outside.any()):
        b, j = outside.nonzero()[0].tolist()
        expected = f"a page of the cache, 0 to {pages - 1}: the sequence has tokens there"
        _refuse(f"element [{b}, {j}]", int(block_table[b, j]), expected, "Nothing was written to a cache.")
    owners = torch.bincount(block_table[counts].long(), minlength=pages)
    for x in appends:
        written = x.slots // x.targets[0].shape[1]
        shared = written[owners[written] > 1]
        if len(shared):
            instead = "Copy the page, its compressed rows too, before a sequence goes on in it."
            _refuse("a page that is written to", int(shared[0]), "in the table once", instead)


def _refuse(what: str, got: object, expected: str, instead: str) -> None:
    raise WrongPages(argument="block_table", what=what, got=got, expected=expected, instead=instead)

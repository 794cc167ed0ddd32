"""Decoding: keys, values, and the compressed rows of the blocks that are complete, which grow with them.

In pages, a compressed row lies in the page of its block's first token: a page of P tokens has P / d rows beside it, and
one table says where both are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attn_engine.library.arguments import at_least
from attn_engine.library.nsa.arguments import (
    check_function,
    check_gates,
    check_queries,
    check_rows,
    scale_of,
)
from attn_engine.library.nsa.attention import BranchCall
from attn_engine.library.nsa.compression import Phi, Place, mean_pooling
from attn_engine.library.nsa.gating import gated
from attn_engine.library.nsa.paged_cache import check_own_pages, page_rows
from attn_engine.library.nsa.sequences import sequences_in_caches, summed
from attn_engine.library.nsa.sizes import Compression, Sizes, refuse
from attn_engine.library.serving.append import checked_append

Pair = tuple[Tensor, Tensor]


class NSACache:
    """The past of a batch of sequences under native sparse attention; `append` tokens, then `attend` with their
    queries.

    batch, capacity: sequences, and the tokens that each has room for. kv_heads, dim, dim_v: of keys and values.
    own_pairs: the selected and the window branch have keys and values of their own; else one pair serves all.
    compress_k, compress_v, place_k and the sizes: as of `native_sparse_attention`.
    page_size: tokens of a page, a multiple of d; None: every sequence has its rows to itself. pages: how many there
    are, None: what all sequences need at most.

    block_table: int32 (batch, pages of a sequence), -1 at first: write into it, or put another in its place, before
    tokens are appended that need the page. Pages may lie in any order; one that several sequences have is only read.
    lengths: int32 (batch,), the tokens of each sequence. A sequence gets a compressed row with each token t, counted
    from 0, with t + 1 >= l and (t + 1 - l) % d == 0; of uncompressed tokens of the first branch the last l are kept.
    """

    def __init__(
        self,
        batch: int,
        capacity: int,
        kv_heads: int,
        dim: int,
        dim_v: int | None = None,
        *,
        own_pairs: bool = False,
        compress_k: Phi = mean_pooling,
        compress_v: Phi = mean_pooling,
        place_k: Place | None = None,
        compression_block: int = 32,
        compression_stride: int = 16,
        selection_block: int = 64,
        selected_blocks: int = 16,
        window: int = 512,
        page_size: int | None = None,
        pages: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        compression = Compression(compression_block, compression_stride)
        self.sizes = Sizes(compression, selection_block, selected_blocks, window)
        at_least("batch", batch, 0)
        at_least("capacity", capacity, 0)
        for name, phi in (("compress_k", compress_k), ("compress_v", compress_v)):
            check_function(name, phi)
        self.phi, self.place_k = (compress_k, compress_v), place_k
        self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)
        self.block_table: Tensor | None = None
        places, rows, compressed_rows = batch, capacity, compression.complete(capacity)
        if page_size is not None:
            width, compressed_rows = page_rows(capacity, page_size, compression)
            self.block_table = torch.full((batch, width), -1, dtype=torch.int32, device=device)
            places, rows = batch * width if pages is None else pages, page_size
            at_least("pages", places, 0)
        elif pages is not None:
            refuse("pages", pages, "None without page_size", "Say how many tokens a page has.")

        def pair(places: int, rows: int) -> Pair:
            k, v = (
                torch.zeros(places, rows, kv_heads, d, dtype=dtype, device=device)
                for d in (dim, dim if dim_v is None else dim_v)
            )
            return k, v

        self.selected = pair(places, rows)
        self.window = pair(places, rows) if own_pairs else self.selected
        self.compressed = pair(places, compressed_rows)
        self._recent = pair(batch, compression_block)  # token t of the first branch lies at t % l

    @torch.no_grad()
    def append(
        self,
        k: Tensor,
        v: Tensor,
        *,
        k_slc: Tensor | None = None,
        v_slc: Tensor | None = None,
        k_win: Tensor | None = None,
        v_win: Tensor | None = None,
        counts: Tensor | None = None,
    ) -> None:
        """Add tokens to every sequence: k (batch, n, kv heads, D) and v, all n of them or the first counts[b].

        k_slc, v_slc, k_win, v_win: of the other branches; a rotated k_slc goes with a k that place_k rotates. Raises
        WrongPages and WrongArgument before anything is written.
        """
        slc = k if k_slc is None else k_slc, v if v_slc is None else v_slc
        one = self.window is self.selected
        rest = slc if one else (k, v)
        win = rest[0] if k_win is None else k_win, rest[1] if v_win is None else v_win
        if one and (win[0] is not slc[0] or win[1] is not slc[1]):
            instead = "Make the cache with own_pairs=True."
            refuse("k_win, v_win", "others than k_slc, v_slc", "the same: the cache has one pair", instead)
        if k.shape != slc[0].shape or v.shape != slc[1].shape:
            got = tuple(k.shape), tuple(v.shape)
            refuse("k, v", got, "shaped as k_slc, v_slc", "They are the same tokens.")
        new, caches = (slc, self.selected) if one else ((*slc, *win), (*self.selected, *self.window))
        tokens = checked_append(new, caches, self.lengths, self.block_table, counts=counts)
        before, after = (
            self.sizes.compression.complete_each(x.long()) for x in (self.lengths, tokens.lengths)
        )
        known = [torch.cat(x, 1) for x in zip(self._recent, (k, v), strict=True)]
        made = self._rows_of(known, before, after - before)
        rows = checked_append(made, self.compressed, before, self.block_table, cu_len=summed(after - before))
        if self.block_table is not None:
            check_own_pages(self.block_table, (tokens, rows))
        tokens.write()
        rows.write()
        for recent, x in zip(self._recent, known, strict=True):
            recent.copy_(self._latest(x, tokens.lengths))
        self.lengths = tokens.lengths

    def attend(
        self,
        q: Tensor,
        g_cmp: Tensor | None,
        g_slc: Tensor | None,
        g_win: Tensor | None,
        *,
        counts: Tensor | None = None,
        scale: float | None = None,
        backend: str = "auto",
    ) -> Tensor:
        """o (batch, TQ, HQ, Dv) of the last TQ tokens of each sequence, or of the last counts[b], which are q's
        first.
        """
        check_queries(q, packed=False)
        gates = check_gates(q, {"g_cmp": g_cmp, "g_slc": g_slc, "g_win": g_win})
        sequences = sequences_in_caches(
            q, self.selected[0], self.lengths, counts, block_table=self.block_table
        )
        call = BranchCall(q, sequences, self.sizes, scale_of(scale, q), backend)
        pairs = self.compressed, self.selected, self.window
        with torch.no_grad():
            branches, _ = call.branches(pairs, gates, None, wanted=g_slc is not None)
            return gated(branches)

    def _rows_of(self, known: list[Tensor], before: Tensor, more: Tensor) -> list[Tensor]:
        """Packed rows of k and v for the `more` blocks of each sequence behind the `before` that there are.

        known: the l recent tokens of each sequence, then the new ones.
        """
        compression = self.sizes.compression
        sequence = torch.repeat_interleave(torch.arange(len(more), device=more.device), more)
        within = torch.arange(len(sequence), device=more.device) - (more.cumsum(0) - more)[sequence]
        first = (before[sequence] + within) * compression.stride
        tokens = first[:, None] + torch.arange(compression.block, device=more.device)
        found: list[Tensor] = []
        for i, x in enumerate(known):
            made = self.phi[i](x[sequence[:, None], self._place(tokens, sequence)]).to(x.dtype)
            if i == 0 and self.place_k is not None:
                made = self.place_k(made, first).to(x.dtype)
            found.append(check_rows("what phi makes", made, x.flatten(0, 1), len(first)))
        return found

    def _latest(self, known: Tensor, lengths: Tensor) -> Tensor:
        """The last l tokens of each sequence, token t at t % l; what is there of fewer is anything."""
        block = self.sizes.compression.block
        slot = torch.arange(block, device=known.device)
        last = lengths.long()[:, None] - 1
        token = (last - (last - slot) % block).clamp(min=0)
        sequence = torch.arange(len(lengths), device=known.device)
        return known[sequence[:, None], self._place(token, sequence)]

    def _place(self, tokens: Tensor, sequence: Tensor) -> Any:
        """Where tokens (rows, ...) of sequences (rows,) lie behind each other: the l recent ones, then the new ones."""
        block, old = self.sizes.compression.block, self.lengths.long()[sequence][:, None]
        return torch.where(tokens >= old, block + tokens - old, tokens % block)

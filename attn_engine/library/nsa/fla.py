"""Native sparse attention (NSA, arXiv:2502.11089) with flash-linear-attention's names and arguments.

There l = d = l', and blocks are means. For any group of heads, any length, and gradients also where queries are fewer
than keys. Where the two differ from
that library: a query without a complete block has lse = -inf, and an integer `block_counts` is taken as it is.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from attn_engine.library.arguments import at_least
from attn_engine.library.nsa.arguments import (
    check_gates,
    check_pair,
    check_queries,
    given_blocks,
    scale_of,
)
from attn_engine.library.nsa.branches import over_blocks, over_selected, over_window
from attn_engine.library.nsa.compression import compress, mean_pooling
from attn_engine.library.nsa.gating import gated
from attn_engine.library.nsa.selection import selected
from attn_engine.library.nsa.sequences import CuSeqlens, Sequences, sequences_of, summed
from attn_engine.library.nsa.sizes import FORCED, Compression, power_of_two, refuse


def parallel_nsa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g_cmp: Tensor | None = None,
    g_slc: Tensor | None = None,
    g_swa: Tensor | None = None,
    block_indices: Tensor | None = None,
    block_counts: Tensor | int = 16,
    block_size: int = 64,
    window_size: int = 0,
    scale: float | None = None,
    cu_seqlens: CuSeqlens = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """o (B, TQ, HQ, V): the selected branch, the compressed one where g_cmp is given, a window where window_size > 0.

    q: (B, TQ, HQ, K), the last TQ tokens; k: (B, T, H, K), v: (B, T, H, V). cu_seqlens: integers (N + 1,) or (of q,
        of k), with B = 1. g_cmp, g_slc, g_swa: gates (B, TQ, HQ); g_slc and g_swa None: 1.
    block_indices: integers (B, TQ, H, S), instead of computed ones; without g_cmp they are needed. Blocks that there
        are not (-1, T) are none. block_counts: how many to compute, at least 3, or integers (B, TQ, H), for each token;
        with block_indices, how many of the leading ones count.
    window_size: tokens, the own one among them; 0: no window. scale: None is 1/sqrt(K). Raises WrongArgument.
    """
    batch = _Batch(q, k, v, block_size, scale, cu_seqlens, backend)
    at_least("window_size", window_size, 0)
    gates = {"g_cmp": g_cmp, "g_slc": g_slc, "g_swa": g_swa}
    flat = {name: None if g is None else batch.flat(g) for name, g in gates.items()}
    ones = torch.ones(batch.q.shape[:-1], dtype=q.dtype, device=q.device)
    of_cmp, of_slc, of_win = check_gates(batch.q, {**flat, "g_slc": ones} if g_slc is None else flat)
    branches: list[tuple[Tensor, Tensor]] = []
    if of_cmp is not None:
        rows = tuple(
            compress(x, mean_pooling, batch.sequences, batch.compression) for x in (batch.k, batch.v)
        )
        o, lse = batch.over_blocks((rows[0], rows[1]))
        branches.append((of_cmp, o))
        if block_indices is None:
            found, counts = batch.selected(rows[0], lse, block_counts), None
    elif block_indices is None:
        instead = "Give one of the two."
        refuse("block_indices", None, "given where g_cmp is not: nothing else says what is selected", instead)
    if block_indices is not None:
        found, counts = batch.given(block_indices, block_counts)
    branches.append((of_slc if of_slc is not None else ones, batch.over_selected(found, counts)))
    if window_size:
        o = over_window(batch.q, (batch.k, batch.v), batch.sequences, window_size, batch.scale, backend)
        branches.append((ones if of_win is None else of_win, o))
    return batch.shaped(gated(branches))


def parallel_nsa_compression(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    TK: int,
    block_size: int = 64,
    scale: float | None = None,
    cu_seqlens: CuSeqlens = None,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """O_cmp (B, TQ, HQ, V) and lse (B, TQ, HQ) over rows of blocks: k (B, ceil(TK / block_size), H, K) and v.

    TK: the number of tokens, or the rows of all. With cu_seqlens each sequence has ceil(its tokens / block_size) rows;
    the row of an incomplete block is never seen.
    """
    batch = _Batch(q, k, v, block_size, scale, cu_seqlens, backend, tokens=TK)
    o, lse = batch.over_blocks((batch.k, batch.v))
    return batch.shaped(o), batch.shaped(lse.transpose(-2, -1))


def parallel_nsa_topk(
    q: Tensor,
    k: Tensor,
    TK: int,
    lse: Tensor | None,
    block_counts: Tensor | int,
    block_size: int = 64,
    scale: float | None = None,
    cu_seqlens: CuSeqlens = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """int32 (B, TQ, H, S): the first, the two last and the most important blocks of each token, ascending, -1 behind.

    k: rows of blocks as of `parallel_nsa_compression`, lse: its second result, computed where None. block_counts: S, or
    integers (B, TQ, H) of which S is the largest.
    """
    batch = _Batch(q, k, k, block_size, scale, cu_seqlens, backend, tokens=TK)
    with torch.no_grad():
        of_rows = (
            batch.over_blocks((batch.k, batch.v))[1] if lse is None else batch.flat(lse).transpose(-2, -1)
        )
    return batch.shaped(batch.selected(batch.k, of_rows.contiguous(), block_counts))


class _Batch:
    """The tensors of one call as the branches want them: (B, T, ...), or packed (rows, ...) with cu_seqlens."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        block_size: int,
        scale: float | None,
        cu_seqlens: CuSeqlens,
        backend: str,
        tokens: int | None = None,
    ) -> None:
        power_of_two("block_size", block_size)
        self.compression, self.block_size = Compression(block_size, block_size), block_size
        self.packed, self.backend = cu_seqlens is not None, backend
        for name, x in (("q", q), ("k", k), ("v", v)):
            if self.packed and (x.ndim != 4 or x.shape[0] != 1):
                refuse(
                    name, tuple(x.shape), "(1, rows, heads, dim) with cu_seqlens", "Put sequences in one row."
                )
        self.q, self.k, self.v = (self.flat(x) for x in (q, k, v))
        check_queries(self.q, self.packed)
        check_pair(("k", "v"), (self.k, self.v), self.q, (self.k, self.v))
        self.scale = scale_of(scale, q)
        self.sequences = (
            sequences_of(self.q, self.k.shape[-3], cu_seqlens)
            if tokens is None
            else _of_rows(self.q, tokens, block_size, cu_seqlens)
        )

    def flat(self, x: Tensor) -> Tensor:
        return x[0] if self.packed else x

    def shaped(self, x: Tensor) -> Tensor:
        return x[None] if self.packed else x

    def over_blocks(self, rows: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return over_blocks(self.q, rows, self.sequences, self.compression, self.scale, self.backend)

    def over_selected(self, found: Tensor, counts: Tensor | None) -> Tensor:
        kv, size = (self.k, self.v), self.block_size
        return over_selected(self.q, kv, found, self.sequences, size, self.scale, self.backend, counts)

    def given(self, block_indices: Tensor, block_counts: Tensor | int) -> tuple[Tensor, Tensor | None]:
        """Blocks of the call, and how many of each row's leading ones count."""
        blocks = -(-self.k.shape[-3] // self.block_size)
        found = given_blocks(self.flat(block_indices), self.q, self.k.shape[-2], blocks)
        return found, self.counts(block_counts) if isinstance(block_counts, Tensor) else None

    def counts(self, block_counts: Tensor) -> Tensor:
        """(batch, TQ, H) or packed (rows, H)."""
        counts = self.flat(block_counts)
        if counts.shape != (*self.q.shape[:-2], self.k.shape[-2]) or counts.dtype.is_floating_point:
            expected = f"integers of the shape {(*self.q.shape[:-2], self.k.shape[-2])}, tokens and kv heads"
            refuse(
                "block_counts", f"{counts.dtype} {tuple(counts.shape)}", expected, "Or give one int for all."
            )
        return counts

    def selected(self, rows_k: Tensor, lse: Tensor, block_counts: Tensor | int) -> Tensor:
        """The blocks of most importance; for every number that block_counts names once, in rows that ask for it."""
        if not isinstance(block_counts, Tensor):
            at_least("block_counts", block_counts, FORCED)
            return self._selected(rows_k, lse, block_counts)
        counts = self.counts(block_counts)
        numbers = sorted(set(counts.flatten().tolist()))
        at_least("block_counts", min(numbers, default=FORCED), FORCED)
        found = torch.full(
            (*counts.shape, max(numbers, default=FORCED)), -1, dtype=torch.int32, device=counts.device
        )
        for number in numbers:
            of_number = self._selected(rows_k, lse, number)
            found[..., :number] = torch.where((counts == number)[..., None], of_number, found[..., :number])
        return found

    def _selected(self, rows_k: Tensor, lse: Tensor, number: int) -> Tensor:
        return selected(
            self.q, rows_k, lse, self.sequences, self.compression, self.block_size, number, self.scale, self.backend
        )  # fmt: skip


def _of_rows(q: Tensor, tokens: int, block_size: int, cu_seqlens: CuSeqlens) -> Sequences:
    """The places of a call that has no tokens but the rows of their blocks, the incomplete one among them."""
    at_least("TK", tokens, 0)
    found = sequences_of(q, tokens, cu_seqlens)
    if found.cumulative is None:
        return found
    counts = (found.cumulative[1].diff() + block_size - 1).div(block_size, rounding_mode="floor")
    return replace(found, rows=summed(counts))

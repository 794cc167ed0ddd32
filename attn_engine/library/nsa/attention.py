"""Native sparse attention (NSA, arXiv:2502.11089, sections 3.2 and 3.3).

o = g_cmp O_cmp + g_slc O_slc + g_win O_win for every query head: attention over rows that stand for blocks of
tokens, over the tokens of the n blocks that these found important, and over the last w tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attn_engine.library.nsa.arguments import (
    check_function,
    check_gates,
    check_pair,
    check_queries,
    check_rows,
    given_blocks,
    scale_of,
)
from attn_engine.library.nsa.branches import Pair, over_blocks, over_selected, over_window
from attn_engine.library.nsa.compression import Phi, Place, compress, mean_pooling
from attn_engine.library.nsa.gating import gated
from attn_engine.library.nsa.selection import selected
from attn_engine.library.nsa.sequences import CuSeqlens, Sequences, sequences_of
from attn_engine.library.nsa.sizes import Compression, Sizes


def native_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g_cmp: Tensor | None,
    g_slc: Tensor | None,
    g_win: Tensor | None,
    *,
    k_slc: Tensor | None = None,
    v_slc: Tensor | None = None,
    k_win: Tensor | None = None,
    v_win: Tensor | None = None,
    compress_k: Phi = mean_pooling,
    compress_v: Phi = mean_pooling,
    place_k: Place | None = None,
    compression_block: int = 32,
    compression_stride: int = 16,
    selection_block: int = 64,
    selected_blocks: int = 16,
    window: int = 512,
    scale: float | None = None,
    cu_seqlens: CuSeqlens = None,
    block_indices: Tensor | None = None,
    return_block_indices: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Three attentions of each query token, weighed by its gates: (batch, TQ, HQ, Dv).

    q: (batch, TQ, HQ, D), the last TQ of T tokens. k: (batch, T, H, D), v: (batch, T, H, Dv), HQ a multiple of H. With
        cu_seqlens, integers (sequences + 1,) or a pair of them for q and k, all are packed: (rows, heads, D).
    g_cmp, g_slc, g_win: (batch, TQ, HQ), or packed (rows, HQ), mostly in [0, 1]; a branch whose gate is None is left
        out.
    k, v: of the compressed branch; k_slc, v_slc, k_win, v_win: of the others, where they are not the same.
    compress_k, compress_v: phi, from blocks (..., l, H, D) to rows (..., H, D): mean_pooling, WeightedPooling(H, l),
        LinearCompression(H, l, D), PerceptronCompression(H, l, D, hidden), or any function.
    place_k: what becomes of compressed keys at the first positions of their blocks, (rows, positions) -> rows, such as
        Rotary(D), where k is not rotated yet.
    compression_block l, compression_stride d, selection_block l', selected_blocks n, window w: d divides l and l',
        l' is a power of two and at least l, n at least 3. Tokens that fill no block are not compressed.
    scale: None is 1/sqrt(D). block_indices: integers (batch, TQ, H, any number) or packed (rows, H, any number), the
        blocks to attend to instead of the most important ones; those that there are not, such as -1, are none.
    return_block_indices: also the blocks that were attended to, int32, computed ones ascending with -1 behind.

    Differentiable in q, all keys and values, the gates and what phi learns, not through the selection. Nothing of
    T x T or T x blocks elements is ever in memory. Raises WrongArgument.
    """
    compression = Compression(compression_block, compression_stride)
    sizes = Sizes(compression, selection_block, selected_blocks, window)
    check_queries(q, packed=cu_seqlens is not None)
    pairs = {
        ("k", "v"): (k, v),
        ("k_slc", "v_slc"): (k if k_slc is None else k_slc, v if v_slc is None else v_slc),
        ("k_win", "v_win"): (k if k_win is None else k_win, v if v_win is None else v_win),
    }
    for names, pair in pairs.items():
        check_pair(names, pair, q, (k, v))
    _, slc, win = pairs.values()
    g_cmp, g_slc, g_win = check_gates(q, {"g_cmp": g_cmp, "g_slc": g_slc, "g_win": g_win})
    sequences = sequences_of(q, k.shape[-3], cu_seqlens)
    rows = compressed_pair(k, v, (compress_k, compress_v), place_k, sequences, compression)
    wanted = return_block_indices or g_slc is not None
    call = BranchCall(q, sequences, sizes, scale_of(scale, q), backend)
    branches, found = call.branches((rows, slc, win), (g_cmp, g_slc, g_win), block_indices, wanted)
    o = gated(branches)
    return (o, found) if return_block_indices and found is not None else o


def compressed_pair(
    k: Tensor,
    v: Tensor,
    phi: tuple[Phi, Phi],
    place_k: Place | None,
    sequences: Sequences,
    compression: Compression,
) -> Pair:
    """The rows that stand for blocks; raises WrongArgument for a phi that gives others."""
    for name, f in zip(("compress_k", "compress_v"), phi, strict=True):
        check_function(name, f)
    blocks = sequences.blocks(compression)
    rows_k, rows_v = (
        check_rows(name, compress(x, f, sequences, compression), x, blocks)
        for name, x, f in zip(("compress_k(blocks)", "compress_v(blocks)"), (k, v), phi, strict=True)
    )
    if place_k is not None:
        positions = sequences.block_positions(compression, k.device)
        rows_k = check_rows("place_k(rows, positions)", place_k(rows_k, positions).to(k.dtype), k, blocks)
    return rows_k, rows_v


@dataclass(frozen=True, slots=True, eq=False)
class BranchCall:
    """What the branches of one call share."""

    q: Tensor
    sequences: Sequences
    sizes: Sizes
    scale: float
    backend: str

    def branches(
        self,
        pairs: tuple[Pair, Pair, Pair],
        gates: tuple[Tensor | None, Tensor | None, Tensor | None],
        block_indices: Tensor | None,
        wanted: bool,
    ) -> tuple[list[tuple[Tensor, Tensor]], Tensor | None]:
        """(gate, o) of the branches with a gate, and the selected blocks where they are wanted.

        pairs: keys and values of the branches; those of the first are rows of blocks.
        """
        (cmp, slc, win), (g_cmp, g_slc, g_win) = pairs, gates
        found: list[tuple[Tensor, Tensor]] = []
        lse = None
        if g_cmp is not None or (wanted and block_indices is None):
            with torch.set_grad_enabled(torch.is_grad_enabled() and g_cmp is not None):
                o, lse = over_blocks(
                    self.q, cmp, self.sequences, self.sizes.compression, self.scale, self.backend
                )
            if g_cmp is not None:
                found.append((g_cmp, o))
        blocks = self.blocks(cmp[0], lse, slc[0], block_indices) if wanted else None
        if g_slc is not None and blocks is not None:
            o = over_selected(
                self.q, slc, blocks, self.sequences, self.sizes.selection_block, self.scale, self.backend
            )
            found.append((g_slc, o))
        if g_win is not None:
            found.append(
                (g_win, over_window(self.q, win, self.sequences, self.sizes.window, self.scale, self.backend))
            )
        return found, blocks

    def blocks(self, k_cmp: Tensor, lse: Tensor | None, k: Tensor, block_indices: Tensor | None) -> Tensor:
        """The blocks that were given, or those of most importance."""
        if lse is None or block_indices is not None:
            count = -(-k.shape[-3] // self.sizes.selection_block)
            return given_blocks(block_indices, self.q, k.shape[-2], count)
        sizes = self.sizes
        return selected(
            self.q, k_cmp, lse, self.sequences, sizes.compression,
            sizes.selection_block, sizes.selected_blocks, self.scale, self.backend,
        )  # fmt: skip

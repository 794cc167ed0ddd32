"""BlockMask: which blocks of queries and keys a mask meets. FlexAttention's object, held as compact rows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from attn_engine.frontend import MaskMod
from attn_engine.masks.lists import BlockLists, Csr, Side
from attn_engine.masks.mistakes import BlockMaskMismatch, WrongBlockMask
from attn_engine.masks.plan import BlockPlan, MaskSource, both_sides
from attn_engine.masks.rows import chosen, padded, rows_of
from attn_engine.masks.sliced import Rows, adjusted, block_rows, sliced_mask

Index = int | slice | Tensor


class BlockMask:
    """A mask in blocks, for q of (B, H, Q_LEN) and kv of (KV_LEN): made by `create_block_mask` or `from_kv_blocks`.

    `lists()` is what kernels read: both sides, partial and full blocks apart, exact. A mask made from a mask_mod is
    that of the moment of the call: where a tensor or a number that the mask_mod reads has changed, the lists are made
    anew.
    The attributes of torch's BlockMask (kv_num_blocks, kv_indices, full_kv_..., q_..., full_q_...) are made from the
    lists when they are read; they are padded to all blocks of a row.

    mask_mod: what holds in partial blocks; None where these are wholly visible too. Setting it keeps the blocks as
    they are.
    """

    def __init__(
        self,
        blocks: BlockLists | MaskSource,
        mask_mod: MaskMod | None,
        batch: int,
        heads: int,
        *,
        separate_full: bool = True,
        has_q_blocks: bool = True,
    ) -> None:
        """blocks: the lists, or what makes them. separate_full, has_q_blocks: False leaves torch's full_... and q_...
        attributes None."""
        self._lists = blocks if isinstance(blocks, BlockLists) else None
        self._source = None if isinstance(blocks, BlockLists) else blocks
        self._mask_mod = mask_mod
        self._batch, self._heads = batch, heads
        self._separate_full, self._has_q_blocks = separate_full, has_q_blocks
        self._padded: tuple[BlockLists, dict[str, tuple[Tensor, Tensor]]] | None = None

    # -- what kernels read

    def lists(self) -> BlockLists:
        """The exact block lists of this moment."""
        if self._source is not None:
            return self._source.plan().lists
        assert self._lists is not None
        return self._lists

    @property
    def plan(self) -> BlockPlan | None:
        """The closed form of this moment, at no cost per block; None for a mask that was given as blocks."""
        return None if self._source is None else self._source.plan()

    def check_call(self, batch: int, heads: int, q_len: int, kv_len: int) -> None:
        """Raise BlockMaskMismatch unless the mask fits a call's sizes; a B or H of 1 fits all."""
        sizes = {
            "Q_LEN": (self.seq_lengths[0], q_len),
            "KV_LEN": (self.seq_lengths[1], kv_len),
            "B": (self._batch, batch),
            "H": (self._heads, heads),
        }
        for what, (got, expected) in sizes.items():
            if got != expected and not (got == 1 and what in ("B", "H")):
                raise BlockMaskMismatch(what=what, got=got, expected=expected)

    # -- what torch's has

    @property
    def mask_mod(self) -> MaskMod | None:
        return self._mask_mod

    @mask_mod.setter
    def mask_mod(self, mask_mod: MaskMod | None) -> None:
        self._lists, self._source = self.lists(), None
        self._mask_mod = mask_mod

    @property
    def BLOCK_SIZE(self) -> tuple[int, int]:
        if self._source is not None:
            return self._source.block_size
        lists = self.lists()
        return lists.block_q, lists.block_kv

    @property
    def seq_lengths(self) -> tuple[int, int]:
        if self._source is not None:
            return self._source.lengths
        lists = self.lists()
        return lists.q_len, lists.kv_len

    @seq_lengths.setter
    def seq_lengths(self, lengths: tuple[int, int]) -> None:
        lists = self.lists()
        blocks = tuple(-(-n // size) for n, size in zip(lengths, self.BLOCK_SIZE, strict=True))
        if blocks != (lists.q_blocks, lists.kv_blocks):
            expected = f"a pair of lengths of {lists.q_blocks} and {lists.kv_blocks} blocks"
            instead = "Make a mask for these lengths with create_block_mask."
            raise WrongBlockMask(argument="seq_lengths", got=lengths, expected=expected, instead=instead)
        self._lists, self._source = replace(lists, q_len=lengths[0], kv_len=lengths[1]), None

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, H, Q_LEN, KV_LEN)."""
        return self._batch, self._heads, *self.seq_lengths

    @property
    def device(self) -> torch.device:
        return self._source.device if self._source is not None else self.lists().by_q.full.starts.device

    def numel(self) -> int:
        """Pairs of positions, seen or not."""
        batch, heads, q_len, kv_len = self.shape
        return batch * heads * q_len * kv_len

    def sparsity(self) -> float:
        """The percentage of pairs that lie in no listed block. A ragged end counts as a whole block, as in torch."""
        lists = self.lists()
        share = self._batch * self._heads // (lists.shape[0] * lists.shape[1])
        seen = (len(lists.by_q.full.indices) + len(lists.by_q.partial.indices)) * share
        return 100 * (1 - seen * lists.block_q * lists.block_kv / self.numel())

    def to_dense(self) -> Tensor:
        """1 for each listed block: int32 (B, H, q blocks, kv blocks)."""
        lists = self.lists()
        dense = torch.zeros(
            (*lists.shape, lists.q_blocks, lists.kv_blocks), dtype=torch.int32, device=self.device
        )
        for csr in (lists.by_q.full, lists.by_q.partial):
            dense |= _dense(csr, lists.kv_blocks)
        return dense.expand(self._batch, self._heads, *dense.shape[2:])

    def to_string(self, grid_size: int | tuple[int, int] = (20, 20), limit: int = 4) -> str:
        """The blocks as characters, two per cell: █ all listed, ░ some, space none. At most `limit` of batch x heads.

        grid_size: at most so many rows and columns; -1: one cell per block.
        """
        from attn_engine.masks.text import torch_text

        return torch_text(self, grid_size, limit)

    def draw(self, kind: str = "text", batch: int = 0, head: int = 0, **options: Any) -> Any:
        """A picture of one batch and head with block classes, skipped share and work per row.

        kind: "text", "svg", "html" (all str) or "png" (bytes; needs matplotlib). cells: at most so many rows and
        columns; a larger mask is drawn coarser.
        """
        from attn_engine.masks.draw import draw

        return draw(self, kind, batch, head, **options)

    def to(self, device: torch.device | str) -> BlockMask:
        """The same blocks on a device. The tensors that mask_mod reads are moved by whoever made it."""
        return self._like(self.lists().to(device), self._mask_mod, self._batch, self._heads)

    def __getitem__(self, index: Index | tuple[Index, ...]) -> BlockMask:
        """Chosen batches, heads and blocks of queries; an int keeps its dimension with size 1, as in torch.

        mask_mod goes along: what it is asked is where each position lay before.
        """
        rows: Rows = block_rows(self, index)
        lists = self.lists()
        by_q = Side(chosen(lists.by_q.partial, rows.of_lists), chosen(lists.by_q.full, rows.of_lists))
        cut = both_sides(self.BLOCK_SIZE, (rows.q_len, lists.kv_len), by_q)
        batch, heads = rows.of_lists.shape[:2]
        return self._like(cut, sliced_mask(self, rows), batch, heads)

    def _adjust(self, new_q_len: int, new_kv_len: int) -> BlockMask:
        """The same mask for other lengths: what torch's users call to reuse a mask for a shorter call."""
        return adjusted(self, new_q_len, new_kv_len)

    @property
    def source(self) -> MaskSource | None:
        """What the lists are made from; None for a mask that was given as blocks."""
        return self._source

    def like(self, blocks: BlockLists | MaskSource) -> BlockMask:
        """Other blocks of the same batches, heads and mask_mod."""
        return self._like(blocks, self._mask_mod, self._batch, self._heads)

    def _like(
        self, lists: BlockLists | MaskSource, mask_mod: MaskMod | None, batch: int, heads: int
    ) -> BlockMask:
        kept = {"separate_full": self._separate_full, "has_q_blocks": self._has_q_blocks}
        return BlockMask(lists, mask_mod, batch, heads, **kept)

    @classmethod
    def from_kv_blocks(
        cls,
        kv_num_blocks: Tensor,
        kv_indices: Tensor,
        full_kv_num_blocks: Tensor | None = None,
        full_kv_indices: Tensor | None = None,
        BLOCK_SIZE: int | tuple[int, int] = 128,
        mask_mod: MaskMod | None = None,
        seq_lengths: tuple[int, int] | None = None,
        compute_q_blocks: bool = True,
    ) -> BlockMask:
        """From the blocks of keys that each block of queries meets: (B, H, q blocks) and (B, H, q blocks, width), int.

        Those of `full_...` are wholly visible; mask_mod holds in the others (None: wholly visible too).
        compute_q_blocks: False leaves q_num_blocks and its like None, as in torch; `lists()` has both sides anyway.
        """
        from attn_engine.masks.torch_mask import from_padded_blocks

        tensors = (kv_num_blocks, kv_indices, full_kv_num_blocks, full_kv_indices)
        return from_padded_blocks(tensors, BLOCK_SIZE, mask_mod, seq_lengths, compute_q_blocks)

    @classmethod
    def from_torch(cls, block_mask: Any) -> BlockMask:
        """From a BlockMask of torch (any object with its attributes, read by name)."""
        from attn_engine.masks.torch_mask import from_torch

        return from_torch(block_mask)

    def to_torch(self) -> Any:
        """torch.nn.attention.flex_attention.BlockMask with the same blocks, both sides."""
        from attn_engine.masks.torch_mask import to_torch

        return to_torch(self)

    def __repr__(self) -> str:
        name = getattr(self._mask_mod, "__name__", self._mask_mod)
        return (
            f"BlockMask(shape={self.shape}, BLOCK_SIZE={self.BLOCK_SIZE}, sparsity={self.sparsity():.2f}%, "
            f"mask_mod={name})"
        )

    def __str__(self) -> str:
        return (
            f"BlockMask(shape={self.shape}, sparsity={self.sparsity():.2f}%,\n{self.to_string().strip()}\n)"
        )

    def _repr_html_(self) -> str:
        return self.draw("html")

    def _repr_svg_(self) -> str:
        return self.draw("svg")

    # -- torch's padded attributes

    def padded(self, name: str) -> tuple[Tensor, Tensor] | None:
        """(counts, indices) of one of "kv", "full_kv", "q", "full_q", padded as torch has them: O(blocks^2) memory."""
        full, by_kv = name.startswith("full"), name.endswith("q")
        if (full and not self._separate_full) or (by_kv and not self._has_q_blocks):
            return None
        lists = self.lists()
        if self._padded is None or self._padded[0] is not lists:
            self._padded = lists, {}
        kept = self._padded[1]
        if name not in kept:
            side, width = (lists.by_kv, lists.q_blocks) if by_kv else (lists.by_q, lists.kv_blocks)
            counts, indices = padded(side.full if full else side.partial, width)
            shape = (self._batch, self._heads)
            kept[name] = counts.expand(*shape, -1).contiguous(), indices.expand(*shape, -1, -1).contiguous()
        return kept[name]

    def _part(self, name: str, which: int) -> Any:
        found = self.padded(name)
        return None if found is None else found[which]

    kv_num_blocks = property(lambda self: self._part("kv", 0))
    kv_indices = property(lambda self: self._part("kv", 1))
    full_kv_num_blocks = property(lambda self: self._part("full_kv", 0))
    full_kv_indices = property(lambda self: self._part("full_kv", 1))
    q_num_blocks = property(lambda self: self._part("q", 0))
    q_indices = property(lambda self: self._part("q", 1))
    full_q_num_blocks = property(lambda self: self._part("full_q", 0))
    full_q_indices = property(lambda self: self._part("full_q", 1))


def _dense(csr: Csr, width: int) -> Tensor:
    batch, heads, n = csr.starts.shape
    dense = torch.zeros((batch * heads * (n - 1), width), dtype=torch.int32, device=csr.starts.device)
    dense[rows_of(csr), csr.indices.to(torch.int64)] = 1
    return dense.reshape(batch, heads, n - 1, width)


def _flatten(mask: BlockMask) -> tuple[list[Any], Any]:
    lists = mask.lists()
    csrs = [csr for side in (lists.by_q, lists.by_kv) for csr in (side.partial, side.full)]
    tensors = [x for csr in csrs for x in (csr.starts, csr.indices)]
    sizes = (lists.block_q, lists.block_kv, lists.q_len, lists.kv_len)
    return tensors, (sizes, mask.shape[:2], mask.mask_mod, mask._separate_full, mask._has_q_blocks)


def _unflatten(tensors: Any, context: Any) -> BlockMask:
    sizes, (batch, heads), mask_mod, separate_full, has_q_blocks = context
    a, b, c, d = (Csr(tensors[i], tensors[i + 1]) for i in range(0, len(tensors), 2))
    block_q, block_kv, q_len, kv_len = sizes
    lists = BlockLists(block_q, block_kv, q_len, kv_len, Side(a, b), Side(c, d))
    return BlockMask(lists, mask_mod, batch, heads, separate_full=separate_full, has_q_blocks=has_q_blocks)


pytree.register_pytree_node(BlockMask, _flatten, _unflatten, serialized_type_name="attn_engine.BlockMask")

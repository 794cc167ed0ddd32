"""Any BlockMask, this package's or torch's, as one mask_mod that says the same.

A BlockMask is block lists and a mask_mod. Where the lists are those of the mask_mod, it alone says everything, and
kernels take their ranges from it. Where they say more (made by hand, cut, sliced), kernels walk over the lists. What
has no kernels over lists (a compiled graph, vmap, the reference, blocks of sizes that no tile fits) asks a small table
of block classes for every pair instead: as right, but nothing is skipped.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attn_engine.errors import AttnEngineError, DeviceMismatch
from attn_engine.masks import BlockLists, BlockMask
from attn_engine.masks.mistakes import BlockMaskMismatch, NotABlockMask, WrongBlockMask
from attn_engine.masks.plan import BlockPlan, MaskSource
from attn_engine.runtime.block_lists import fits_tiles

Mask = Callable[..., Any]
WHOLE = (1 << 30, 1 << 30)  # torch's block size of a mask that is one block: it fits every length
PARTIAL, FULL = 1, 2
_FIELDS = ("mask_mod", "BLOCK_SIZE", "kv_num_blocks", "kv_indices", "seq_lengths")
_LISTS = ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices")


def mask_of(
    block_mask: Any, query: Tensor, key: Tensor, by_lists: bool
) -> tuple[Mask | None, BlockLists | None]:
    """The mask of a BlockMask for these tensors, None where it keeps every pair; and lists of the blocks that count.

    by_lists: whether kernels over lists can be used. Lists are None where the mask alone says everything.
    Raises NotABlockMask, BlockMaskMismatch and DeviceMismatch where it is none or does not fit them.
    """
    own = isinstance(block_mask, BlockMask)
    if not own:
        for name in _FIELDS:
            if not hasattr(block_mask, name):
                got = type(block_mask).__name__
                raise NotABlockMask(argument="block_mask", got=f"a {got}", missing=name)
        if tuple(block_mask.BLOCK_SIZE) == WHOLE:
            return _mask_mod(block_mask), None
    _check_sizes(block_mask, query, key)
    device = block_mask.device if own else block_mask.kv_num_blocks.device
    if device != query.device:
        raise DeviceMismatch(argument="block_mask", got=device, expected=query.device)
    mask_mod = _mask_mod(block_mask)
    if _says_all(block_mask):
        return mask_mod, None
    q_block, kv_block = block_mask.BLOCK_SIZE
    if by_lists and fits_tiles(q_block, kv_block):
        return mask_mod, block_mask.lists() if own else _verdict(block_mask).lists(block_mask)
    blocks = table_of(block_mask).expand(query.shape[0], query.shape[1], -1, -1)
    return listed(mask_mod, blocks, q_block, kv_block), None


def _check_sizes(block_mask: Any, query: Tensor, key: Tensor) -> None:
    lengths = tuple(block_mask.seq_lengths)
    for what, got, expected in zip(("Q_LEN", "KV_LEN"), lengths, (query.shape[2], key.shape[2]), strict=True):
        if got != expected:
            raise BlockMaskMismatch(what=what, got=got, expected=expected)
    sizes = block_mask.shape[:-2]
    if len(sizes) != 2:
        instead = "Add leading dimensions of 1 to its lists."
        expected = "a mask with a batch and a head dimension"
        raise WrongBlockMask(
            argument="block_mask.shape", got=tuple(block_mask.shape), expected=expected, instead=instead
        )
    for what, got, expected in zip("BH", sizes, query.shape, strict=False):
        if got not in (1, expected):
            raise BlockMaskMismatch(what=what, got=got, expected=expected)


def _mask_mod(block_mask: Any) -> Mask | None:
    mask_mod = block_mask.mask_mod
    if mask_mod is None:
        return None
    name, module = getattr(mask_mod, "__name__", ""), getattr(mask_mod, "__module__", "") or ""
    if name == "_sliced_mask_mod_error" and module.startswith("torch."):
        raise WrongBlockMask(
            argument="block_mask.mask_mod",
            got=name,
            expected="a mask: slicing a BlockMask of torch leaves it without one",
            instead="Set it from the mask that was sliced, with positions counted from the slice's start.",
        )
    return None if name == "noop_mask" and module.startswith(("torch.", "attn_engine.")) else mask_mod


def listed(mask_mod: Mask | None, blocks: Tensor, q_block: int, kv_block: int) -> Mask:
    """A pair counts where its block is listed as full, or as partial and mask_mod keeps it."""
    if mask_mod is None:
        return lambda b, h, q_idx, kv_idx: blocks[b, h, q_idx // q_block, kv_idx // kv_block] > 0

    def listed_mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        block = blocks[b, h, q_idx // q_block, kv_idx // kv_block]
        return (block == FULL) | ((block == PARTIAL) & mask_mod(b, h, q_idx, kv_idx))

    return listed_mask


# -- whether the lists are those of the mask_mod


class _Verdict:
    """What is known of one BlockMask of torch: its lists at one state, whether its mask_mod says them all."""

    def __init__(self, block_mask: Any, state: tuple[int, ...]) -> None:
        self.state = state
        self.table = _table(block_mask)
        self._lists: BlockLists | None = None
        self.source: MaskSource | None = None
        self.plan: BlockPlan | None = None
        mask_mod = _mask_mod(block_mask)
        if mask_mod is None:
            self.says_all = bool((self.table > 0).all())
        else:
            self.says_all = False
            counts = block_mask.kv_num_blocks
            batch, heads = counts.shape[:2]
            size, lengths = tuple(block_mask.BLOCK_SIZE), tuple(block_mask.seq_lengths)
            self.source = MaskSource(mask_mod, batch, heads, lengths, counts.device, size)

    def lists(self, block_mask: Any) -> BlockLists:
        """The lists of the mask that this is about, as kernels read them; the same ones each time."""
        if self._lists is None:
            self._lists = BlockMask.from_torch(block_mask).lists()
        return self._lists

    def now(self) -> bool:
        """Looked at again where what the mask_mod reads has changed."""
        if self.source is None:
            return self.says_all
        try:
            plan = self.source.plan()
            if plan is not self.plan:
                self.plan = plan
                self.says_all = bool(_covers(table_of_lists(plan.lists), self.table))
        except AttnEngineError:
            self.says_all = (
                False  # the table is exact for every mask; what is wrong shows when the mask is traced
            )
        return self.says_all


def _covers(of_mask: Tensor, given: Tensor) -> Tensor:
    """Whether lists leave a mask as it is: nothing visible is left out, nothing hidden is called full."""
    return (((given > 0) | (of_mask == 0)) & ((given < FULL) | (of_mask == FULL))).all()


_verdicts: weakref.WeakKeyDictionary[Any, _Verdict] = weakref.WeakKeyDictionary()


def _verdict(block_mask: Any) -> _Verdict:
    lists = [x for name in _LISTS if (x := getattr(block_mask, name, None)) is not None]
    state = (
        id(block_mask.mask_mod),
        *(n for x in lists for n in (id(x), 0 if x.is_inference() else x._version)),
    )
    found = _verdicts.get(block_mask)
    if found is None or found.state != state:
        found = _verdicts[block_mask] = _Verdict(block_mask, state)
    return found


def _says_all(block_mask: Any) -> bool:
    """Whether the mask_mod alone is the mask. In a compiled graph this is a constant, guarded by the object."""
    if isinstance(block_mask, BlockMask):
        return block_mask._source is not None
    return _verdict(block_mask).now()


_says_all._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


# -- the table


def table_of(block_mask: Any) -> Tensor:
    """(Bm, Hm, query blocks, key blocks) int32: 0 for blocks in no list, PARTIAL, FULL."""
    if isinstance(block_mask, BlockMask):
        return _own_table(block_mask)
    return _table(block_mask) if torch.compiler.is_compiling() else _verdict(block_mask).table


_own_tables: weakref.WeakKeyDictionary[BlockMask, tuple[BlockLists, Tensor]] = weakref.WeakKeyDictionary()


def _own_table(block_mask: BlockMask) -> Tensor:
    lists, found = block_mask.lists(), _own_tables.get(block_mask)
    if found is None or found[0] is not lists:
        found = _own_tables[block_mask] = lists, table_of_lists(lists)
    return found[1]


_own_table._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


def table_of_lists(lists: BlockLists) -> Tensor:
    """The table of this package's lists."""
    table = torch.zeros((*lists.shape, lists.q_blocks, lists.kv_blocks), dtype=torch.int32)
    flat = table.view(-1, lists.kv_blocks)
    for csr, value in ((lists.by_q.partial, PARTIAL), (lists.by_q.full, FULL)):
        rows = torch.arange(flat.shape[0]).repeat_interleave(csr.counts().flatten().cpu().long())
        flat[rows, csr.indices.cpu().long()] = value
    return table.to(lists.by_q.full.starts.device)


def _table(block_mask: Any) -> Tensor:
    (q_len, kv_len), (q_block, kv_block) = block_mask.seq_lengths, block_mask.BLOCK_SIZE
    shape = -(-q_len // q_block), -(-kv_len // kv_block)
    table = _scattered(block_mask.kv_num_blocks, block_mask.kv_indices, shape) * PARTIAL
    if getattr(block_mask, "full_kv_num_blocks", None) is not None:
        full = _scattered(block_mask.full_kv_num_blocks, block_mask.full_kv_indices, shape)
        table = torch.where(full > 0, FULL, table)
    return table


def _scattered(counts: Tensor, indices: Tensor, shape: tuple[int, int]) -> Tensor:
    """1 where a block is listed: of each row of `indices`, the first `counts` entries; the rest is undefined."""
    rows, columns = shape
    listed = torch.arange(indices.shape[-1], device=counts.device) < counts[..., None]
    target = torch.where(listed, indices.long(), columns)
    table = torch.zeros((*counts.shape, columns + 1), dtype=torch.int32, device=counts.device)
    return table.scatter_(-1, target, 1)[..., :rows, :columns].contiguous()

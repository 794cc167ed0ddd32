"""Block lists as tensors of a call: under the kernels' names, in its batches and heads, checked before a launch.

A program with `listed` reads eight tensors beside its captured ones (`tensor_names`): for both loops and both kinds of
list, where each block's list starts and the blocks themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from attn_engine.codegen.lower.listed import KINDS, blocks_param, seen_param, starts_param
from attn_engine.codegen.lower.paged import BLOCK_TABLE
from attn_engine.codegen.lower.scaled import SCALES
from attn_engine.codegen.schedule import SMALLEST_BLOCK
from attn_engine.errors import AttnEngineError
from attn_engine.ir.passes.mask_range import OTHER
from attn_engine.ir.program import Attention, ListedBlocks
from attn_engine.runtime.sequences import PLACE_NAMES, SPAN_NAMES


class WrongBlockLists(AttnEngineError, ValueError):
    template = "block_mask: {what} is {got}, not {expected}."
    advice = "{instead}"


class BlockSizeNotSupported(AttnEngineError, NotImplementedError):
    template = "block_mask: {argument}={got} is not a multiple of {smallest}."
    advice = (
        "Use blocks of a multiple of {smallest} positions (powers of two are fastest) and leave the finer pattern to "
        "mask_mod, with its blocks in the partial lists."
    )


class Csr(Protocol):
    """Lists one after the other: starts int32 (Bm, Hm, blocks + 1), indices int32 (n,)."""

    @property
    def starts(self) -> Tensor: ...
    @property
    def indices(self) -> Tensor: ...


class Side(Protocol):
    @property
    def partial(self) -> Csr: ...
    @property
    def full(self) -> Csr: ...


class Lists(Protocol):
    """What a block mask is to the kernels (`attn_engine.masks.lists.BlockLists`)."""

    @property
    def block_q(self) -> int: ...
    @property
    def block_kv(self) -> int: ...
    @property
    def q_len(self) -> int: ...
    @property
    def kv_len(self) -> int: ...
    @property
    def by_q(self) -> Side: ...
    @property
    def by_kv(self) -> Side: ...


def names_of_list(listed: ListedBlocks, loop: str, kind: str) -> tuple[str, ...]:
    """Where lists begin, their blocks, and the bits of blocks that are visible in parts."""
    seen = (seen_param(loop),) if kind == "partial" and listed.tested else ()
    return (starts_param(loop, kind), blocks_param(loop, kind), *seen)


def list_names(listed: ListedBlocks) -> tuple[str, ...]:
    """The tensors of a call's lists, for both loops and every kind."""
    return tuple(
        name for loop in ("kv", "q") for kind in listed.kinds for name in names_of_list(listed, loop, kind)
    )


_AS_MADE = "Make it with create_block_mask, or as attn_engine.masks.lists says."


def tensor_names(program: Attention) -> tuple[str, ...]:
    """The tensors of a call beside q, k and v: captured ones, then lists, then the rows of its sequences,
    then the scales of its caches."""
    lists = list_names(program.listed) if program.listed else ()
    spans = SPAN_NAMES if program.sequences else ()
    pages = (BLOCK_TABLE,) if program.sequences and program.sequences.page else ()
    places = PLACE_NAMES if program.sequences and program.sequences.listed else ()
    scales = SCALES if program.cache else ()
    return (*(c.name for c in program.captures), *lists, *spans, *pages, *places, *scales)


def fits_tiles(block_q: int, block_kv: int) -> bool:
    """Whether kernels can walk over blocks of these sizes, wherever the blocks lie."""
    return block_q % SMALLEST_BLOCK == block_kv % SMALLEST_BLOCK == 0


def listed_blocks(lists: Lists, heads: int, kv_heads: int) -> ListedBlocks:
    """What kernels for these lists have compiled in; raises BlockSizeNotSupported.

    A block that holds a whole axis may have any size: it is taken for the next larger one that is supported, and may
    then stick out although it is full.
    """
    sizes = {"block_q": (lists.block_q, lists.q_len), "block_kv": (lists.block_kv, lists.kv_len)}
    rounded: list[int] = []
    ragged = False
    for argument, (size, length) in sizes.items():
        if size < 1 or (size % SMALLEST_BLOCK and size < length):
            raise BlockSizeNotSupported(argument=argument, got=size, smallest=SMALLEST_BLOCK)
        rounded.append(-(-size // SMALLEST_BLOCK) * SMALLEST_BLOCK)
        ragged |= size == length != rounded[-1]
    shared = lists.by_q.full.starts.shape[1] in (1, kv_heads) if lists.by_q.full.starts.ndim == 3 else True
    heads_of_lists = "kv_heads" if shared or heads == kv_heads else "heads"
    return ListedBlocks(rounded[0], rounded[1], heads_of_lists, ragged)


def list_tensors(lists: Lists, listed: ListedBlocks, sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """The eight tensors by name, starts as (batches, heads or kv_heads, blocks + 1) without a copy.

    Raises WrongBlockLists where they were made for other lengths, batches or heads.
    """
    for axis, length in (("q", lists.q_len), ("kv", lists.kv_len)):
        if length != sizes[f"{axis}_len"]:
            raise WrongBlockLists(
                what=f"the {axis} length that it was made for",
                got=length,
                expected=f"that of the call, {sizes[f'{axis}_len']}",
                instead="Make one for the lengths of this call.",
            )
    wanted = {0: sizes["batches"], 1: sizes[listed.heads]}
    found: dict[str, Tensor] = {}
    for loop, side in (("kv", lists.by_q), ("q", lists.by_kv)):
        for kind, csr in (("partial", side.partial), ("full", side.full)):
            name = starts_param(loop, kind)
            starts = csr.starts
            shape = tuple(starts.shape)
            if len(shape) != 3 or any(shape[i] not in (1, n) for i, n in wanted.items()):
                raise WrongBlockLists(
                    what=f"the shape of {name}",
                    got=shape,
                    expected=f"(1 or {wanted[0]} batches, 1 or {sizes['heads']} heads, blocks + 1)",
                    instead=_AS_MADE,
                )
            found[name] = starts.expand(wanted[0], wanted[1], shape[2])
            found[blocks_param(loop, kind)] = csr.indices
    return found


def check_lists(
    listed: ListedBlocks,
    tensors: Mapping[str, Tensor],
    sizes: Mapping[str, int],
    device: torch.device,
    sequences: bool = False,
) -> None:
    """Raise WrongBlockLists for lists that a kernel could not walk over: kinds, shapes, order of starts, range."""
    counts = {axis: -(-sizes[f"{axis}_len"] // listed.block(axis)) for axis in OTHER}
    if sequences:  # lists may go on where the longest one has ended
        counts = {a: max(n, tensors[starts_param(OTHER[a], "full")].shape[-1] - 1) for a, n in counts.items()}
    for loop, axis in OTHER.items():
        rows, blocks = counts[axis], counts[loop]
        for kind in KINDS:
            starts, indices = starts_param(loop, kind), blocks_param(loop, kind)
            for name in (starts, indices):
                _require(
                    tensors[name].dtype is torch.int32,
                    f"the dtype of {name}",
                    tensors[name].dtype,
                    "torch.int32",
                )
                _require(
                    tensors[name].device == device, f"the device of {name}", tensors[name].device, str(device)
                )
            shape = (sizes["batches"], sizes[listed.heads], rows + 1)
            _require(
                tuple(tensors[starts].shape) == shape,
                f"the shape of {starts}",
                tuple(tensors[starts].shape),
                f"{shape}",
            )
            _require(tensors[indices].ndim == 1, f"the rank of {indices}", tensors[indices].ndim, "1")
            _check_contents(starts, tensors[starts], indices, tensors[indices], blocks)
    if not listed.ragged:
        _check_ends(listed, tensors, sizes)
    for kind in KINDS:
        by_q, by_kv = (tensors[blocks_param(loop, kind)].numel() for loop in ("kv", "q"))
        _require(
            by_q == by_kv,
            f"the number of {kind} blocks listed by kv block",
            by_kv,
            f"that by q block, {by_q}",
        )


def _check_ends(listed: ListedBlocks, tensors: Mapping[str, Tensor], sizes: Mapping[str, int]) -> None:
    """Full blocks are not tested for the ends of the axes, so none may stick out."""
    for loop in OTHER:
        indices, length = tensors[blocks_param(loop, "full")], sizes[f"{loop}_len"]
        if length % listed.block(loop) and indices.numel():
            _require(
                int(indices.max()) < length // listed.block(loop),
                f"a block in {blocks_param(loop, 'full')}",
                f"block {length // listed.block(loop)}, which sticks out beyond the end of the axis",
                "a whole block (list it as partial)",
            )


def _check_contents(name: str, starts: Tensor, indices_name: str, indices: Tensor, blocks: int) -> None:
    """One look at the smallest and largest of everything."""
    if starts.numel():
        low, high = (int(x) for x in torch.aminmax(starts))
        _require(low >= 0, f"the smallest element of {name}", low, "0 or more")
        _require(
            high <= indices.numel(), f"the largest element of {name}", high, f"{indices.numel()} or less"
        )
        if starts.shape[-1] > 1:
            step = int(starts.diff(dim=-1).min())
            _require(step >= 0, f"the smallest step between neighbours in {name}", step, "0 or more")
    if indices.numel():
        low, high = (int(x) for x in torch.aminmax(indices))
        _require(low >= 0, f"the smallest block in {indices_name}", low, "0 or more")
        _require(
            high < blocks,
            f"the largest block in {indices_name}",
            high,
            f"less than {blocks}, the number of blocks",
        )


def _require(legal: bool, what: str, got: object, expected: str) -> None:
    if not legal:
        raise WrongBlockLists(what=what, got=got, expected=expected, instead=_AS_MADE)


def listed_keys(listed: ListedBlocks, tensors: Mapping[str, Tensor], kv_len: int) -> int:
    """How many keys the lists of a q block hold on average."""
    starts = tensors[starts_param("kv", "full")]
    shared = [n if stride else 1 for n, stride in zip(starts.shape[:2], starts.stride()[:2], strict=True)]
    rows = shared[0] * shared[1] * (starts.shape[2] - 1)
    entries = sum(tensors[blocks_param("kv", kind)].numel() for kind in listed.kinds)
    return min(kv_len, -(-entries // max(rows, 1)) * listed.kv)


def dense_lists(
    listed: ListedBlocks, tensors: Mapping[str, Tensor], heads: int, shape: tuple[int, int]
) -> list[Tensor]:
    """[partial, full]: bool (B, H, Sq, Skv), the pairs of the listed blocks; `shape` is (Sq, Skv)."""
    return [_dense(listed, tensors, kind, heads, shape) for kind in KINDS]


def _dense(
    listed: ListedBlocks, tensors: Mapping[str, Tensor], kind: str, heads: int, shape: tuple[int, int]
) -> Tensor:
    starts, indices = tensors[starts_param("kv", kind)].long(), tensors[blocks_param("kv", kind)].long()
    batches, list_heads, bounds = starts.shape
    counts = starts.diff(dim=-1).flatten()
    rows = torch.repeat_interleave(torch.arange(counts.numel(), device=counts.device), counts)
    before = counts.cumsum(0) - counts
    entries = starts[..., :-1].flatten()[rows] + torch.arange(rows.numel(), device=rows.device) - before[rows]
    columns = tensors[starts_param("q", kind)].shape[-1] - 1
    blocks = torch.zeros(counts.numel(), columns, dtype=torch.bool, device=counts.device)
    blocks[rows, indices[entries]] = True
    pairs = blocks.view(batches, list_heads, bounds - 1, columns)
    pairs = pairs.repeat_interleave(listed.q, 2).repeat_interleave(listed.kv, 3)[:, :, : shape[0], : shape[1]]
    return pairs if list_heads == heads else pairs.repeat_interleave(heads // list_heads, 1)

"""The library's masks, pair by pair, against sets of visible keys worked out in another way."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch

from attn_engine import create_block_mask
from attn_engine.errors import WrongArgument
from attn_engine.frontend import MaskMod
from attn_engine.library import (
    block_diffusion,
    chunked,
    dilated_window,
    global_window,
    neighbourhood,
    shared_prefix,
    sliding_tile,
    streaming,
    tree,
    vision_cross,
)

Sees = Callable[[int], set[int]]  # the keys that a query sees
IDS = torch.tensor([9, 9, 9, 0, 0, 0, 1, 1, 1, 1, 2])
PARENTS = [-1, 0, 0, 1, 1, 2, -1, 6, 4]
IMAGES = torch.tensor([[-1, 0, 0, 1, 1, 1, 2], [0, 0, -1, -1, 2, 1, 1]], dtype=torch.int32)


def window_of(position: int, extent: int, size: int, step: int) -> set[int]:
    """The `size` cells of a line that NATTEN gives one position: its nearest of the same remainder, moved inside."""
    cells = [i for i in range(extent) if i % step == position % step]
    at = cells.index(position)
    first = min(max(at - size // 2, 0), len(cells) - size)
    return set(cells[first : first + size])


def neighbours(
    shape: tuple[int, ...], kernel: tuple[int, ...], steps: tuple[int, ...]
) -> tuple[MaskMod, Sees, int]:
    cells = list(itertools.product(*map(range, shape)))

    def sees(q: int) -> set[int]:
        windows = [window_of(*x) for x in zip(cells[q], shape, kernel, steps, strict=True)]
        return {i for i, cell in enumerate(cells) if all(c in w for c, w in zip(cell, windows, strict=True))}

    return neighbourhood(shape, kernel, steps), sees, len(cells)


def tiles(
    shape: tuple[int, ...], tile: tuple[int, ...], window: tuple[int, ...]
) -> tuple[MaskMod, Sees, int]:
    counts = [s // t for s, t in zip(shape, tile, strict=True)]
    in_tile = torch.tensor(tile).prod().item()
    order = [t for t in itertools.product(*map(range, counts)) for _ in range(int(in_tile))]

    def sees(q: int) -> set[int]:
        near = [window_of(at, n, w, 1) for at, n, w in zip(order[q], counts, window, strict=True)]
        return {i for i, t in enumerate(order) if all(c in w for c, w in zip(t, near, strict=True))}

    return sliding_tile(shape, tile, window), sees, len(order)


def ancestors(q: int) -> set[int]:
    return set() if q < 0 else {q} | ancestors(PARENTS[q])


def diffusion(length: int, block: int, q: int) -> set[int]:
    mine = q % length // block
    noisy = {i for i in range(length) if i // block == mine} if q < length else set[int]()
    clean = {length + i for i in range(length) if i // block < mine + (q >= length)}
    return noisy | clean


def shared(q: int) -> set[int]:
    return {k for k in range(q + 1) if k < 3 or IDS[k] == IDS[q]}


CASES: dict[str, tuple[MaskMod, Sees, int]] = {
    "dilated": (dilated_window(3, 4), lambda q: {q - 4 * i for i in range(4)} & {*range(q + 1)}, 30),
    "global": (
        global_window(2, 3),
        lambda q: {*range(12)} if q < 3 else {0, 1, 2} | ({*range(q - 2, q + 3)} & {*range(12)}),
        12,
    ),
    "chunked": (chunked(5), lambda q: {*range(q // 5 * 5, q + 1)}, 17),
    "streaming": (streaming(3, 2), lambda q: {*range(max(q - 3, 0), q + 1)} | ({0, 1} & {*range(q + 1)}), 15),
    "block diffusion": (block_diffusion(10, 4), lambda q: diffusion(10, 4, q), 20),
    "shared prefix": (shared_prefix(IDS, 3), shared, 11),
    "line": neighbours((11,), (4,), (1,)),
    "dilated line": neighbours((11,), (3,), (3,)),
    "image": neighbours((5, 7), (3, 4), (1, 1)),
    "dilated image": neighbours((6, 7), (3, 3), (2, 1)),
    "volume": neighbours((3, 4, 3), (3, 2, 1), (1, 2, 1)),
    "tiles of an image": tiles((6, 8), (2, 2), (3, 1)),
    "tiles of a volume": tiles((4, 6, 2), (2, 2, 1), (1, 3, 1)),
}


def dense(mask: MaskMod, queries: int, keys: int, batches: int | None = None) -> torch.Tensor:
    """What the compiled mask says of every pair: (batches, queries, keys)."""
    made = create_block_mask(mask, batches, None, queries, keys, "cpu", BLOCK_SIZE=16)
    parts = torch.zeros(batches or 1, queries, keys, dtype=torch.bool)
    at = [torch.arange(n) for n in (batches or 1, queries, keys)]
    parts[:] = made.mask_mod(at[0][:, None, None], torch.tensor(0), at[1][:, None], at[2])
    return parts


@pytest.mark.parametrize("name", CASES)
def test_every_pair(name: str) -> None:
    mask, sees, length = CASES[name]
    found = dense(mask, length, length)[0]
    assert [set(row.nonzero()[:, 0].tolist()) for row in found] == [sees(q) for q in range(length)]


def test_tree() -> None:
    found = dense(tree(PARENTS, 4), len(PARENTS), 4 + len(PARENTS))[0]
    wanted = [{*range(4)} | {4 + a for a in ancestors(q)} for q in range(len(PARENTS))]
    assert [set(row.nonzero()[:, 0].tolist()) for row in found] == wanted


def test_vision_cross() -> None:
    found = dense(vision_cross(IMAGES, 5), 7, 15, batches=2)
    for b, q in itertools.product(range(2), range(7)):
        image = int(IMAGES[b, q])
        wanted = set[int]() if image < 0 else {*range(5 * image, 5 * image + 5)}
        assert set(found[b, q].nonzero()[:, 0].tolist()) == wanted


WRONG: dict[str, Callable[[], MaskMod]] = {
    "window": lambda: dilated_window(-1),
    "dilation": lambda: dilated_window(3, 0),
    "chunk": lambda: chunked(0),
    "kernel": lambda: neighbourhood((5, 5), 7),
    "shape": lambda: neighbourhood((2, 2, 2, 2), 1),
    "tile": lambda: sliding_tile((6, 6), (4, 4), (1, 1)),
    "block": lambda: block_diffusion(8, True),
    "parents": lambda: tree([1, -1]),
    "image_of_text": lambda: vision_cross(torch.zeros(3)),
    "document_ids": lambda: shared_prefix(torch.zeros(2, 3, dtype=torch.int)),
}


@pytest.mark.parametrize("argument", WRONG)
def test_wrong_parameters_are_named(argument: str) -> None:
    with pytest.raises(WrongArgument, match=f"{argument}="):
        WRONG[argument]()


def test_even_windows_of_tiles_are_refused() -> None:
    with pytest.raises(WrongArgument, match="odd"):
        sliding_tile((8, 8), (2, 2), (2, 1))

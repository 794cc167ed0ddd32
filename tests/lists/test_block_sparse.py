"""Calls that give blocks as a mask or as indices, forward and backward, against dense formulas in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.lists.given import causal, closeness, drawn, engine, gradients, rows_visible, softmax_rows


@dataclass(frozen=True)
class Case:
    """heads: those of the mask, in terms of `shape` (batches, heads, kv heads)."""

    name: str
    shape: tuple[int, int, int] = (2, 4, 2)
    lengths: tuple[int, int] = (100, 100)
    sizes: tuple[int, int] = (32, 32)
    heads: int = 2
    mask: Any = causal
    density: float = 0.4
    dims: tuple[int, int] = (32, 32)
    dtype: torch.dtype = torch.float32


CASES = (
    Case("per kv head"),
    Case("per head", heads=4, lengths=(70, 150), sizes=(32, 64)),
    Case("one for all heads, no mask", heads=1, lengths=(130, 99), sizes=(64, 16), mask=None),
    Case("three heads to one, wide values", (1, 3, 1), (77, 150), (16, 32), 1, dims=(32, 48)),
    Case("everything", (1, 2, 2), density=1.0, lengths=(129, 129)),
    Case("nothing", density=0.0, lengths=(70, 70)),
    Case("one query", (2, 8, 2), (1, 300), (16, 16), 2, None),
    Case("few queries", (1, 4, 2), (3, 300), (1, 16), 2, None),
    Case("per token", sizes=(1, 32)),
    Case("per token, three heads to one", (1, 3, 1), (65, 100), (1, 16), 1),
    Case("per token, eight heads to one", (1, 8, 1), (33, 130), (1, 64), 1),
    Case("per token and head", (1, 8, 2), (50, 50), (1, 16), 8),
    Case("per token, equal heads", (1, 2, 2), (50, 90), (1, 32), 2),
    Case("small blocks", (1, 2, 2), (77, 100), (4, 4)),
    Case("per token and key", (1, 4, 2), (40, 60), (1, 1), density=0.2),
    Case("bfloat16", sizes=(64, 64), dtype=torch.bfloat16),
    Case("bfloat16, per token", (1, 8, 2), sizes=(1, 32), dtype=torch.bfloat16),
)
FAST = ("per kv head", "few queries", "per token, eight heads to one", "small blocks", "bfloat16, per token")
SPELLED = tuple(
    c for c in CASES if c.name in ("per kv head", "per token, eight heads to one", "small blocks")
)


def mask_of(case: Case) -> Tensor:
    """(batches, heads, q blocks, kv blocks); the second row of blocks sees nothing."""
    rows, columns = (-(-n // size) for n, size in zip(case.lengths, case.sizes, strict=True))
    blocks = torch.rand(case.shape[0], case.heads, rows, columns) < case.density
    if case.density < 1:
        blocks[:, :, 1:2] = False
    return blocks


def check(case: Case, backend: str) -> None:
    x, blocks = drawn(case.shape, case.lengths, case.dtype, case.dims), mask_of(case)
    found, rows = engine(backend, case.dtype, case.mask, case.dims)(
        *x.tensors, block_sparse_mask=blocks, block_size=case.sizes, return_final_rowscales=True
    )
    visible = rows_visible(blocks, case.sizes, case.lengths, case.shape[1], case.mask)
    o, lse = softmax_rows(*x.tensors, visible)
    made = found, *gradients(found, x.weight, x.tensors)
    closeness(made, (o, *gradients(o, x.weight, x.tensors)), case.dtype)
    torch.testing.assert_close(rows["lse"].double(), lse, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_mask(case: Case) -> None:
    check(case, "torch")


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, id=c.name, marks=[] if c.name in FAST else [pytest.mark.slow]) for c in CASES],
)
def test_mask_in_generated_code(case: Case) -> None:
    check(case, "cpu")


@pytest.mark.parametrize("case", SPELLED, ids=lambda c: c.name)
def test_mask_in_triton(case: Case) -> None:
    check(case, "triton-interpreter")


def indices_of(blocks: Tensor, more: int = 2) -> Tensor:
    """The same blocks as rows of numbers, in any order, with holes and some numbers twice."""
    b, h, rows, columns = blocks.shape
    numbers = torch.where(blocks, torch.arange(columns), -1)
    again = numbers[..., torch.randint(columns, (more,))]
    numbers = torch.cat((numbers, again, torch.full((b, h, rows, 1), -7)), 3)
    return numbers[..., torch.randperm(numbers.shape[3])].to(torch.int32)


@pytest.mark.parametrize("sizes", [(32, 32), (1, 16)], ids=str)
def test_indices_are_the_mask(sizes: tuple[int, int]) -> None:
    case = Case("", sizes=sizes)
    x, blocks = drawn(case.shape, case.lengths), mask_of(case)
    both = [
        engine("cpu")(*x.tensors, block_size=sizes, **given)
        for given in ({"block_sparse_mask": blocks}, {"block_sparse_indices": indices_of(blocks)})
    ]
    assert torch.equal(*both)
    assert all(
        torch.equal(*pair) for pair in zip(*(gradients(o, x.weight, x.tensors) for o in both), strict=True)
    )


def test_block_num_says_how_many_count() -> None:
    x = drawn((1, 2, 2), (100, 100))
    numbers = torch.stack([torch.randperm(4) for _ in range(8)]).view(1, 2, 4, 4)
    counts = torch.randint(0, 5, (1, 2, 4))
    blocks = torch.zeros(1, 2, 4, 5, dtype=torch.bool)
    blocks = blocks.scatter(3, torch.where(torch.arange(4) < counts[..., None], numbers, 4), True)[..., :4]
    found = engine("cpu")(*x.tensors, block_sparse_indices=numbers, block_num=counts, block_size=32)
    o, _ = softmax_rows(*x.tensors, rows_visible(blocks, (32, 32), (100, 100), 2, causal))
    closeness((found,), (o,), torch.float32)


def test_blocks_expanded_by_rows_and_dense() -> None:
    """A mask of blocks is that of its tokens; all True is no mask at all; both may be told apart by their shape."""
    x = drawn((1, 4, 2), (128, 128))
    blocks = torch.rand(1, 2, 4, 4) < 0.5
    run = engine("cpu")
    of_blocks = run(*x.tensors, block_sparse_mask=blocks, block_size=32)
    of_tokens = run(*x.tensors, block_sparse_mask=blocks.repeat_interleave(32, 2), block_size=32)
    torch.testing.assert_close(of_blocks, of_tokens, atol=2e-6, rtol=2e-6)
    assert torch.equal(of_blocks, run(*x.tensors, block_sparse_mask=blocks))  # the size from the shape
    everything = run(*x.tensors, block_sparse_mask=torch.ones(1, 1, 4, 4, dtype=torch.bool), block_size=32)
    torch.testing.assert_close(everything, run(*x.tensors), atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("block", [16, 32])  # tokens of 4 heads: 16 rows of a tile, 8 rows
def test_nothing_depends_on_threads_or_on_what_lay_in_memory(block: int) -> None:
    x, blocks = drawn((1, 8, 2), (120, 120)), torch.rand(1, 2, 120, -(-120 // block)) < 0.1
    seen: list[tuple[Tensor, ...]] = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            poison = [torch.full((200_000,), float("nan")) for _ in range(3)]
            del poison
            o = engine("cpu")(*x.tensors, block_sparse_mask=blocks, block_size=(1, block))
            seen.append((o, *gradients(o, x.weight, x.tensors)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


def test_a_mask_that_changes_is_read_again() -> None:
    x, blocks = drawn((1, 2, 2), (64, 64)), torch.ones(1, 2, 64, 2, dtype=torch.bool)
    run = engine("cpu")
    before = run(*x.tensors, block_sparse_mask=blocks, block_size=(1, 32))
    blocks[:, :, 40] = False
    after = run(*x.tensors, block_sparse_mask=blocks, block_size=(1, 32))
    assert bool((after[:, 40] == 0).all())
    keep = torch.arange(64) != 40
    torch.testing.assert_close(before[:, keep], after[:, keep], atol=2e-6, rtol=2e-6)

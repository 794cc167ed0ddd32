"""Lists that a kernel could not walk over are errors before anything runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from attn_engine import AttentionEngine, meta_tensor
from attn_engine.errors import AttnEngineError, WrongArgument
from attn_engine.masks.lists import BlockLists, Csr, Side
from attn_engine.runtime.block_lists import BlockSizeNotSupported, WrongBlockLists
from tests.lists.draws import draw

LENGTHS = (200, 256)


@pytest.fixture(scope="module")
def engine() -> AttentionEngine:
    metas = [meta_tensor(None, None, None, 16, dtype=torch.float32)] * 3
    return AttentionEngine(metas, layout="bhsd", backend="torch")


def run(engine: AttentionEngine, lists: Any, q_len: int = LENGTHS[0]) -> None:
    q, k = torch.randn(1, 4, q_len, 16), torch.randn(1, 2, LENGTHS[1], 16)
    engine(q, k, k, block_mask=lists)


def good() -> BlockLists:
    return draw(0, (64, 32), LENGTHS).lists


def with_full(change: Callable[[Csr], Csr]) -> BlockLists:
    lists = good()
    return replace(lists, by_q=Side(lists.by_q.partial, change(lists.by_q.full)))


def indices(change: Callable[[torch.Tensor], torch.Tensor]) -> BlockLists:
    return with_full(lambda csr: Csr(csr.starts, change(csr.indices)))


def starts(change: Callable[[torch.Tensor], torch.Tensor]) -> BlockLists:
    return with_full(lambda csr: Csr(change(csr.starts), csr.indices))


def set_to(x: torch.Tensor, place: int, value: int) -> torch.Tensor:
    x = x.clone()
    x.view(-1)[place] = value
    return x


WRONG: dict[str, tuple[Callable[[], Any], type[AttnEngineError], str]] = {
    "no lists": (lambda: torch.ones(4, 8), WrongArgument, "block_mask"),
    "another length": (lambda: draw(0, (64, 32), (199, 256)).lists, WrongBlockLists, "199"),
    "another batch": (lambda: draw(0, (64, 32), LENGTHS, 2).lists, WrongBlockLists, "batches"),
    "other heads": (lambda: draw(0, (64, 32), LENGTHS, 1, 3).lists, WrongBlockLists, "heads"),
    "small blocks": (lambda: draw(0, (8, 32), LENGTHS).lists, BlockSizeNotSupported, "block_q=8"),
    "odd blocks": (lambda: draw(0, (64, 40), LENGTHS).lists, BlockSizeNotSupported, "block_kv=40"),
    "a block beyond the end": (
        lambda: indices(lambda x: set_to(x, 0, 8)),
        WrongBlockLists,
        "kv_full_blocks is 8",
    ),
    "a negative block": (
        lambda: indices(lambda x: set_to(x, 0, -1)),
        WrongBlockLists,
        "kv_full_blocks is -1",
    ),
    "int64 blocks": (lambda: indices(lambda x: x.long()), WrongBlockLists, "int64"),
    "blocks of two dimensions": (lambda: indices(lambda x: x[None]), WrongBlockLists, "rank"),
    "starts that fall": (lambda: starts(lambda x: set_to(x, 1, int(x.max()))), WrongBlockLists, "step"),
    "starts beyond the blocks": (lambda: starts(lambda x: set_to(x, -1, 10**6)), WrongBlockLists, "1000000"),
    "negative starts": (lambda: starts(lambda x: set_to(x, 0, -2)), WrongBlockLists, "-2"),
    "starts of another number of blocks": (lambda: starts(lambda x: x[..., :-1]), WrongBlockLists, "shape"),
    "starts of two dimensions": (lambda: starts(lambda x: x[0]), WrongBlockLists, "shape"),
    "sides that disagree": (lambda: indices(lambda x: x[:-1]), WrongBlockLists, "full"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong(name: str, engine: AttentionEngine) -> None:
    make, error, word = WRONG[name]
    with pytest.raises(error, match=word):
        run(engine, make())


def test_lists_that_go_bad_between_calls(engine: AttentionEngine) -> None:
    lists = good()
    run(engine, lists)
    lists.by_q.full.indices[0] = 99
    with pytest.raises(WrongBlockLists, match="99"):
        run(engine, lists)


def test_a_wrong_mask_shows_when_the_engine_is_made() -> None:
    with pytest.raises(WrongArgument, match="block_mask"):
        AttentionEngine([meta_tensor(None, None, None, 16, dtype=torch.float32)] * 3, block_mask="causal")

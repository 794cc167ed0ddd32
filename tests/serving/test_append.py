"""Growing a cache in place: every row where it belongs, and nothing at all where anything is wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attn_engine.library import append_to_cache, write_to_slots
from attn_engine.runtime.paged_checks import CacheNotDifferentiable, WrongPages


def rows_of(cache: Tensor, table: Tensor, length: int) -> Tensor:
    return torch.cat([cache[p] for p in table[: -(-length // cache.shape[1])].tolist()])[:length]


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize("paged", [True, False])
def test_steps(layout: str, paged: bool, seed: int) -> None:
    """Three calls of several rows each, ragged, then one row: all rows are found again, other slots untouched."""
    torch.manual_seed(seed)
    turned = (lambda x: x.transpose(1, 2)) if layout == "bhsd" else (lambda x: x)
    table = torch.randperm(12)[:10].view(2, 5).to(torch.int32)
    shape = (12, 16, 2, 8) if paged else (2, 80, 2, 8)
    caches = [torch.full(shape, float("nan")) for _ in "kv"]
    given = [turned(turned(c).contiguous()) for c in caches]
    lengths = torch.tensor([0, 0], dtype=torch.int32)
    known: list[list[list[Tensor]]] = [[[], []], [[], []]]
    for counts in ([5, 30], [0, 17], [31, 1], [1, 1]):
        new = [torch.randn(2, max(counts), 2, 8) for _ in "kv"]
        more = torch.tensor(counts)
        lengths = append_to_cache(
            [turned(x) for x in new], [turned(c) for c in given], lengths,
            table if paged else None, counts=more, layout=layout,
        )  # fmt: skip
        for x, kept in zip(new, known, strict=True):
            for b, count in enumerate(counts):
                kept[b].append(x[b, :count])
    assert lengths.tolist() == [37, 49] and lengths.dtype is torch.int32
    for cache, kept in zip(given, known, strict=True):
        for b in range(2):
            n = int(lengths[b])
            got = rows_of(cache, table[b], n) if paged else cache[b, :n]
            assert torch.equal(got, torch.cat(kept[b]))
        assert int(cache.isnan().sum()) == cache.numel() - 16 * int(lengths.sum())


def test_packed(seed: int) -> None:
    torch.manual_seed(seed)
    new, table = torch.randn(9, 2, 8), torch.tensor([[3, 1], [0, -1], [2, -1]])
    cache = torch.zeros(4, 4, 2, 8)
    cu_len, before = torch.tensor([0, 5, 5, 8]), torch.tensor([2, 0, 1])
    after = append_to_cache(new, cache, before, table, cu_len=cu_len)
    assert after.tolist() == [7, 0, 4]
    assert torch.equal(rows_of(cache, table[0], 7)[2:], new[:5])
    assert torch.equal(rows_of(cache, table[2], 4)[1:], new[5:8])
    assert (cache[0] == 0).all()


def test_slots(seed: int) -> None:
    torch.manual_seed(seed)
    new, cache = torch.randn(2, 3, 1, 8), torch.zeros(3, 4, 1, 8)
    write_to_slots(new, cache, torch.tensor([[11, -1, 0], [5, 6, -1]]))
    flat = cache.view(12, 1, 8)
    for slot, row in ((11, new[0, 0]), (0, new[0, 2]), (5, new[1, 0]), (6, new[1, 1])):
        assert torch.equal(flat[slot], row)
    assert int((flat != 0).any(2).sum()) == 4


TABLE = torch.tensor([[0, 1], [2, -1]], dtype=torch.int32)
NEW = torch.randn(2, 2, 1, 8)
BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"lengths": torch.tensor([7, 0])}, "lengths", "sequence 0"),
    ({"lengths": torch.tensor([0, 3])}, "block_table", "element [1, 1] is -1"),
    ({"lengths": torch.tensor([0, -1])}, "lengths", "element 1 is -1"),
    ({"lengths": torch.tensor([0.0, 1.0])}, "lengths", "float32"),
    ({"block_table": TABLE[[0, 0]], "lengths": torch.tensor([2, 3])}, "block_table", "written twice"),
    ({"block_table": torch.tensor([[9, 1], [0, 1]])}, "block_table", "element [0, 0] is 9"),
    ({"block_table": torch.tensor([0, 1])}, "block_table", "dimensions is 1"),
    ({"new": NEW.half()}, "new", "torch.float16"),
    ({"new": NEW[..., :4]}, "new", "heads and dim"),
    ({"new": NEW[:1]}, "new", "its shape"),
    ({"counts": torch.tensor([0, 3])}, "counts", "element 1 is 3"),
    ({"new": [NEW, NEW]}, "caches", "their number"),
    ({"new": [NEW, NEW[:, :1]], "caches": [torch.zeros(3, 4, 1, 8)] * 2}, "new", "the rows of a tensor"),
    ({"caches": torch.zeros(1, 4, 1, 8).expand(3, -1, -1, -1)}, "caches", "expanded"),
    ({"cu_len": torch.tensor([0, 1, 9]), "new": NEW[0]}, "cu_len", "[0, 1, 9]"),
]


@pytest.mark.parametrize(("wrong", "argument", "word"), BAD)
def test_nothing_is_written(wrong: dict[str, Any], argument: str, word: str) -> None:
    cache = torch.zeros(3, 4, 1, 8)
    given: dict[str, Any] = {
        "new": NEW,
        "caches": cache,
        "lengths": torch.tensor([2, 0]),
        "block_table": TABLE,
    }
    with pytest.raises(WrongPages) as found:
        append_to_cache(**{**given, **wrong})
    assert found.value.details["argument"] == argument
    assert word in " ".join(str(found.value).split())
    assert (cache == 0).all()


def test_slots_twice_and_outside() -> None:
    new, cache = torch.ones(3, 1, 8), torch.zeros(2, 4, 1, 8)
    for slots, word in (([1, 2, 1], "twice"), ([1, 2, 8], "element 2 is 8"), ([1, -2, 3], "element 1 is -2")):
        with pytest.raises(WrongPages, match=word):
            write_to_slots(new, cache, torch.tensor(slots))
    with pytest.raises(WrongPages, match="its shape"):
        write_to_slots(new, cache, torch.tensor([1]))
    with pytest.raises(CacheNotDifferentiable):
        write_to_slots(new.requires_grad_(), cache, torch.tensor([0, 1, 2]))
    assert (cache == 0).all()

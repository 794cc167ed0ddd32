"""Native sparse attention over caches in pages: the rows of a prefill, wherever the pages lie."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attn_engine import errors
from attn_engine.library import NSACache
from attn_engine.runtime.paged_checks import WrongPages
from tests.library.nsa_formulas import Formula
from tests.library.test_nsa_cache import BACKEND, layer

F = Formula()
PAGE = 2 * F.d


def paged(cache: NSACache) -> NSACache:
    """Every page assigned, in no order; what is there is poison."""
    assert cache.block_table is not None
    places = torch.randperm(len(cache.selected[0]))
    cache.block_table.copy_(places[: cache.block_table.numel()].view_as(cache.block_table))
    for pair in (cache.selected, cache.window, cache.compressed):
        for x in pair:
            x.fill_(torch.nan)
    return cache


@pytest.mark.parametrize(
    ("phi", "own_pairs", "backend"),
    [("mlp", True, BACKEND), pytest.param("linear", False, "cpu", marks=pytest.mark.slow)],
)
def test_decoding_from_pages_is_the_prefill(phi: str, own_pairs: bool, backend: str) -> None:
    """Sequences of their own lengths, pieces that end anywhere in a page; unused pages and entries are poisoned."""
    module, x = layer(phi=phi, own_pairs=own_pairs), torch.randn(2, 60, 48)
    module.backend = backend
    with torch.no_grad():
        whole = module(x)
    cache, at = paged(module.make_cache(2, 60, page_size=PAGE, pages=41)), [0, 0]
    for counts in ([33, 0], [1, 7], [0, 1], [20, 41]):
        n = max(counts)
        new = torch.zeros(2, n, 48)
        for b, count in enumerate(counts):
            new[b, :count] = x[b, at[b] : at[b] + count]
        o = module(new, cache=cache, counts=torch.tensor(counts))
        for b, count in enumerate(counts):
            torch.testing.assert_close(o[b, :count], whole[b, at[b] : at[b] + count], atol=3e-6, rtol=3e-5)
            at[b] += count


def test_pages_hold_what_rows_hold() -> None:
    """Paged equals contiguous to the bit, and no slot but those of the sequence is written."""
    options: dict[str, Any] = {**F.options}
    rows, pages = (
        NSACache(1, 40, 1, 16, **options),
        NSACache(1, 40, 1, 16, page_size=PAGE, pages=30, **options),
    )
    paged(pages)
    k, v, gates = torch.randn(1, 40, 1, 16), torch.randn(1, 40, 1, 16), torch.rand(3, 1, 1, 2)
    for begin, end in ((0, 25), (25, 26), (26, 40)):
        q = torch.randn(1, 1, 2, 16)
        outs = []
        for cache in (rows, pages):
            cache.append(k[:, begin:end], v[:, begin:end])
            outs.append(cache.attend(q, *gates, backend=BACKEND))
        torch.testing.assert_close(*outs, atol=0, rtol=0)
    assert pages.block_table is not None
    own = pages.block_table[0].long()
    made = (40 - F.l) // F.d + 1
    found = pages.compressed[0][own].flatten(0, 1)
    torch.testing.assert_close(found[:made], rows.compressed[0][0, :made], atol=0, rtol=0)
    assert bool(found[made:].isnan().all())
    unused = torch.ones(30, dtype=torch.bool).index_fill(0, own, False)
    assert all(bool(x[unused].isnan().all()) for x in (*pages.selected, *pages.compressed))


def test_a_wrong_table_is_named_and_nothing_is_written() -> None:
    k = torch.randn(2, 12, 1, 16)

    def refused(wanted: str, table: list[list[int]], cache: NSACache) -> None:
        before = [x.clone() for x in (*cache.selected, *cache.compressed, *cache._recent, cache.lengths)]
        assert cache.block_table is not None
        cache.block_table = torch.nn.functional.pad(
            torch.tensor(table, dtype=torch.int32), (0, cache.block_table.shape[1] - len(table[0])), value=-1
        )
        with pytest.raises(WrongPages, match=wanted):
            cache.append(k, k)
        after = (*cache.selected, *cache.compressed, *cache._recent, cache.lengths)
        assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))

    def fresh(capacity: int = 5 * PAGE) -> NSACache:
        return NSACache(2, capacity, 1, 16, page_size=PAGE, pages=9, **F.options)

    count = -(-12 // PAGE)
    refused(r"block_table.*-1", [[-1] * count, [0] * count], fresh())
    refused("block_table.*9", [[*range(count - 1), 9], list(range(3, 3 + count))], fresh())
    refused("written twice", [list(range(count)), list(range(count))], fresh())
    refused("lengths.*beyond", [[0], [1]], fresh(PAGE))
    # A page of a prefix that both have, and one of them goes on in it.
    shared = fresh()
    assert shared.block_table is not None
    shared.block_table[:, :5] = torch.tensor([[0, 1, 2, 3, 8], [4, 5, 6, 7, -1]])
    shared.append(k[:, : PAGE - 1], k[:, : PAGE - 1])
    shared.block_table[1, 0] = 0
    before = shared.selected[0].clone()
    with pytest.raises(WrongPages, match="in the table once"):
        shared.append(k[:, :1], k[:, :1], counts=torch.tensor([1, 0]))
    assert torch.equal(shared.selected[0], before)
    with pytest.raises(errors.WrongArgument, match="page_size"):
        NSACache(1, 64, 1, 16, page_size=F.d + 1, **F.options)


def test_a_phi_of_another_shape_writes_nothing() -> None:
    cache = NSACache(1, 64, 1, 16, compress_v=lambda blocks: blocks.mean(-3)[..., :8], **F.options)
    k = torch.randn(1, 40, 1, 16)
    with pytest.raises(errors.WrongArgument, match="phi"):
        cache.append(k, k)
    assert not cache.selected[0].any() and cache.lengths.tolist() == [0]

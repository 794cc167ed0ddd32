"""Decoding and the layer: a cache that grows gives the rows of a prefill."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attn_engine import errors
from attn_engine.library import NativeSparseAttention, NSACache, Rotary, native_sparse_attention
from attn_engine.runtime.paged_checks import WrongPages
from tests.library.nsa_formulas import Formula

F = Formula()
BACKEND = "reference"  # dense: what is tested is how calls are put together


def layer(**options: Any) -> NativeSparseAttention:
    made = NativeSparseAttention(48, 6, 2, 16, backend=BACKEND, **F.options, **options)
    for p in made.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return made


@pytest.mark.parametrize(
    ("phi", "own_pairs"), [("mean", False), ("weighted", True), ("linear", False), ("mlp", True)]
)
def test_decoding_is_the_prefill(phi: str, own_pairs: bool) -> None:
    """A prompt, then pieces of every size, each against the rows of one call."""
    module, x = layer(phi=phi, own_pairs=own_pairs), torch.randn(2, 60, 48)
    with torch.no_grad():
        whole = module(x)
    cache, pieces, at = module.make_cache(2, 64), [], 0
    for n in (5, 1, 1, 13, 40):
        pieces.append(module(x[:, at : at + n], cache=cache))
        at += n
    torch.testing.assert_close(torch.cat(pieces, 1), whole, atol=3e-6, rtol=3e-5)
    assert cache.lengths.tolist() == [60, 60]


def test_sequences_of_their_own_lengths() -> None:
    """Prompts of 33 and 0 tokens, then steps in which either gets some or none."""
    module, x = layer(phi="linear"), torch.randn(2, 60, 48)
    with torch.no_grad():
        whole = module(x)
    cache, at = module.make_cache(2, 60), [0, 0]
    for counts in ([33, 0], [1, 7], [0, 1], [20, 41]):
        n = max(counts)
        new = torch.full((2, n, 48), torch.nan)
        for b, count in enumerate(counts):
            new[b, :count] = x[b, at[b] : at[b] + count]
        o = module(new.nan_to_num(1e3), cache=cache, counts=torch.tensor(counts))
        for b, count in enumerate(counts):
            torch.testing.assert_close(o[b, :count], whole[b, at[b] : at[b] + count], atol=3e-6, rtol=3e-5)
            assert not o[b, count:].any()
            at[b] += count


def test_a_row_is_made_exactly_when_a_block_is_complete() -> None:
    """And never again: rows that are there stay as they are, what is not filled yet is never read."""
    cache = NSACache(1, 40, 1, 16, **F.options)
    for pair in (cache.compressed, cache.selected):
        for x in pair:
            x.fill_(torch.nan)
    k, v, gates = torch.randn(1, 40, 1, 16), torch.randn(1, 40, 1, 16), torch.ones(1, 1, 2)
    rows = 0
    for t in range(40):
        cache.append(k[:, t : t + 1], v[:, t : t + 1])
        before, rows = rows, rows + (t + 1 >= F.l and (t + 1 - F.l) % F.d == 0)
        written = ~cache.compressed[0][0, :, 0, 0].isnan()
        assert int(written.sum()) == rows and bool(written[:rows].all())
        if rows > before:
            mean = k[0, t + 1 - F.l : t + 1, 0].mean(0)
            torch.testing.assert_close(cache.compressed[0][0, before, 0], mean)
        if t % 5 == 0:
            o = cache.attend(torch.randn(1, 1, 2, 16), gates, gates, gates, backend=BACKEND)
            assert bool(o.isfinite().all())


def test_packed_layer_is_each_sequence_by_itself() -> None:
    module, lengths = layer(phi="mlp"), [37, 0, 5, 20]
    x, cu = torch.randn(62, 48), torch.tensor([0, *lengths]).cumsum(0)
    with torch.no_grad():
        whole = module(x, cu_seqlens=cu).split(lengths)
        for one, o in zip(x.split(lengths), whole, strict=True):
            if len(one):
                torch.testing.assert_close(module(one[None])[0], o, atol=3e-6, rtol=3e-5)


def test_every_parameter_learns() -> None:
    for phi in ("weighted", "mlp"):
        module = layer(phi=phi)
        module(torch.randn(1, 60, 48)).square().sum().backward()
        assert all(p.grad is not None and bool(p.grad.any()) for p in module.parameters())


def test_rotary_knows_distances_alone() -> None:
    rotary = Rotary(16)
    q, k = torch.randn(2, 1, 1, 16)

    def product(t: int, u: int) -> Tensor:
        return (rotary(q, torch.tensor([t])) * rotary(k, torch.tensor([u]))).sum()

    torch.testing.assert_close(product(3, 1), product(103, 101), atol=1e-5, rtol=1e-4)


def test_of_a_larger_dimension_of_keys_than_of_values() -> None:
    """As in the paper (192 and 128): here phi makes rows of each."""
    q, k, v = torch.randn(1, 40, 2, 24), torch.randn(1, 40, 1, 24), torch.randn(1, 40, 1, 16)
    gates = [torch.rand(1, 40, 2) for _ in range(3)]
    whole: Any = native_sparse_attention(q, k, v, *gates, **F.options, backend=BACKEND)
    cache = NSACache(1, 40, 1, 24, 16, **F.options)
    cache.append(k, v)
    torch.testing.assert_close(cache.attend(q, *gates, backend=BACKEND), whole)


def test_mistakes_name_the_argument_and_write_nothing() -> None:
    cache = NSACache(2, 10, 1, 16, **F.options)
    k = torch.randn(2, 11, 1, 16)
    with pytest.raises(WrongPages, match="lengths"):
        cache.append(k, k)
    with pytest.raises(errors.WrongArgument, match="own_pairs=True"):
        cache.append(k[:, :2], k[:, :2], k_win=k[:, 2:4])
    with pytest.raises(errors.WrongArgument, match="k, v"):
        cache.append(k[:, :3], k[:, :3], k_slc=k[:, :2], v_slc=k[:, :2])
    assert cache.lengths.tolist() == [0, 0] and not cache.selected[0].any()
    with pytest.raises(errors.WrongArgument, match="phi='cubic'"):
        layer(phi="cubic")
    with pytest.raises(errors.WrongArgument, match="cu_seqlens"):
        layer()(torch.randn(2, 4, 48), cu_seqlens=torch.tensor([0, 4]), cache=cache)
    with pytest.raises(errors.WrongArgument, match="x="):
        layer()(torch.randn(2, 4, 47))
    for wrong in ({"capacity": -1}, {"pages": 3}, {"pages": -1, "page_size": F.d}, {"compress_k": None}):
        with pytest.raises(errors.WrongArgument, match=next(iter(wrong))):
            NSACache(**{"batch": 1, "capacity": 8, "kv_heads": 1, "dim": 16, **F.options, **wrong})
    with pytest.raises(errors.WrongArgument, match="g_cmp"):
        cache.attend(torch.randn(2, 1, 2, 16), torch.ones(2, 1), None, None)

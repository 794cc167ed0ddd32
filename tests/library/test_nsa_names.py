"""Native sparse attention under the names of other libraries, against formulas and the operator itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attn_engine import errors
from attn_engine.library import (
    AttentionLibrary,
    avgpool_compress,
    compressed_attention,
    compressed_attention_decode,
    linear_compress,
    native_sparse_attention,
    parallel_nsa,
    parallel_nsa_compression,
    parallel_nsa_topk,
    topk_sparse_attention,
    topk_sparse_attention_decode,
    weightedpool_compress,
)
from tests.library.nsa_formulas import Formula, attention, branches, check_selection, importances

NSA: Any = native_sparse_attention
F = Formula(l=16, d=16, m=16, n=4, w=20)
SCALE, DIM = 0.3, 16
LENGTHS = [70, 1, 0, 35]
CU = torch.tensor([0, *LENGTHS]).cumsum(0).int()
BACKEND: dict[str, Any] = {"backend": "reference"}  # dense: what is tested is how calls are put together


def inputs(batch: int = 1, tokens: int = sum(LENGTHS), queries: int | None = None) -> tuple[Tensor, ...]:
    """q, k, v, and three gates."""
    n = tokens if queries is None else queries
    kv = [torch.randn(batch, tokens, 2, DIM) for _ in range(2)]
    return torch.randn(batch, n, 4, DIM), *kv, *(torch.rand(batch, n, 4) for _ in range(3))


def mean(block: Tensor) -> Tensor:
    return block.mean(0)


def formula(x: tuple[Tensor, ...], indices: Tensor) -> Tensor:
    """Of one sequence, (T, heads, D) and so on."""
    q, k, v, *gates = (t.double() for t in x)
    rows = F.compressed(k, mean), F.compressed(v, mean)
    outs = branches(q, [rows, (k, v), (k, v)], indices, F, SCALE)
    return sum((o * g[..., None] for o, g in zip(outs, gates, strict=True)), torch.zeros(())).float()


def fla(x: tuple[Tensor, ...], **more: Any) -> Tensor:
    sizes = {"block_counts": F.n, "block_size": 16, "window_size": F.w}
    call: Any = parallel_nsa
    return call(*x, **{**sizes, "scale": SCALE, **BACKEND, **more})


def test_the_form_of_fla() -> None:
    x = inputs(2)
    q, k = x[:2]
    rows = torch.stack([torch.cat((F.compressed(t, mean), t[96:].mean(0)[None])) for t in k])
    o_cmp, lse = parallel_nsa_compression(q, rows, rows, k.shape[1], 16, SCALE, **BACKEND)
    assert lse.shape == (2, 106, 4) and bool((lse[:, :15] == -torch.inf).all()) and not o_cmp[:, :15].any()
    indices = parallel_nsa_topk(q, rows, k.shape[1], lse, F.n, 16, SCALE, **BACKEND)
    assert torch.equal(indices, parallel_nsa_topk(q, rows, k.shape[1], None, F.n, 16, SCALE, **BACKEND))
    o = fla(x)
    for b in range(2):
        exact = importances(q[b].double(), F.compressed(k[b].double(), mean), 106, F, SCALE)
        assert check_selection(indices[b], exact, 0, F) > 40
        torch.testing.assert_close(o[b], formula(tuple(t[b] for t in x), indices[b]), atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(fla(x, block_indices=indices.long()), o)


def test_the_form_of_fla_is_a_special_case() -> None:
    x = inputs(2)
    ours = NSA(*x, **F.options, scale=SCALE, **BACKEND)
    torch.testing.assert_close(fla(x), ours)


def test_fla_packed_and_with_fewer_queries() -> None:
    x = inputs()
    o = fla(x, cu_seqlens=CU)
    asked = [3, 1, 0, 35]
    cu_q = torch.tensor([0, *asked]).cumsum(0)
    last = torch.cat([torch.arange(int(e) - n, int(e)) for n, e in zip(asked, CU[1:], strict=True)])
    some = tuple(t if i in (1, 2) else t[:, last] for i, t in enumerate(x))
    torch.testing.assert_close(fla(some, cu_seqlens=(cu_q, CU)), o[:, last], atol=2e-6, rtol=2e-5)
    for start, end in ((0, 70), (70, 71), (71, 106)):
        torch.testing.assert_close(
            fla(tuple(t[:, start:end] for t in x)), o[:, start:end], atol=2e-6, rtol=2e-5
        )
    rows, cu_rows = avgpool_compress(x[1][0], None, CU, 16, 16)
    assert cu_rows.tolist() == [0, 4, 4, 4, 6]
    padded = torch.cat((rows[:4], rows[:2], rows[4:], rows[:1]))[
        None
    ]  # fla has rows of incomplete blocks as well
    o_cmp, _ = parallel_nsa_compression(x[0], padded, padded, 106, 16, SCALE, CU, **BACKEND)
    mine, _ = compressed_attention(x[0][0], rows, rows, 16, 16, 16, 4, CU, cu_rows, sm_scale=SCALE, **BACKEND)
    torch.testing.assert_close(o_cmp[0], mine)


def test_fla_with_counts_for_each_token() -> None:
    x, counts = inputs(2), torch.randint(3, 5, (2, 106, 2))
    rows = avgpool_compress(x[1].flatten(0, 1), None, torch.tensor([0, 106, 212]), 16, 16)[0].unflatten(
        0, (2, -1)
    )
    of_each = [parallel_nsa_topk(x[0], rows, 106, None, n, 16, SCALE, **BACKEND) for n in (3, 4)]
    found = parallel_nsa_topk(x[0], rows, 106, None, counts, 16, SCALE, **BACKEND)
    for i, one in enumerate(of_each):
        where = counts == i + 3
        assert torch.equal(found[where][:, : i + 3], one[where]) and bool(
            (found[where][:, i + 3 :] == -1).all()
        )
    torch.testing.assert_close(fla(x, block_counts=counts), fla(x, block_indices=found))
    most = parallel_nsa_topk(x[0], rows, 106, None, 4, 16, SCALE, **BACKEND)
    kept = torch.where(torch.arange(4) < counts[..., None], most, -1)
    torch.testing.assert_close(fla(x, block_indices=most, block_counts=counts), fla(x, block_indices=kept))


def test_fla_without_gates() -> None:
    """Only what is selected, each token by itself in float64."""
    q, k, v, *_ = inputs()
    indices = torch.rand(1, 106, 2, 7).argsort(-1)[..., :3]
    o = parallel_nsa(q, k, v, block_indices=indices, block_size=16, scale=SCALE, **BACKEND)
    inside = (indices[0].transpose(0, 1)[..., None] == torch.arange(106) // 16).any(-2)
    keep = (inside & torch.ones(106, 106, dtype=torch.bool).tril()).repeat_interleave(2, 0)
    exact, _ = attention(q[0].double(), k[0].double(), v[0].double(), keep, SCALE)
    torch.testing.assert_close(o[0], exact.float(), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("name", ["linear", "weighted", "mean"])
def test_packed_functions(name: str) -> None:
    """Compression, attention with a selection, attention to what it selected; gradients reach w, pe, q, k and v."""
    shape = Formula(l=8, d=4, m=16, n=4)
    q, k, v = (t[0].requires_grad_() for t in inputs()[:3])
    pe = torch.randn(2, 8, DIM, requires_grad=True)
    w = torch.randn(2, 8 * DIM, DIM) / 8 if name == "linear" else torch.rand(2, 8)
    function: Any = {"linear": linear_compress, "weighted": weightedpool_compress, "mean": avgpool_compress}[
        name
    ]
    weight = None if name == "mean" else w.requires_grad_()
    rows_k, cu_rows = function(k, weight, CU, 8, 4, pe)
    rows_v, _ = function(v, weight, CU, 8, 4, None)

    def phi(block: Tensor, place: Any = 0.0) -> Tensor:
        x = block + place
        if name == "mean":
            return x.mean(0)
        if name == "weighted":
            return sum((w.double()[:, i, None] * x[i] for i in range(8)), torch.zeros(()))
        return torch.stack([x[:, h].flatten() @ w.double()[h] for h in range(2)])

    o, found = compressed_attention(
        q, rows_k, rows_v, 8, 4, 16, 4, CU, cu_rows, 70, 16, sm_scale=SCALE, **BACKEND
    )
    selected = topk_sparse_attention(q, k, v, found, 16, CU, SCALE, **BACKEND)
    exact: list[Tensor] = []
    places = pe.double().transpose(0, 1)
    for b, own in enumerate(zip(*(t.double().split(LENGTHS) for t in (q, k, v)), strict=True)):
        pair = shape.compressed(own[1], lambda x: phi(x, places)), shape.compressed(own[2], phi)
        chosen = found[:, CU[b] : CU[b + 1]].transpose(0, 1)
        with torch.no_grad():
            check_selection(chosen, importances(own[0], pair[0], len(own[0]), shape, SCALE), 0, shape)
        exact.append(
            sum(branches(own[0], [pair, own[1:], own[1:]], chosen, shape, SCALE)[:2], torch.zeros(()))
        )
    torch.testing.assert_close(o + selected, torch.cat(exact).float(), atol=3e-5, rtol=3e-5)
    leaves = [x for x in (q, k, v, pe, weight) if x is not None]
    weights = torch.randn_like(o)
    for one, other in zip(
        torch.autograd.grad(((o + selected) * weights).sum(), leaves),
        torch.autograd.grad((torch.cat(exact) * weights).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(one, other.float(), atol=3e-4, rtol=3e-4)


def test_packed_decode_is_the_last_row() -> None:
    q, k, v = (t[0] for t in inputs()[:3])
    rows, cu_rows = avgpool_compress(k, None, CU, 8, 4)
    o, found = compressed_attention(q, rows, rows, 8, 4, 16, 4, CU, cu_rows, sm_scale=SCALE, **BACKEND)
    selected = topk_sparse_attention(q, k, v, found, 16, CU, SCALE, **BACKEND)
    there = [0, 1, 3]
    last = [int(CU[b + 1]) - 1 for b in there]

    def cached(x: Tensor, ends: Tensor, room: int) -> Tensor:
        cache = torch.full((3, room, *x.shape[1:]), torch.nan)
        for i, b in enumerate(there):
            own = x[ends[b] : ends[b + 1]]
            cache[i, : len(own)] = own
        return cache

    lengths = torch.tensor([LENGTHS[b] for b in there])
    of_rows = cu_rows.diff()[there]
    one, chosen = compressed_attention_decode(
        q[last], cached(rows, cu_rows, 20), cached(rows, cu_rows, 20), lengths, of_rows, 8, 4, 16, 4,
        sm_scale=SCALE, **BACKEND,
    )  # fmt: skip
    torch.testing.assert_close(one, o[last], atol=2e-6, rtol=2e-5)
    assert torch.equal(chosen, found[:, last])
    other = topk_sparse_attention_decode(
        q[last], cached(k, CU, 80), cached(v, CU, 80), chosen, 16, lengths, SCALE, **BACKEND
    )
    torch.testing.assert_close(other, selected[last], atol=2e-6, rtol=2e-5)


def test_the_catalogue_lists_them() -> None:
    listed = str(AttentionLibrary.list())
    for name in ("native_sparse_attention", "NativeSparseAttention", "parallel_nsa", "topk_sparse_attention"):
        assert name in listed


OPERATOR: list[tuple[dict[str, Any], str]] = [
    ({"compression_stride": 3}, "compression_block=8 is not a multiple of compression_stride, 3"),
    ({"compression_stride": 0}, "compression_stride"),
    ({"selection_block": 18}, "selection_block=18 is not a multiple of compression_stride"),
    ({"selection_block": 12}, "selection_block=12 is not a power of two"),
    ({"selection_block": 4}, "selection_block=4 is not at least compression_block"),
    ({"selected_blocks": 2}, "selected_blocks=2 is not an integer of at least 3"),
    ({"window": 0}, "window=0"),
    ({"g_cmp": torch.ones(1, 20, 3)}, "g_cmp"),
    ({"g_win": torch.ones(1, 20, 4, dtype=torch.int32)}, "g_win"),
    ({"g_cmp": None, "g_slc": None, "g_win": None}, "g_cmp, g_slc, g_win"),
    ({"q": torch.randn(1, 21, 4, DIM)}, "g_cmp"),
    ({"q": torch.randn(20, 4, DIM)}, "q="),
    ({"k": torch.randn(1, 20, 3, DIM)}, "heads of q"),
    ({"k_slc": torch.randn(1, 19, 2, DIM)}, "k_slc"),
    ({"v_win": torch.randn(1, 20, 2, DIM + 1)}, "v_win"),
    ({"k_win": torch.randn(1, 20, 2, DIM).double()}, "k_win"),
    ({"block_indices": torch.zeros(1, 20, 2, 3)}, "block_indices"),
    ({"block_indices": torch.zeros(1, 20, 4, 3, dtype=torch.int32)}, "block_indices"),
    ({"scale": "1"}, "scale"),
    ({"cu_seqlens": torch.tensor([0, 20])}, "q="),
    ({"compress_k": lambda x: x}, r"compress_k\(blocks\)"),
    ({"compress_v": None}, "compress_v"),
    ({"place_k": lambda x, at: x[..., :3]}, r"place_k\(rows, positions\)"),
]


@pytest.mark.parametrize(("wrong", "says"), OPERATOR)
def test_mistakes_name_the_argument(wrong: dict[str, Any], says: str) -> None:
    options = {**Formula().options, **BACKEND}
    names = ("q", "k", "v", "g_cmp", "g_slc", "g_win")
    given = dict(zip(names, inputs(1, 20), strict=True)) | options | wrong
    with pytest.raises(errors.WrongArgument, match=says) as error:
        NSA(**given)
    assert len(str(error.value).split(". ")) > 1  # and what to do


def test_mistakes_of_packed_calls() -> None:
    x = tuple(t[0] for t in inputs(1, 20))
    for cu, says in (
        (torch.tensor([0, 10, 5, 20]), "ascending"),
        (torch.tensor([0, 21]), "20 at most"),
        (torch.tensor([0.0, 20.0]), "integer"),
        ((torch.tensor([0, 20]), torch.tensor([0, 10, 20])), "one length"),
        ((torch.tensor([0, 20]), torch.tensor([0, 19])), "a key for every query"),
    ):
        with pytest.raises(errors.WrongArgument, match=says):
            NSA(*x, cu_seqlens=cu, **BACKEND)


def test_mistakes_of_the_other_forms() -> None:
    x = inputs(1, 40)
    q, k, v = x[:3]
    wrong: list[tuple[Any, str]] = [
        (lambda: parallel_nsa(q, k, v), "block_indices"),
        (lambda: fla(x, block_counts=2), "block_counts"),
        (lambda: fla(x, block_counts=torch.full((1, 40, 2), 2)), "block_counts"),
        (lambda: fla(x, block_counts=torch.full((1, 40), 3)), "block_counts"),
        (lambda: fla(x, block_size=24), "block_size"),
        (lambda: fla(x, window_size=-1), "window_size"),
        (lambda: fla(inputs(2, 40), cu_seqlens=torch.tensor([0, 40])), "q="),
        (lambda: linear_compress(k[0], torch.ones(2, 3, 4), torch.tensor([0, 40]), 8, 4), "w="),
        (lambda: avgpool_compress(k[0], None, torch.tensor([0, 40]), 8, 3), "kernel_size"),
        (
            lambda: topk_sparse_attention(q[0], k[0], v[0], torch.zeros(1, 40, 3).int(), 16, CU[:2]),
            "cu_seqlens",
        ),
        (
            lambda: topk_sparse_attention(
                q[0], k[0], v[0], torch.zeros(1, 40, 3).int(), 16, torch.tensor([0, 40])
            ),
            "topk_idx",
        ),
    ]
    for call, says in wrong:
        with pytest.raises(errors.WrongArgument, match=says):
            call()

"""A call that gives lists of tokens: the formula, its gradients, every mod and row function, the same bits always."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attn_engine import AttentionEngine, CustomIO, meta_tensor
from attn_engine.errors import UnsupportedOnBackend
from attn_engine.library import OnlineRelu, OnlineSigmoid, sink_softmax, sparse_attention
from attn_engine.runtime import token_lists
from attn_engine.runtime.cpu_compile import find_compiler
from attn_engine.runtime.token_errors import WrongTokens
from tests.tokens.formulas import attend, drawn

CPU = "cpu" if find_compiler() is not None else "torch"
TOLERANCE = {torch.float32: 3e-5, torch.float64: 1e-11, torch.bfloat16: 2e-2}


def tensors(heads: int, kv_heads: int, dims: tuple[int, int], dtype: torch.dtype) -> list[Tensor]:
    """q, k, v of 2 batches, 3 queries, 40 keys."""
    shapes = ((2, 3, heads, dims[0]), (2, 40, kv_heads, dims[0]), (2, 40, kv_heads, dims[1]))
    return [torch.randn(x).to(dtype).requires_grad_() for x in shapes]


def close(found: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    """bfloat16 is rounded where weights and gradients of scores are multiplied: errors are those of the largest."""
    limit = TOLERANCE[dtype]
    largest = want.detach()[want > float("-inf")].abs().max().item() if dtype is torch.bfloat16 else 1.0
    torch.testing.assert_close(found.double(), want, rtol=limit, atol=limit * max(1.0, largest))


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize(
    ("backend", "heads", "kv_heads", "lists", "dtype"),
    [
        (CPU, 6, 2, 2, torch.float32),
        (CPU, 40, 1, 1, torch.float32),
        ("torch", 6, 2, 2, torch.float32),
        ("torch", 6, 2, 1, torch.float64),
        pytest.param(CPU, 1, 1, 1, torch.float32, marks=pytest.mark.slow),
        pytest.param(CPU, 6, 2, 1, torch.float64, marks=pytest.mark.slow),
        pytest.param(CPU, 20, 1, 1, torch.bfloat16, marks=pytest.mark.slow),
        ("reference", 6, 2, 2, torch.float64),
        pytest.param("triton-interpreter", 3, 1, 1, torch.float32, marks=pytest.mark.slow),
    ],
)
def test_formula(
    backend: str, heads: int, kv_heads: int, lists: int, dtype: torch.dtype, ragged: bool, seed: int
) -> None:
    """o, lse and the gradients of both."""
    torch.manual_seed(seed)
    q, k, v = given = tensors(heads, kv_heads, (24, 16), dtype)
    indices = drawn(2, 3, lists, 40, 11, ragged=ragged)
    o, lse = sparse_attention(q, k, indices, v, sm_scale=0.5, return_lse=True, backend=backend)
    want, want_lse = attend(q, k, v, indices, 0.5)
    close(o, want, dtype)
    close(lse, want_lse, dtype)
    d_o, d_lse = torch.randn(o.shape).to(dtype), torch.randn(lse.shape)
    found = torch.autograd.grad(o, given, d_o, retain_graph=True)
    for x, y in zip(found, torch.autograd.grad(want, given, d_o.double(), retain_graph=True), strict=True):
        close(x, y.double(), dtype)
    seen = lse.detach() > float("-inf")
    found = torch.autograd.grad(lse[seen], (q, k), d_lse[seen].to(lse.dtype))
    for x, y in zip(found, torch.autograd.grad(want_lse[seen], (q, k), d_lse[seen].double()), strict=True):
        close(x, y.double(), dtype)


@pytest.mark.parametrize("backend", [CPU, "torch", "reference"])
def test_latent_rows_are_read_once(backend: str, seed: int) -> None:
    """Values are the first columns of the keys, and kv gets one gradient of both."""
    torch.manual_seed(seed)
    q, kv, _ = tensors(3, 1, (24, 16), torch.float32)
    indices = drawn(2, 3, 1, 40, 50, ragged=True)
    o = sparse_attention(q, kv, indices.int(), dim_v=16, backend=backend)
    want, _ = attend(q, kv, kv[..., :16], indices, 24**-0.5)
    close(o, want, torch.float32)
    weights = torch.randn(o.shape)
    found = torch.autograd.grad(o, (q, kv), weights)
    for x, y in zip(found, torch.autograd.grad(want, (q, kv), weights.double()), strict=True):
        close(x, y.double(), torch.float32)


@pytest.mark.parametrize("page", [1, 8, 16])
def test_pages_and_slots(page: int, seed: int) -> None:
    """The bits of contiguous keys; what no list names, and unused entries of the table, are never used."""
    torch.manual_seed(seed)
    pages = -(-40 // page)
    q, kv, _ = tensors(3, 1, (24, 16), torch.float32)
    indices, length = drawn(2, 3, 1, 40, 11, ragged=True), torch.tensor([40, 17], dtype=torch.int32)
    q, kv = q.detach(), kv.detach()
    cache = torch.full((2 * pages + 3, page, 1, 24), float("nan"))
    table = torch.full((2, pages + 2), 2147480000, dtype=torch.int32)
    slots = torch.full(indices.shape, -1)
    free = torch.randperm(len(cache)).tolist()
    for b in range(2):
        for u in sorted({u for u in indices[b].flatten().tolist() if 0 <= u < length[b]}):
            if table[b, u // page] == 2147480000:
                table[b, u // page] = free.pop()
            cache[table[b, u // page], u % page] = kv[b, u]
            slots[b][indices[b] == u] = int(table[b, u // page]) * page + u % page
    limits = [[int(n)] * 3 for n in length]
    want, want_lse = attend(q, kv, kv[..., :16], indices, 0.3, limits=limits)
    given: dict[str, Any] = {"dim_v": 16, "sm_scale": 0.3, "return_lse": True, "backend": CPU}
    poisoned = kv.clone()
    for b in range(2):
        poisoned[b, [u for u in range(40) if u not in indices[b] or u >= length[b]]] = float("nan")
    plain = sparse_attention(q, poisoned, indices, len_kv=length, **given)
    close(plain[0], want, torch.float32)
    close(plain[1], want_lse, torch.float32)
    paged = sparse_attention(q, cache, indices, block_table=table, len_kv=length, **given)
    physical = sparse_attention(q, cache, slots, physical=True, **given)
    for found in (paged, physical):
        assert torch.equal(found[0], plain[0])
        assert torch.equal(found[1], plain[1])


def test_caches_that_share_a_buffer(seed: int) -> None:
    """K and V of a page beside each other, heads before rows: nothing is copied whole, and the bits are the same."""
    torch.manual_seed(seed)
    q, buffer = torch.randn(2, 3, 6, 24), torch.randn(9, 2, 2, 8, 24)
    k, v = (x.transpose(1, 2) for x in buffer.unbind(1))
    slots = torch.stack([torch.randperm(72)[:9] for _ in range(12)]).view(2, 3, 2, 9)
    given: dict[str, Any] = {"physical": True, "backend": CPU}
    found = sparse_attention(q, k, slots, v[..., :16], **given)
    assert torch.equal(found, sparse_attention(q, k.contiguous(), slots, v[..., :16].contiguous(), **given))


def test_all_tokens_are_the_dense_attention(seed: int) -> None:
    torch.manual_seed(seed)
    q, k, v = tensors(6, 2, (24, 16), torch.float32)
    indices = torch.arange(64).expand(2, 3, 1, 64)  # more than there are
    metas = [meta_tensor(None, None, None, d, dtype=torch.float32) for d in (24, 24, 16)]
    o = sparse_attention(q, k, indices, v, backend=CPU)
    torch.testing.assert_close(o, AttentionEngine(metas, backend=CPU)(q, k, v), rtol=2e-5, atol=2e-6)


def test_entries_count_as_often_as_they_are_named(seed: int) -> None:
    """Lists are multisets, cut where topk_length says."""
    torch.manual_seed(seed)
    q, k, v = given = tensors(6, 2, (24, 16), torch.float32)
    indices, counts = torch.randint(6, (2, 3, 2, 20)), torch.tensor([[20, 0, 7], [1, 20, 3]])
    o = sparse_attention(q, k, indices, v, topk_length=counts, backend=CPU)
    want, _ = attend(q, k, v, indices, 24**-0.5, counts=counts)
    close(o, want, torch.float32)
    weights = torch.randn(o.shape)
    found = torch.autograd.grad(o, given, weights)
    for x, y in zip(found, torch.autograd.grad(want, given, weights.double()), strict=True):
        close(x, y.double(), torch.float32)


def test_lists_without_an_entry(seed: int) -> None:
    """Nothing is seen: zeros, lse = -inf, and gradients of zero."""
    torch.manual_seed(seed)
    q, k, v = given = tensors(6, 2, (24, 16), torch.float32)
    o, lse = sparse_attention(q, k, torch.zeros(2, 3, 2, 0).int(), v, return_lse=True, backend="torch")
    assert not o.any() and bool((lse == float("-inf")).all())
    assert not any(x.any() for x in torch.autograd.grad(o.sum(), given))


def test_same_bits_for_any_number_of_threads(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Many pieces, tokens that many lists name; and again the same."""
    torch.manual_seed(seed)
    monkeypatch.setattr(token_lists, "PIECE", 4000)
    q, k = torch.randn(1, 30, 40, 24, requires_grad=True), torch.randn(1, 70, 1, 24, requires_grad=True)
    indices, threads = drawn(1, 30, 1, 70, 64, ragged=True), torch.get_num_threads()

    def results() -> tuple[Tensor, ...]:
        o, lse = sparse_attention(q, k, indices, dim_v=16, return_lse=True, backend=CPU)
        return (o, lse, *torch.autograd.grad(o.square().sum(), (q, k)))

    try:
        torch.set_num_threads(1)
        first = results()
        torch.set_num_threads(2)
        again = [results() for _ in range(2)]
    finally:
        torch.set_num_threads(threads)
    want, _ = attend(q, k, k[..., :16], indices, 24**-0.5)
    close(first[0], want, torch.float32)
    for found in again:
        assert all(torch.equal(x, y) for x, y in zip(first, found, strict=True))


def shifted(score: Any, custom: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return (
        score
        + custom.input_tensors["bias"][h, kv_idx]
        - 0.05 * (q_idx + custom.input_tensors["offset"][b] - kv_idx)
    )


def before(b: Any, h: Any, q_idx: Any, kv_idx: Any, custom: Any) -> Any:
    return kv_idx <= q_idx + custom.input_tensors["offset"][b]


@pytest.mark.parametrize(
    ("backend", "layout"),
    [("torch", "bshd"), ("torch", "bhsd"), pytest.param(CPU, "bhsd", marks=pytest.mark.slow)],
)
def test_mods_see_users_positions(backend: str, layout: str, seed: int) -> None:
    """Heads, batches, positions of queries and of tokens; a captured tensor gets its gradient."""
    torch.manual_seed(seed)
    q, k, v = tensors(6, 2, (24, 16), torch.float32)
    bias, offset = torch.randn(6, 40, requires_grad=True), torch.tensor([30, 11], dtype=torch.int32)
    io = CustomIO({"bias": ("heads", "seq_len_kv"), "offset": ("batch",)})
    metas = [meta_tensor(None, None, None, d, dtype=torch.float32) for d in (24, 24, 16)]
    engine = AttentionEngine(metas, shifted, io, mask_mod=before, scale=0.4, backend=backend, layout=layout)
    indices = drawn(2, 3, 2, 40, 12, ragged=True)
    views = (x if layout == "bshd" else x.transpose(1, 2) for x in (q, k, v))
    o = engine(*views, bias, offset, token_indices=indices)
    o = o if layout == "bshd" else o.transpose(1, 2)

    def logit(score: Tensor, b: int, h: int, s: int, tokens: Tensor) -> Tensor:
        moved = score + bias[h, tokens].double() - 0.05 * (s + int(offset[b]) - tokens)
        return torch.where(tokens <= s + int(offset[b]), moved, float("-inf"))

    want, _ = attend(q, k, v, indices, 0.4, logit=logit)
    close(o, want, torch.float32)
    weights, wanted = torch.randn(o.shape), (q, k, v, bias)
    found = torch.autograd.grad(o, wanted, weights)
    for x, y in zip(found, torch.autograd.grad(want, wanted, weights.double()), strict=True):
        close(x, y.double(), torch.float32)


@pytest.mark.parametrize("rule", [OnlineSigmoid, pytest.param(OnlineRelu, marks=pytest.mark.slow)])
def test_row_functions(rule: Any, seed: int) -> None:
    """Against the definition on gathered keys, which test_formula has compared with the formula."""
    torch.manual_seed(seed)
    q, k, v = given = tensors(6, 2, (24, 16), torch.float32)
    metas = [meta_tensor(None, None, None, d, dtype=torch.float32) for d in (24, 24, 16)]
    engine = AttentionEngine(metas, online_func=rule(), backend=CPU)
    indices = drawn(2, 3, 2, 40, 12, ragged=True)
    o, want = engine(q, k, v, token_indices=indices), engine.reference(q, k, v, token_indices=indices)
    close(o, want, torch.float32)
    weights = torch.randn(o.shape)
    found = torch.autograd.grad(o, given, weights)
    for x, y in zip(found, torch.autograd.grad(want, given, weights.double()), strict=True):
        close(x, y.double(), torch.float32)


def test_normalisers_that_ask_for_the_head_are_refused() -> None:
    metas = [meta_tensor(None, None, None, 16, dtype=torch.float32)] * 3
    engine = AttentionEngine(metas, online_func=sink_softmax(torch.zeros(2)), backend=CPU)
    q, k = torch.zeros(1, 1, 2, 16), torch.zeros(1, 4, 1, 16)
    with pytest.raises(UnsupportedOnBackend):
        engine(q, k, k, token_indices=torch.zeros(1, 1, 1, 2, dtype=torch.int32))


LIST = torch.zeros(2, 3, 1, 4, dtype=torch.int32)
TABLE = torch.zeros(2, 2, dtype=torch.int32)
BAD: list[tuple[str, dict[str, Any]]] = [
    ("indices", {"indices": LIST.float()}),
    ("indices", {"indices": LIST[:1]}),
    ("indices", {"indices": LIST.expand(2, 3, 2, 4)}),
    ("topk_length", {"topk_length": torch.zeros(2, dtype=torch.int32)}),
    ("topk_length", {"topk_length": torch.zeros(2, 3)}),
    ("len_kv", {"len_kv": torch.tensor([41, 0])}),
    ("len_kv", {"len_kv": torch.tensor([-1, 0])}),
    ("len_kv", {"physical": True, "len_kv": torch.tensor([1, 1])}),
    ("indices", {"check_duplicates": True}),
    ("block_table", {"block_table": TABLE[:1]}),
    ("block_table", {"block_table": TABLE.float()}),
    ("block_table", {"block_table": TABLE + 9}),
    ("block_table", {"block_table": TABLE - 1}),
]


@pytest.mark.parametrize(("name", "options"), BAD)
def test_bad_lists_are_refused(name: str, options: dict[str, Any]) -> None:
    q, kv, _ = tensors(3, 1, (24, 16), torch.float32)
    with pytest.raises(WrongTokens) as found:
        sparse_attention(q, kv, **{"indices": LIST, "backend": CPU, **options})
    assert found.value.details["argument"] == name


def test_lists_stand_alone() -> None:
    q, kv, _ = tensors(5, 1, (24, 24), torch.float32)
    metas = [meta_tensor(None, None, None, 24, dtype=torch.float32)] * 3
    engine = AttentionEngine(metas, backend=CPU)
    others = {"token_slots": LIST, "start_q": torch.zeros(2), "block_sparse_indices": LIST}
    for name, x in others.items():
        with pytest.raises(WrongTokens) as found:
            engine(q, kv, kv, token_indices=LIST, **{name: x})
        assert found.value.details["argument"] == name
    with pytest.raises(WrongTokens):
        engine(q, kv, kv, token_counts=torch.ones(2, 3))


@pytest.mark.parametrize("paged", [False, True])
def test_an_engine_checks_itself(paged: bool, seed: int) -> None:
    """Output, row values and gradients over lists, also in a cache whose other rows are NaN; differences are told."""
    torch.manual_seed(seed)
    q, k, v = tensors(6, 2, (24, 16), torch.float32)
    slopes = torch.rand(6, requires_grad=True)

    def nearer(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return score - slopes[h] * (q_idx - kv_idx)

    metas = [meta_tensor(None, None, None, d, dtype=torch.float32) for d in (24, 24, 16)]
    engine = AttentionEngine(metas, nearer, scale=0.3, backend="torch")
    given: dict[str, Tensor] = {"token_indices": drawn(2, 3, 1, 40, 11, ragged=True)}
    inputs = q, k, v
    if paged:
        table = torch.randperm(12)[:10].view(2, 5)
        caches = [torch.full((13, 8, 2, x.shape[3]), float("nan")) for x in (k, v)]
        for cache, x in zip(caches, (k, v), strict=True):
            cache[table.flatten()] = x.detach().view(10, 8, 2, -1)
        inputs = q, *caches
        given |= {"block_table": table, "len_kv": torch.tensor([40, 17])}
    report = engine.check(*inputs, **given)
    report.raise_if_failed()
    found = {t.name: t for t in report.tensors}
    assert found.keys() >= {"o", "lse", "d q", "d k", "d v", "d slopes"}
    wanted = engine.reference(*inputs, **given)
    assert isinstance(wanted, Tensor)
    largest = float(wanted.detach().abs().max())
    assert found["o"].relative == pytest.approx(found["o"].error / largest, rel=1e-6)
    assert all(q.grad is None for q in inputs)
    with pytest.raises(WrongTokens):
        engine.check(*inputs, **{**given, "token_indices": torch.zeros(1, 1, 1, 1)})

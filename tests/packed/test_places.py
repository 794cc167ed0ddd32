"""Where sequences may lie: in a batch from a row on, in either layout, with rows around them that nobody reads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attn_engine import AttentionEngine, OnlineFunc, meta_tensor, with_pooled
from attn_engine.library import OnlineSoftmax
from attn_engine.runtime.cpu_compile import find_compiler
from tests.packed.programs import HEADS, KV_HEADS, PROGRAMS, alone, causal, engine, tensors_of
from tests.packed.test_packed import bounds, cut

CPU = "cpu" if find_compiler() is not None else "torch"
ROWS = 90
# first row and length of q and kv: padded on the left, on the right, on both sides, not at all, and nothing
PLACES = [
    ((20, 70), (20, 70)),
    ((0, 33), (0, 64)),
    ((7, 64), (13, 5)),
    ((0, ROWS), (0, ROWS)),
    ((90, 0), (4, 0)),
]


def poisoned(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype)


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize(
    "name", ["causal", pytest.param("biases by row, key and sequence", marks=pytest.mark.slow), "sink"]
)
@pytest.mark.parametrize("backend", [CPU, "torch", "triton-interpreter"])
def test_in_a_batch(name: str, layout: str, backend: str, seed: int) -> None:
    """Rows outside of a sequence hold NaN: they are neither read nor, in results and gradients, anything but 0."""
    if backend == "triton-interpreter" and (layout == "bhsd" or name != "causal"):
        pytest.skip("the same kernels as of packed sequences")
    torch.manual_seed(seed)
    n = len(PLACES)
    start_q, len_q, start_kv, len_kv = (
        torch.tensor([p[i][j] for p in PLACES]) for i, j in ((0, 0), (0, 1), (1, 0), (1, 1))
    )
    captured = tensors_of(name, n, ROWS, ROWS, torch.float32)
    q = poisoned(n, ROWS, HEADS, 16)
    k, v = poisoned(n, ROWS, KV_HEADS, 16), poisoned(n, ROWS, KV_HEADS, 16)
    weights = poisoned(n, ROWS, HEADS, 16)
    for b, ((first_q, rows_q), (first_kv, rows_kv)) in enumerate(PLACES):
        q[b, first_q : first_q + rows_q] = torch.randn(rows_q, HEADS, 16)
        weights[b, first_q : first_q + rows_q] = torch.randn(rows_q, HEADS, 16)
        for x in (k, v):
            x[b, first_kv : first_kv + rows_kv] = torch.randn(rows_kv, KV_HEADS, 16)
    for x in (q, k, v):
        x.requires_grad_()
    built = engine(name, captured, backend, torch.float32, layout=layout)
    turned = (lambda x: x.transpose(1, 2)) if layout == "bhsd" else (lambda x: x)
    o, rows = built(
        *map(turned, (q, k, v)),
        start_q=start_q,
        len_q=len_q,
        start_kv=start_kv,
        len_kv=len_kv,
        return_final_rowscales=True,
    )
    o = turned(o)
    inputs = [
        (q[b, i : i + m], k[b, j : j + p], v[b, j : j + p]) for b, ((i, m), (j, p)) in enumerate(PLACES)
    ]
    each = alone(name, captured, inputs)
    want = torch.zeros_like(o, dtype=torch.float64)
    want_rows = {r: torch.full(x.shape, -torch.inf if r == "lse" else 0.0).double() for r, x in rows.items()}
    loss = torch.zeros((), dtype=torch.float64)
    for b, ((first, length), _) in enumerate(PLACES):
        want[b, first : first + length] = each[b][0].detach()
        for r, x in each[b][1].items():
            want_rows[r][b, :, first : first + length] = x.detach()
        loss = loss + (each[b][0] * weights[b, first : first + length]).sum()
    torch.testing.assert_close(o.double(), want, rtol=2e-5, atol=2e-5)
    if "lse" in rows:
        torch.testing.assert_close(rows["lse"].double(), want_rows["lse"], rtol=2e-5, atol=2e-5)
    learned = [captured[x] for x in PROGRAMS[name].learned]
    got = torch.autograd.grad(o, [q, k, v, *learned], weights)
    wanted = torch.autograd.grad(loss, [q, k, v, *learned])
    for g, w in zip(got, wanted, strict=True):
        torch.testing.assert_close(g, w.to(g.dtype), rtol=2e-4, atol=2e-5 * max(1.0, w.abs().max().item()))


@pytest.mark.parametrize("backend", [CPU, "triton-interpreter"])
def test_rows_after_the_last_sequence(backend: str, seed: int) -> None:
    """A packed buffer may be longer than its sequences: what lies behind them is never read, and gives 0."""
    torch.manual_seed(seed)
    cu_len = bounds([40, 70])
    q, k, v = (torch.cat([torch.randn(110, 2, 16), poisoned(30, 2, 16)]).requires_grad_() for _ in range(3))
    built = engine("causal", {}, backend, torch.float32)
    o, rows = built(q, k, v, cu_len_q=cu_len, return_final_rowscales=True)
    each = alone("causal", {}, [tuple(x[i:j] for x in (q, k, v)) for i, j in ((0, 40), (40, 110))])
    torch.testing.assert_close(o[:110].double(), torch.cat([x for x, _ in each]), rtol=2e-5, atol=2e-5)
    assert (o[110:] == 0).all() and (rows["lse"][:, 110:] == -torch.inf).all()
    for g in torch.autograd.grad(o, (q, k, v), torch.cat([torch.randn(110, 2, 16), poisoned(30, 2, 16)])):
        assert g.isfinite().all() and (g[110:] == 0).all()


@pytest.mark.parametrize("backend", [CPU, "torch", "triton-interpreter"])
def test_head_first(backend: str, seed: int) -> None:
    """In layout "bhsd" packed tensors are (heads, rows, dim)."""
    torch.manual_seed(seed)
    cu_len = bounds([5, 66, 0, 31])
    q, k, v = (torch.randn(102, n, 16) for n in (HEADS, KV_HEADS, KV_HEADS))
    by_row = engine("causal", {}, backend, torch.float32)
    by_head = engine("causal", {}, backend, torch.float32, layout="bhsd")
    turned = [x.transpose(0, 1) for x in (q, k, v)]
    wanted = by_row(q, k, v, cu_len_q=cu_len)
    assert torch.equal(by_head(*turned, cu_len_q=cu_len).transpose(0, 1), wanted)
    assert torch.equal(by_head(*(x.contiguous() for x in turned), cu_len_q=cu_len).transpose(0, 1), wanted)


@pytest.mark.parametrize("query_heads", [2, 8])
@pytest.mark.parametrize("name", [pytest.param("full", marks=pytest.mark.slow), "causal from the end"])
def test_decoding(name: str, query_heads: int, seed: int) -> None:
    """One query or a few per sequence, caches of any length: kernels for few rows, whose keys are split."""
    torch.manual_seed(seed)
    lengths = [(1, 3000), (1, 1), (2, 700), (0, 5), (1, 0)]
    captured = tensors_of(name, len(lengths), 2, 3000, torch.float32)
    q_len, kv_len = zip(*lengths, strict=True)
    cu_len_q, cu_len_kv = bounds(list(q_len)), bounds(list(kv_len))
    q, k, v = (torch.randn(sum(n), h, 64) for n, h in ((q_len, query_heads), (kv_len, 2), (kv_len, 2)))
    built = engine(name, captured, CPU, torch.float32, (64, 64))
    o = built(q, k, v, cu_len_q=cu_len_q, cu_len_kv=cu_len_kv)
    inputs = list(zip(cut(q, cu_len_q), cut(k, cu_len_kv), cut(v, cu_len_kv), strict=True))
    want = torch.cat([x for x, _ in alone(name, captured, inputs)])
    torch.testing.assert_close(o.double(), want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("backend", [CPU, pytest.param("triton-interpreter", marks=pytest.mark.slow)])
def test_pooled(backend: str, seed: int) -> None:
    """Pooled weights of sequences are a batch of the longest length, with zeros beyond the end of the others."""
    torch.manual_seed(seed)
    lengths = [70, 5, 33]
    cu_len = bounds(lengths)
    q, k, v = (torch.randn(108, n, 16) for n in (HEADS, KV_HEADS, KV_HEADS))
    rule: OnlineFunc = with_pooled(with_pooled(OnlineSoftmax(), max=16), sum=32)
    built = AttentionEngine(
        [meta_tensor(None, None, None, 16, dtype=torch.float32)] * 3,
        online_func=rule,
        mask_mod=causal,
        backend=backend,
    )
    _, rows = built(q, k, v, cu_len_q=cu_len, return_final_rowscales=True)
    for kind, block in (("max", 16), ("sum", 32)):
        found = rows[f"pooled_{kind}"]
        assert found.shape == (3, HEADS, 70, -(-70 // block))
        for b, (i, n) in enumerate(zip(cu_len.tolist(), lengths, strict=False)):
            _, alone_rows = built.reference(
                *(x[None, i : i + n] for x in (q, k, v)), return_final_rowscales=True
            )
            want = torch.zeros_like(found[b]).double()
            want[:, :n, : -(-n // block)] = alone_rows[f"pooled_{kind}"][0]
            torch.testing.assert_close(found[b].double(), want, rtol=1e-5, atol=1e-6)


def test_pooled_sums_have_gradients(seed: int) -> None:
    torch.manual_seed(seed)
    cu_len = bounds([70, 5, 33])
    inputs = [torch.randn(108, n, 16, requires_grad=True) for n in (HEADS, KV_HEADS, KV_HEADS)]
    built = AttentionEngine(
        [meta_tensor(None, None, None, 16, dtype=torch.float32)] * 3,
        online_func=with_pooled(OnlineSoftmax(), sum=32),
        backend=CPU,
    )
    weights = torch.randn(3, HEADS, 70, 3)

    def gradients(call: Any) -> tuple[Tensor, ...]:
        o, rows = call(*inputs, cu_len_q=cu_len, return_final_rowscales=True)
        return torch.autograd.grad((rows["pooled_sum"] * weights).sum() + o.sum() + rows["lse"].sum(), inputs)

    for g, w in zip(gradients(built), gradients(built.reference), strict=True):
        torch.testing.assert_close(g.double(), w.double(), rtol=1e-4, atol=1e-5)

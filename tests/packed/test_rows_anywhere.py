"""Sequences whose rows lie anywhere, read and written where they are: as gathering, attending, putting back."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from attn_engine import AttentionEngine, errors, meta_tensor
from attn_engine.codegen.pipeline import lower
from attn_engine.codegen.schedule import cpu_schedule
from attn_engine.ir.program import Sequences
from attn_engine.ir.tile import Narrow, walk
from attn_engine.library import causal, dynamic_sparse_attention
from attn_engine.library.sparse import buckets
from attn_engine.library.sparse.buckets import by_keep
from attn_engine.row_calls import attend_listed

HEADS, KV_HEADS, DIM, DIM_V = 4, 2, 32, 24
# Of q and of kv: long and short ones, one without keys, one without queries; more rows than sequences have.
LENGTHS = ((70, 1, 5, 0, 33), (70, 40, 0, 7, 130))
SPARE = 6


def engine(
    backend: str, dtype: torch.dtype = torch.float32, layout: str = "bshd", dim_v: int = DIM_V
) -> AttentionEngine:
    metas = [meta_tensor(None, None, None, d, dtype=dtype) for d in (DIM, DIM, dim_v)]
    return AttentionEngine(metas, mask_mod=causal(), backend=backend, layout=layout)


def lengths_and_places() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    cu_len = tuple(torch.tensor([0, *x]).cumsum(0) for x in LENGTHS)
    places = tuple(torch.randperm(sum(x) + SPARE)[: sum(x)].int() for x in LENGTHS)
    return (cu_len[0], cu_len[1]), (places[0], places[1])


def tensors(dtype: torch.dtype = torch.float32, dim_v: int = DIM_V) -> tuple[Tensor, Tensor, Tensor]:
    rows = [sum(x) + SPARE for x in LENGTHS]
    shapes = (rows[0], HEADS, DIM), (rows[1], KV_HEADS, DIM), (rows[1], KV_HEADS, dim_v)
    q, k, v = (torch.randn(shape, dtype=dtype) for shape in shapes)
    return q, k, v


def gathered(
    attention: AttentionEngine,
    inputs: tuple[Tensor, Tensor, Tensor],
    lengths: tuple[Tensor, Tensor],
    places: tuple[Tensor, Tensor],
) -> Tensor:
    """The definition: rows in order, attention, each row back to its place."""
    q, k, v = inputs
    of_q, of_k = (x.long() for x in places)
    o = attention(q[of_q], k[of_k], v[of_k], cu_len_q=lengths[0], cu_len_kv=lengths[1])
    return torch.zeros(*q.shape[:2], v.shape[2], dtype=q.dtype).index_copy(0, of_q, o)


def poison(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> None:
    """NaN in the memory that the next tensors of this size are likely to get."""
    waste = [torch.full(shape, torch.nan, dtype=dtype) for _ in range(4)]
    del waste


@pytest.mark.parametrize(
    ("backend", "dtype"), [("cpu", torch.float32), ("cpu", torch.bfloat16), ("torch", torch.float32)]
)
def test_as_gathered(backend: str, dtype: torch.dtype) -> None:
    attention, (lengths, places) = engine(backend, dtype), lengths_and_places()
    inputs = tensors(dtype)
    leaves = tuple(x.clone().requires_grad_() for x in inputs)
    want = gathered(attention, leaves, lengths, places)
    weights = torch.randn_like(want)
    gradients = torch.autograd.grad(want, leaves, weights)
    for _ in range(2):
        poison(tuple(want.shape), dtype)
        found = attend_listed(attention, leaves, (), lengths, places)
        torch.testing.assert_close(found, want, rtol=0, atol=0)
        poison(tuple(inputs[0].shape), dtype)
        for one, other in zip(torch.autograd.grad(found, leaves, weights), gradients, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_heads_first_and_strided() -> None:
    attention, (lengths, places) = engine("cpu", layout="bhsd"), lengths_and_places()
    q, k, v = (x.transpose(0, 1) for x in tensors())  # (heads, rows, dim), rows apart
    found = attend_listed(attention, (q, k, v), (), lengths, places)
    own = tuple(x.transpose(0, 1).contiguous() for x in (q, k, v))
    want = gathered(engine("cpu"), (own[0], own[1], own[2]), lengths, places)
    torch.testing.assert_close(found.transpose(0, 1), want, rtol=1e-6, atol=1e-6)


def test_any_number_of_threads() -> None:
    attention, (lengths, places) = engine("cpu"), lengths_and_places()
    leaves = tuple(x.requires_grad_() for x in tensors())
    before, results = torch.get_num_threads(), list[list[Tensor]]()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            out = attend_listed(attention, (leaves[0], leaves[1], leaves[2]), (), lengths, places)
            results.append([out.detach(), *torch.autograd.grad(out.square().sum(), leaves)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_few_queries() -> None:
    """A kernel of its own, which reads rows of K and V one by one."""
    attention = engine("cpu")
    cu_len = torch.tensor([0, 1, 3]), torch.tensor([0, 90, 100])
    places = torch.tensor([2, 0, 1]).int(), torch.randperm(100).int()
    q, k, v = torch.randn(3, HEADS, DIM), torch.randn(100, KV_HEADS, DIM), torch.randn(100, KV_HEADS, DIM_V)
    found = attend_listed(attention, (q, k, v), (), cu_len, places)
    torch.testing.assert_close(found, gathered(attention, (q, k, v), cu_len, places), rtol=1e-6, atol=1e-6)


def test_gpus_refuse() -> None:
    lengths, places = lengths_and_places()
    with pytest.raises(errors.UnsupportedOnBackend):
        attend_listed(engine("triton-interpreter"), tensors(), (), lengths, places)


def test_tables_name_whole_rows_alone() -> None:
    program = engine("cpu").program
    program = replace(program, sequences=Sequences(packed=True, listed=True))
    for direction in ("forward", "backward"):
        for kernel in lower(program, cpu_schedule(32), direction).kernels:
            for s in walk(kernel.body):
                if isinstance(s, Narrow):
                    whole = s.tensor.removesuffix("_parts").lstrip("d") in ("Q", "K", "V", "O")
                    assert s.places == (f"{s.axis}_places" if whole else None), s


@pytest.mark.parametrize("mode", ["hash", "qk"])
def test_sparse_attention_looks_for_rows_or_moves_them(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long sequences are moved, short ones are not: the same attention, whichever way the tensors lie."""
    marks = [torch.randint(0, 3, (2, 150, 3)) if mode == "hash" else (torch.rand(2, 150, 3) < 0.6).float()
             for _ in range(2)]  # fmt: skip
    q, k, v = (torch.randn(2, 3, 150, DIM).transpose(1, 2).requires_grad_() for _ in range(3))
    weights = torch.randn(2, 150, 3, DIM)
    found = list[list[Tensor]]()
    for short in (buckets.SHORT, 0):
        monkeypatch.setattr(buckets, "SHORT", short)
        out = dynamic_sparse_attention(q, k, v, marks[0], marks[1], sparsity_mode=mode)
        found.append([out, *torch.autograd.grad(out, (q, k, v), weights)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_rows_that_are_kept() -> None:
    keep = torch.tensor([[[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]]])  # (B, N, H)
    side = by_keep(keep, keep).q
    assert side.ends.tolist() == [0, 2, 3]
    assert side.rows(heads_first=False).tolist() == [0, 4, 5]  # n * H + h
    assert side.rows(heads_first=True).tolist() == [0, 2, 5]  # h * N + n
    assert side.positions(2, moved=False).tolist() == [[0, 2], [2, 0]]
    assert side.positions(2, moved=True).shape == (4, 2)

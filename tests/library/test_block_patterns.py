"""SparseAttention and LocalStrideSparseAttention against dense float64 formulas of the pattern, on every path."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from attn_engine import errors
from attn_engine.library import LocalStrideSparseAttention, SparseAttention, combine_attn_partitions
from tests.part import part_of

DIM = 16


def kept(
    heads: int, kv_heads: int, n_q: int, n_k: int, size: int, local: int, stride: int, **options: Any
) -> Tensor:
    """(H, n_q, n_k): the local-stride pattern pair by pair, queries being the last positions."""
    step = max(1, int(stride / heads))
    found = torch.zeros(heads, n_q, n_k, dtype=torch.bool)
    for h in range(heads):
        u = 0 if options.get("homo_head") else h // (heads // kv_heads)
        dense = u >= kv_heads - options.get("num_dense_heads", 0)
        for i in range(n_q):
            t = n_k - n_q + i
            for j in range(n_k):
                a, c = t // size, j // size
                if options.get("causal", True):
                    column = (c + u * step + options.get("head_sliding_offset", 0)) % stride == 0
                    found[h, i, j] = j <= t and (a - c < local or dense or column)
                else:
                    found[h, i, j] = max(0, abs(a - c) - local + 1) % stride == 0 or dense
    return found


def dense(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, scale: float | None = None) -> tuple[Tensor, Tensor]:
    group = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(group, 2).double() for x in (k, v))
    score = torch.einsum("bqhd,bkhd->bhqk", q.double(), k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    score = torch.where(keep, score, -torch.inf)
    lse = score.logsumexp(-1)
    weights = torch.where(keep.any(-1, keepdim=True), score.softmax(-1), 0.0)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v), lse


def tensors(n_q: int, n_k: int, heads: int = 4, kv_heads: int = 4, batches: int = 2) -> list[Tensor]:
    shapes = ((n_q, heads), (n_k, kv_heads), (n_k, kv_heads))
    return [torch.randn(batches, n, h, DIM, requires_grad=True) for n, h in shapes]


def agree(out: Tensor, want: Tensor, leaves: list[Tensor]) -> None:
    torch.testing.assert_close(out, want.float(), atol=2e-6, rtol=2e-5)
    weights = torch.randn_like(out)
    found = torch.autograd.grad(out, leaves, weights, retain_graph=True)
    for one, other in zip(
        found, torch.autograd.grad(want, leaves, weights.double(), retain_graph=True), strict=True
    ):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=2e-4)


@pytest.mark.parametrize(
    ("causal", "rows"),
    [
        (
            True,
            ["10000000", "11000000", "11100000", "10110000", "10011000", "10011100", "10010110", "10010011"],
        ),
        (
            False,
            ["11001001", "11100100", "01110010", "00111001", "10011100", "01001110", "00100111", "10010011"],
        ),
    ],
)
def test_local_two_stride_three(causal: bool, rows: list[str]) -> None:
    """Written out: two local blocks, every third column (causal: of the first head)."""
    module = LocalStrideSparseAttention(1, 128, 16, 2, 3, causal=causal)
    k, v = torch.zeros(1, 128, 1, DIM), torch.zeros(1, 128, 1, 128)
    v[0, :, 0] = torch.eye(128)
    seen = module(torch.zeros(1, 128, 1, DIM), k, v)
    assert isinstance(seen, Tensor)
    blocks = (seen[0, :, 0] > 0).view(8, 16, 8, 16).any(-1).any(1)
    assert ["".join(str(int(x)) for x in row) for row in blocks] == rows


OPTIONS: dict[str, tuple[tuple[int, int], tuple[int, int], tuple[int, int, int], dict[str, Any]]] = {
    "plain": ((4, 4), (100, 100), (16, 2, 3), {}),
    "grouped, a dense head": ((4, 2), (100, 100), (16, 2, 3), {"num_dense_heads": 1}),
    "chunk of a prefill": ((4, 4), (7, 100), (16, 1, 4), {"head_sliding_offset": 1}),
    "decode": ((4, 2), (1, 90), (16, 1, 4), {}),
    "one pattern": ((4, 4), (33, 90), (16, 1, 4), {"homo_head": True}),
    "both sides": ((4, 4), (100, 100), (16, 2, 3), {"causal": False}),
    "small blocks": ((2, 2), (70, 70), (8, 2, 3), {}),
    "dense": ((2, 2), (70, 70), (32, 0, 1), {}),
}


# Each is kernels of its own: those left out are the simpler ones, whose parts are in the others.
SHOWN = ("grouped, a dense head", "chunk of a prefill", "decode", "both sides", "small blocks")


@pytest.mark.parametrize("name", part_of(SHOWN.__contains__, OPTIONS))
def test_local_stride(name: str) -> None:
    (heads, kv_heads), lengths, pattern, options = OPTIONS[name]
    module = LocalStrideSparseAttention(heads, 128, *pattern, num_kv_heads=kv_heads, **options)
    given = tensors(*lengths, heads, kv_heads)
    out, lse = module(*given, return_lse=True)
    want, want_lse = dense(*given, kept(heads, kv_heads, *lengths, *pattern, **options))  # pyright: ignore[reportArgumentType]
    agree(out, want, given)
    agree(lse, want_lse, given[:2])


def test_active_heads_are_a_part_of_the_pattern() -> None:
    module = LocalStrideSparseAttention(8, 128, 16, 1, 4, active_head_range=(3, 5))
    given = tensors(60, 60, 2, 2)
    want, _ = dense(*given, kept(8, 8, 60, 60, 16, 1, 4)[3:5])  # pyright: ignore[reportArgumentType]
    agree(module(*given), want, given)


@pytest.mark.parametrize(
    ("size", "pattern_heads"), [pytest.param(16, 1, marks=pytest.mark.slow), (16, 2), (32, 4)]
)
def test_any_pattern(size: int, pattern_heads: int) -> None:
    pattern = torch.rand(pattern_heads, 6, 6) < 0.4  # empty rows, blocks of the future
    given = tensors(6 * size - 5, 6 * size - 5, 4, 2)
    whole = (
        pattern.repeat_interleave(4 // pattern_heads, 0).repeat_interleave(size, 1).repeat_interleave(size, 2)
    )
    keep = whole[:, : given[0].shape[1], : given[1].shape[1]]
    for causal in (True, False):
        module = SparseAttention(size, pattern.int(), causal=causal, seq_dim=1)
        want, _ = dense(*given, keep.tril() if causal else keep, 0.3)  # pyright: ignore[reportArgumentType]
        agree(module(*given, sm_scale=0.3), want, given)


def test_layout_and_packed_inputs() -> None:
    q, k, v = tensors(40, 40)
    module = LocalStrideSparseAttention(4, 64, 16, 1, 2, seq_dim=2)
    turned = [x.transpose(1, 2) for x in (q, k, v)]
    want = LocalStrideSparseAttention(4, 64, 16, 1, 2)(q, k, v)
    assert torch.equal(module(*turned).transpose(1, 2), want)
    both = torch.stack(turned)
    assert torch.equal(module(both, split_qkv=lambda x: tuple(x.unbind(0))).transpose(1, 2), want)
    rest = module(turned[0], torch.stack(turned[1:]), split_qkv=lambda x: tuple(x.unbind(0)))
    assert torch.equal(rest.transpose(1, 2), want)


LENGTHS = [0, 1, 15, 16, 17, 70]


@pytest.mark.parametrize(
    ("pattern", "decode"), part_of(lambda p, d: p is not d, [False, True], [False, True])
)
def test_padding_is_as_if_there_were_none(decode: bool, pattern: bool) -> None:
    made = torch.rand(4, 5, 5) < 0.6
    module = SparseAttention(16, made) if pattern else LocalStrideSparseAttention(4, 80, 16, 1, 2)
    left, lengths = torch.tensor([9, 3, 0, 54, 20, 0]), torch.tensor(LENGTHS)
    q, k, v = tensors(1 if decode else 70, 70, batches=len(LENGTHS))
    padded = [x.detach().clone() for x in (q, k, v)]
    for b, (start, n) in enumerate(zip(left.tolist(), LENGTHS, strict=True)):
        for x in padded[1 if decode else 0 :]:
            x[b, :start] = x[b, start + n :] = torch.nan
    for x in padded:
        x.requires_grad_()
    out = module(*padded, left_paddings=left, seqlens=lengths)
    assert isinstance(out, Tensor)
    found = torch.autograd.grad(out.sum(), padded)
    for b, (start, n) in enumerate(zip(left.tolist(), LENGTHS, strict=True)):
        rows = slice(0, 1) if decode else slice(start, start + n)
        keys = slice(start, start + n)
        if decode and n == 0:
            assert torch.equal(out[b], torch.zeros_like(out[b]))
            continue
        alone = [q[b : b + 1, rows], k[b : b + 1, keys], v[b : b + 1, keys]]
        want = module(*alone)
        assert isinstance(want, Tensor)
        torch.testing.assert_close(out[b : b + 1, rows], want)
        for one, other in zip(found, torch.autograd.grad(want.sum(), (q, k, v)), strict=True):
            torch.testing.assert_close(one[b], other[b])


@pytest.mark.parametrize("decode", [False, True])
def test_packed_sequences(decode: bool) -> None:
    module = LocalStrideSparseAttention(4, 80, 16, 1, 2, num_kv_heads=2)
    of_k = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    total = int(of_k[-1])
    q = torch.randn(len(LENGTHS) if decode else total, 4, DIM, requires_grad=True)
    k, v = (torch.randn(total, 2, DIM, requires_grad=True) for _ in range(2))
    out = module(q, k, v, cu_seqlen_k=of_k)
    assert isinstance(out, Tensor)
    found = torch.autograd.grad(out.sum(), (q, k, v), retain_graph=True)
    wanted = torch.zeros_like(out)
    parts: list[Tensor] = []
    for b, n in enumerate(LENGTHS):
        keys = slice(int(of_k[b]), int(of_k[b + 1]))
        rows = slice(b, b + 1) if decode else keys
        if n:
            want = module(q[None, rows], k[None, keys], v[None, keys])
            assert isinstance(want, Tensor)
            wanted[rows] = want[0].detach()
            parts.append(want.sum())
    torch.testing.assert_close(out, wanted)
    for one, other in zip(found, torch.autograd.grad(sum(parts), (q, k, v)), strict=True):  # pyright: ignore[reportArgumentType]
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("hdim", [1, 2])
def test_parts_of_the_keys_combine_to_the_whole(hdim: int) -> None:
    q, k, v = (x.detach() for x in tensors(50, 50))
    whole, lse = dense(q, k, v, torch.ones(4, 50, 50, dtype=torch.bool).tril())
    parts: list[tuple[Tensor, Tensor]] = []
    for keys in (range(20), range(20, 50)):
        mask = torch.zeros(4, 50, 50, dtype=torch.bool)
        mask[:, :, keys] = True
        out, logs = dense(q, k, v, mask.tril())
        parts.append((out if hdim == 2 else out.transpose(1, 2), logs))
    joined = combine_attn_partitions(*parts, hdim=hdim)
    torch.testing.assert_close(joined if hdim == 2 else joined.transpose(1, 2), whole)
    assert lse.isfinite().all()


def test_modules_have_no_state_and_can_be_copied() -> None:
    for module in (LocalStrideSparseAttention(4, 64, 16, 1, 2), SparseAttention(16, torch.ones(4, 4))):
        q, k, v = tensors(30, 30)
        out = module(q, k, v)
        assert not module.state_dict() and not list(module.parameters())
        assert torch.equal(copy.deepcopy(module).to("cpu")(q, k, v), out)


PATTERN = torch.ones(4, 4)
Q, K, V = (x.detach() for x in tensors(64, 64))
FLAT = [x[0] for x in (Q, K, V)]
LOCAL = (4, 64, 16, 1, 2)
WRONG: dict[str, tuple[Any, str]] = {
    "block_size": (lambda: SparseAttention(48, PATTERN), "power of two"),
    "pattern": (lambda: SparseAttention(16, torch.ones(4)), "sparse_pattern"),
    "seq_dim": (lambda: SparseAttention(16, PATTERN, seq_dim=3), "seq_dim"),
    "option": (lambda: SparseAttention(16, PATTERN, block_q=3), "block_q"),
    "heads": (lambda: SparseAttention(16, torch.ones(3, 4, 4))(Q, K, V), "heads of sparse_pattern"),
    "length": (lambda: SparseAttention(16, torch.ones(3, 3))(Q, K, V), "48"),
    "stride": (lambda: LocalStrideSparseAttention(4, 64, 16, 1, 0), "vert_stride"),
    "no local blocks": (lambda: LocalStrideSparseAttention(4, 64, 16, 0, 2), "local_blocks"),
    "kv heads": (lambda: LocalStrideSparseAttention(*LOCAL, num_kv_heads=3), "num_kv_heads"),
    "homo": (lambda: LocalStrideSparseAttention(*LOCAL, homo_head=True, num_dense_heads=1), "num_dense_heads"),
    "heads of q": (lambda: LocalStrideSparseAttention(2, 64, 16, 1, 2)(Q, K, V), "heads of q"),
    "no lengths": (lambda: LocalStrideSparseAttention(*LOCAL)(*FLAT), "cu_seqlen_k"),
    "no split": (lambda: LocalStrideSparseAttention(*LOCAL)(Q), "split_qkv"),
    "lengths disagree": (
        lambda: LocalStrideSparseAttention(*LOCAL)(FLAT[0][:9], *FLAT[1:], cu_seqlen_k=torch.tensor([0, 3, 64])),
        "cu_seqlen_q",
    ),
    "beyond the end": (
        lambda: LocalStrideSparseAttention(*LOCAL)(*FLAT, cu_seqlen_k=torch.tensor([0, 3, 65])), "cu_len",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_mistakes_are_typed(name: str) -> None:
    call, text = WRONG[name]
    with pytest.raises(errors.AttnEngineError, match=text):
        call()

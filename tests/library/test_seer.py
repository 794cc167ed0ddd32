"""SeerAttention's functions over picked blocks against dense float64 formulas, forward and backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attn_engine import errors
from attn_engine.library import (
    block_1d_gqa_sparse_attn_varlen_func,
    block_1d_gqa_sparse_attn_varlen_sim_func,
    block_2d_sparse_attn_varlen_func,
    repeat_kv,
    repeat_kv_varlen,
)
from tests.library.seer_formulas import BLOCK, LENGTHS, attention, cumulative, kept, packed, sparse
from tests.part import part_of

ONE: Any = block_1d_gqa_sparse_attn_varlen_func
TWO: Any = block_2d_sparse_attn_varlen_func
LONGEST, MAX = max(LENGTHS), max(LENGTHS) + 30  # more than the longest one
CU = cumulative(LENGTHS)
SCALE = 0.2


def blocks(length: int, block: int = BLOCK) -> int:
    return -(-length // block)


def draw(function: Any, heads: int, share: float = 0.5, longest: int = MAX, block: int = BLOCK) -> Tensor:
    """Rows without a block, blocks of the future, and noise beyond the ends of sequences."""
    rows = longest if function is not TWO else blocks(longest, block)
    mask = torch.rand(len(LENGTHS), heads, rows, blocks(longest, block)) < share
    mask[0, 0, : rows // 2] = False
    return mask


def agree(found: Any, want: Any, leaves: tuple[Tensor, ...], atol: float = 2e-5) -> None:
    """Output and lse, and the gradients of a loss of both."""
    (out, lse), (exact, exact_lse) = found, want
    torch.testing.assert_close(out, exact.to(out.dtype), atol=atol, rtol=atol)
    assert torch.equal(lse == -torch.inf, exact_lse == -torch.inf)
    torch.testing.assert_close(lse, exact_lse.to(lse.dtype), atol=atol, rtol=atol)
    empty = (exact_lse == -torch.inf).T
    assert empty.any() and torch.equal(out[empty], torch.zeros_like(out[empty]))
    weights, more = torch.randn_like(out), torch.where(empty.T, 0.0, torch.randn_like(lse))

    def loss(o: Tensor, log: Tensor) -> Tensor:
        seen = torch.where(empty.T, torch.zeros_like(log), log)
        return (o * weights.to(o.dtype)).sum() + (seen * more.to(o.dtype)).sum()

    gradients = torch.autograd.grad(loss(out, lse), leaves)
    for one, other in zip(gradients, torch.autograd.grad(loss(exact, exact_lse), leaves), strict=True):
        torch.testing.assert_close(one, other, atol=10 * atol, rtol=10 * atol)


@pytest.mark.parametrize(
    ("function", "group", "mask_of"),
    part_of(
        lambda _, g, of: (g, of) in ((1, "q"), (4, "kv")),
        [ONE, TWO],
        [1, 4],
        ["q", "kv"],
    ),
)
def test_against_the_formula(function: Any, group: int, mask_of: str) -> None:
    """With k and v not repeated, a mask for each head of q or of k."""
    given = packed(2 * group, 2)
    mask = draw(function, 2 * group if mask_of == "q" else 2)
    found = function(*given, CU, CU, MAX, SCALE, mask, BLOCK, return_lse=True)
    agree(found, sparse(*given, mask, SCALE, rows=1 if function is ONE else BLOCK), given)


@pytest.mark.slow
@pytest.mark.parametrize("dims", [(64, 64), (96, 32), (32, 96)])
@pytest.mark.parametrize("group", [3, 8])
@pytest.mark.parametrize("function", [ONE, TWO], ids=["1d", "2d"])
@pytest.mark.parametrize("block", [16, 64, 128])
def test_more_sizes(function: Any, group: int, dims: tuple[int, int], block: int) -> None:
    lengths = [300, 0, 1, block - 1, block, block + 1, 40]
    given = packed(group, 1, dims, lengths)
    mask = draw(function, group, 0.3, 300, block)
    found = function(
        *given, cumulative(lengths), cumulative(lengths), 300, SCALE, mask, block, return_lse=True
    )
    rows = 1 if function is ONE else block
    agree(found, sparse(*given, mask, SCALE, rows=rows, lengths=lengths, block=block), given)


@pytest.mark.parametrize("function", [ONE, TWO], ids=["1d", "2d"])
@pytest.mark.parametrize("deviation", [1.0, pytest.param(2.0, marks=pytest.mark.slow)])
def test_bfloat16_is_as_exact_as_torch(function: Any, deviation: float) -> None:
    given = packed(4, 2, dtype=torch.bfloat16, deviation=deviation)
    mask, rows = draw(function, 2), 1 if function is ONE else BLOCK
    scale = 32**-0.5
    ours, exact, torchs = (
        function(*given, CU, CU, MAX, scale, mask, BLOCK),
        sparse(*given, mask, scale, rows=rows)[0],
        sparse(*given, mask, scale, rows=rows, dtype=torch.bfloat16)[0],
    )
    weights = torch.randn_like(exact)
    results = [(x, *torch.autograd.grad((x.double() * weights).sum(), given)) for x in (ours, exact, torchs)]
    for mine, right, other in zip(*results, strict=True):
        most = (
            2 * (other - right).abs().max() + 1e-5 + torch.finfo(torch.bfloat16).eps * right.abs().max() / 2
        )
        assert (mine - right).abs().max() <= most


def test_simulated_is_the_same_with_repeated_heads() -> None:
    q, k, v = packed(4, 2)
    mask = draw(ONE, 2)
    mine = ONE(q, k, v, CU, CU, MAX, SCALE, mask, BLOCK)
    simulated = block_1d_gqa_sparse_attn_varlen_sim_func(
        q,
        repeat_kv_varlen(k, 2),
        repeat_kv_varlen(v, 2),
        cu_seqlens_k=CU,
        cu_seqlens_q=CU,
        max_seqlen=MAX,
        sm_scale=SCALE,
        block_mask=repeat_kv(mask, 2),
        block_size=BLOCK,
    )
    assert isinstance(mine, Tensor) and isinstance(simulated, Tensor)
    torch.testing.assert_close(mine, simulated)
    weights = torch.randn_like(mine)
    for one, other in zip(
        *(torch.autograd.grad(x, (q, k, v), weights) for x in (mine, simulated)), strict=True
    ):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=2e-4)


def test_a_2d_mask_for_every_query_is_a_1d_mask() -> None:
    given = packed(4, 2)
    mask = draw(TWO, 4)
    rows = mask.repeat_interleave(BLOCK, 2)[:, :, :MAX]
    torch.testing.assert_close(
        TWO(*given, CU, CU, MAX, SCALE, mask, BLOCK), ONE(*given, CU, CU, MAX, SCALE, rows, BLOCK)
    )


def test_every_block_is_causal_attention() -> None:
    given = packed(4, 2)
    for function in (ONE, TWO):
        mask = torch.ones_like(draw(function, 2))
        out = function(*given, CU, CU, MAX, SCALE, mask, BLOCK)
        dense = [
            attention(q, k, v, kept(mask, b, 4, q.shape[0], BLOCK, BLOCK if function is TWO else 1), SCALE)[0]
            for b, (q, k, v) in enumerate(zip(*(x.double().split(LENGTHS) for x in given), strict=True))
        ]
        torch.testing.assert_close(out, torch.cat(dense).float(), atol=2e-6, rtol=2e-5)


def test_no_block_gives_nothing() -> None:
    given = packed(4, 2)
    for function in (ONE, TWO):
        mask = torch.zeros_like(draw(function, 2))
        out, lse = function(*given, CU, CU, MAX, SCALE, mask, BLOCK, return_lse=True)
        assert not out.any() and (lse == -torch.inf).all()
        assert not any(x.any() for x in torch.autograd.grad(out.sum(), given))


def test_repeated_heads() -> None:
    x = torch.randn(2, 3, 5, 7)
    assert torch.equal(repeat_kv(x, 4), torch.repeat_interleave(x, 4, 1))
    assert torch.equal(repeat_kv_varlen(x[0], 2), torch.repeat_interleave(x[0], 2, 1))
    assert repeat_kv(x, 1) is x


Q, K, V = (x.detach() for x in packed(4, 2))
MASK, ROWS = draw(TWO, 4), draw(ONE, 2)
HALF = cumulative([*LENGTHS[:-1], LENGTHS[-1] - 1])


def two(**changed: Any) -> Any:
    given: dict[str, Any] = {
        "q": Q, "k": K, "v": V, "cu_seqlens_k": CU, "cu_seqlens_q": CU, "max_seqlen": MAX, "sm_scale": SCALE,
        "block_mask": MASK, "block_size": BLOCK,
    }  # fmt: skip
    return TWO(**(given | changed))


WRONG: dict[str, tuple[Any, str]] = {
    "mask is for queries": (lambda: two(block_mask=ROWS), "block_mask"),
    "mask is for blocks": (lambda: ONE(Q, K, V, CU, CU, MAX, SCALE, MASK, BLOCK), "block_mask"),
    "mask of another length": (lambda: two(block_mask=MASK[..., 1:]), "block_mask"),
    "mask of other sequences": (lambda: two(block_mask=MASK[1:]), "block_mask"),
    "mask of numbers": (lambda: two(block_mask=MASK.float()), "block_mask.*bool"),
    "no mask": (lambda: two(block_mask=None), "block_mask"),
    "heads of mask": (lambda: two(block_mask=MASK[:, :3]), "heads of block_mask"),
    "heads of q": (lambda: two(q=Q[:, :3]), "multiple of the heads of k"),
    "lengths disagree": (lambda: two(cu_seqlens_k=cumulative(LENGTHS[::-1])), "cu_seqlens_k"),
    "another number of sequences": (lambda: two(cu_seqlens_k=CU[[0, -1]]), "cu_seqlens_k|max_seqlen"),
    "descending": (lambda: two(cu_seqlens_q=CU.flip(0)), "cu_seqlens_q"),
    "not to the end": (lambda: two(cu_seqlens_q=HALF), "end of cu_seqlens_q"),
    "beyond the end": (lambda: two(cu_seqlens_k=CU + (CU == CU[-1])), "end of cu_seqlens_k"),
    "lengths as floats": (lambda: two(cu_seqlens_q=CU.float()), "cu_seqlens_q"),
    "too long": (lambda: two(max_seqlen=LONGEST - 1), "max_seqlen"),
    "block size": (lambda: two(block_size=48), "power of two"),
    "small blocks": (lambda: two(block_size=8), "block_size"),
    "rows of k": (lambda: two(k=K[1:]), "k=.*not a tensor"),
    "v": (lambda: two(v=V[:, :1]), "v=.*not a tensor"),
    "scale": (lambda: two(sm_scale=None), "sm_scale"),
    "batched q": (lambda: two(q=Q[None]), "q=.*not a tensor"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_mistakes_are_typed(name: str) -> None:
    call, text = WRONG[name]
    with pytest.raises(errors.AttnEngineError, match=text):
        call()

"""flex_attention: what its calls share, what they refuse, and what it does that FlexAttention's tests do not ask."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import attn_engine
from attn_engine import AuxRequest, BlockMask, create_block_mask, errors, flex_attention, noop_mask
from attn_engine.conformance.gold import dense_attention
from attn_engine.masks import mistakes as mask_mistakes
from tests.flex.inputs import D, S, causal, close, qkv

# -- strides, repeated calls


@pytest.mark.parametrize("order", [(0, 2, 1, 3), (2, 1, 0, 3), (0, 1, 3, 2)])
def test_results_lie_as_their_inputs_at_every_call(order: tuple[int, ...]):
    back = [order.index(i) for i in range(4)]
    plain = qkv(batches=2)
    q, k, v = (x.permute(order).contiguous().permute(back).requires_grad_() for x in plain)
    want = dense_attention(*plain, None, None, None)[0]
    first = None
    for _ in range(4):  # later calls take the way of a plan
        out = flex_attention(q, k, v)
        gradients = torch.autograd.grad(out.square().sum(), (q, k, v))
        assert out.stride() == q.stride()
        assert [g.stride() for g in gradients] == [x.stride() for x in (q, k, v)]
        close(out, want)
        first = gradients if first is None else first
        assert all(map(torch.equal, gradients, first))


# -- mistakes, with the user's line


def make_mask(length: int = S, **options: Any) -> BlockMask:
    return create_block_mask(causal, None, None, length, length, "cpu", **options)


def biased(x: Tensor) -> Any:
    return lambda s, b, h, i, j: s + x[j]


Q, K, V = torch.randn(3, 2, 4, S, D).unbind(0)
WRONG: dict[str, tuple[Any, type[Exception], str]] = {
    "three dimensions": (lambda: flex_attention(Q[0], K[0], V[0]), errors.WrongRank, "4"),
    "not a tensor": (lambda: flex_attention(Q, K.numpy(), V), errors.NotATensor, "key"),
    "device": (lambda: flex_attention(Q, K, V.to("meta")), errors.DeviceMismatch, "value"),
    "mixed dtypes": (lambda: flex_attention(Q, K.double(), V), errors.DtypeMismatch, "float64"),
    "integers": (lambda: flex_attention(Q.int(), K.int(), V.int()), errors.UnsupportedDtype, "int32"),
    "dimension": (lambda: flex_attention(Q, K[..., :8], V), errors.HeadDimMismatch, "key"),
    "groups": (lambda: flex_attention(Q, K[:, :2], V[:, :2]), ValueError, "enable_gqa"),
    "ratio": (
        lambda: flex_attention(Q, K[:, :3], V[:, :3], enable_gqa=True),
        errors.HeadsNotDivisible,
        "multiple",
    ),
    "batch": (lambda: flex_attention(Q, K[:1], V[:1]), errors.ShapeMismatch, "block_mask"),
    "length of the mask": (
        lambda: flex_attention(Q, K, V, block_mask=make_mask(S + 1)),
        mask_mistakes.BlockMaskMismatch,
        str(S + 1),
    ),
    "batch of the mask": (
        lambda: flex_attention(Q, K, V, block_mask=create_block_mask(causal, 3, None, S, S, "cpu")),
        mask_mistakes.BlockMaskMismatch,
        "B 3",
    ),
    "no mask": (
        lambda: flex_attention(Q, K, V, block_mask=causal),
        mask_mistakes.NotABlockMask,
        "mask_mod",
    ),
    "mask reads the score": (
        lambda: create_block_mask(lambda score, b, h, i, j: score > 0, None, None, S, S, "cpu"),
        errors.WrongParameters,
        "score",
    ),
    "captured device": (
        lambda: flex_attention(Q, K, V, biased(torch.randn(S, device="meta"))),
        errors.CapturedOnOtherDevice,
        "x",
    ),
    "captured size": (
        lambda: flex_attention(Q, K, V, biased(torch.randn(S - 1))),
        errors.IndexOutOfRange,
        "19",
    ),
    "option": (lambda: flex_attention(Q, K, V, kernel_options={"BLOCK": 3}), errors.UnknownOption, "BLOCK_M"),
    "backend": (
        lambda: flex_attention(Q, K, V, kernel_options={"BACKEND": "FLASH"}),
        errors.UnsupportedOnBackend,
        "FLASH",
    ),
    "unknown backend": (
        lambda: flex_attention(Q, K, V, kernel_options={"BACKEND": "mine"}),
        errors.UnknownOption,
        "TRITON",
    ),
    "both": (
        lambda: flex_attention(Q, K, V, return_lse=True, return_aux=AuxRequest(lse=True)),
        ValueError,
        "return_aux",
    ),
    "scale": (lambda: flex_attention(Q, K, V, scale=torch.tensor(2.0)), errors.WrongArgument, "scale"),
}


@pytest.mark.parametrize("name", WRONG)
def test_mistakes_are_typed_and_name_the_line(name: str):
    call, error, text = WRONG[name]
    flex_attention(Q, K, V)  # a right call before is no help
    with pytest.raises(error) as found:
        call()
    assert isinstance(found.value, attn_engine.AttnEngineError)
    assert text in str(found.value) and "test_flex_attention.py" in str(found.value)


def test_a_captured_tensor_of_another_size_is_refused_or_right():
    q, k, v = qkv()

    def mod_of(bias: Tensor) -> Any:
        return lambda s, b, h, i, j: s + bias[j]

    for size in (S, S + 5, S):
        bias = torch.randn(size)
        close(flex_attention(q, k, v, mod_of(bias)), dense_attention(q, k, v, mod_of(bias), None, None)[0])
    with pytest.raises(errors.IndexOutOfRange):
        flex_attention(q, k, v, mod_of(torch.randn(S - 1)))


def test_a_sliced_mask_of_torch_has_no_mask():
    from torch.nn.attention.flex_attention import create_block_mask as torch_mask

    part = torch_mask(causal, None, None, S, S, device="cpu", BLOCK_SIZE=16)[:, :, :1]
    q, k, v = qkv()
    with pytest.raises(mask_mistakes.WrongBlockMask, match="slic"):
        flex_attention(q, k, v, block_mask=part)


# -- masks


def test_lists_of_torch_that_say_no_more_than_the_mask_need_no_table():
    from torch.nn.attention.flex_attention import BlockMask as TorchMask
    from torch.nn.attention.flex_attention import create_block_mask as torch_mask

    from attn_engine.flex.block_masks import mask_of

    q, k, v = qkv(length=64)
    mask = torch_mask(causal, None, None, 64, 64, device="cpu", BLOCK_SIZE=16)
    assert mask_of(mask, q, k, True) == (causal, None)
    want = dense_attention(q, k, v, None, causal, None)[0]
    close(flex_attention(q, k, v, block_mask=mask), want)
    counts, indices = mask.kv_num_blocks.clone(), mask.kv_indices.clone()
    counts[0, 0, 2] = 0  # now a block is missing
    fewer = TorchMask.from_kv_blocks(
        counts, indices, mask.full_kv_num_blocks, mask.full_kv_indices, BLOCK_SIZE=16, mask_mod=causal
    )
    mask_mod, lists = mask_of(fewer, q, k, True)
    assert mask_mod is causal and lists is not None
    assert mask_of(fewer, q, k, False)[0] is not causal
    visible = torch.ones(64, 64).tril().bool()
    visible[32:48, 32:48] = False
    scores = (q @ k.mT / D**0.5).masked_fill(~visible, -torch.inf)
    close(flex_attention(q, k, v, block_mask=fewer), torch.softmax(scores, -1).nan_to_num(0) @ v)
    mask.kv_num_blocks[0, 0, 2] = 0  # changed in place
    close(flex_attention(q, k, v, block_mask=mask), torch.softmax(scores, -1).nan_to_num(0) @ v)


def test_noop_masks_of_both_packages():
    from torch.nn.attention.flex_attention import noop_mask as torch_noop

    q, k, v = qkv()
    want = flex_attention(q, k, v)
    for mask_mod in (noop_mask, torch_noop):
        close(flex_attention(q, k, v, block_mask=create_block_mask(mask_mod, None, None, S, S, "cpu")), want)


# -- torch.compile


def test_functions_made_in_a_compiled_region():
    class Attend(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = torch.nn.Parameter(torch.randn(2))
            self.mask = make_mask(BLOCK_SIZE=16)

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            slopes = torch.sigmoid(self.bias)
            out, aux = flex_attention(
                q,
                k,
                v,
                lambda s, b, h, i, j: s - slopes[h] * (i - j),
                self.mask,
                return_aux=AuxRequest(lse=True),
            )
            return out * aux.lse[..., None]

    torch._dynamo.reset()
    module = Attend()
    inputs = [x.requires_grad_() for x in qkv()]
    run = torch.compile(module, backend="aot_eager", fullgraph=True)
    got, want = run(*inputs), module(*inputs)
    close(got, want)
    leaves = (*inputs, module.bias)
    for x, y in zip(
        torch.autograd.grad(got.sum(), leaves), torch.autograd.grad(want.sum(), leaves), strict=True
    ):
        close(x, y)


def test_masks_given_as_blocks_in_a_compiled_region():
    counts, indices = torch.tensor([[[1, 2]]]), torch.tensor([[[[1, 0], [0, 1]]]])
    mask = BlockMask.from_kv_blocks(counts, indices, BLOCK_SIZE=16, mask_mod=causal, seq_lengths=(S, S))
    torch._dynamo.reset()
    q, k, v = qkv()
    run = torch.compile(
        lambda q, k, v: flex_attention(q, k, v, block_mask=mask), backend="aot_eager", fullgraph=True
    )
    close(run(q, k, v), flex_attention(q, k, v, block_mask=mask))


# -- transforms


def test_gradients_of_gradients():
    q, k, v = (x[..., :3].double().requires_grad_() for x in qkv(length=7))
    slope = torch.randn(2, dtype=torch.float64, requires_grad=True)
    mask = create_block_mask(lambda b, h, i, j: (i >= j) & (i != 3), None, None, 7, 7, "cpu")

    def attend(q: Tensor, k: Tensor, v: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
        request = AuxRequest(lse=True)
        mod = lambda s, b, h, i, j: s * s * slope[h]
        out, aux = flex_attention(q, k, v, mod, mask, return_aux=request)
        return out, torch.where(aux.lse.isinf(), 0.0, aux.lse)

    assert torch.autograd.gradcheck(attend, (q, k, v, slope))
    assert torch.autograd.gradgradcheck(attend, (q, k, v, slope))
    # q reaches the attention on three ways: none of them may be counted twice
    assert torch.autograd.gradgradcheck(lambda q: attend(q, q.sin(), q * 2, slope)[0], (q,))


def test_vmap_with_functions_of_the_batch_and_gradients():
    q, k, v = (torch.randn(3, 2, 2, S, D, requires_grad=True) for _ in range(3))
    offset = torch.randn(2, 2, requires_grad=True)
    lengths = torch.tensor([7, S])
    mask = create_block_mask(lambda b, h, i, j: j < lengths[b], 2, None, S, S, "cpu", BLOCK_SIZE=16)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Any:
        mod = lambda s, b, h, i, j: s + offset[b, h] * (i - j)
        return flex_attention(q, k, v, mod, mask, return_aux=AuxRequest(lse=True, max_scores=True))

    got, aux = torch.func.vmap(attend)(q, k, v)
    each = [attend(*x) for x in zip(q, k, v, strict=True)]
    close(got, torch.stack([x[0] for x in each]))
    assert aux.lse is not None
    close(aux.lse, torch.stack([x[1].lse for x in each]))
    leaves = (q, k, v, offset)
    want = torch.autograd.grad(torch.stack([x[0] for x in each]).square().sum(), leaves)
    for x, y in zip(torch.autograd.grad(got.square().sum(), leaves), want, strict=True):
        close(x, y, rtol=1e-4, atol=1e-4)
    nested = torch.func.vmap(torch.func.vmap(lambda q: attend(q, k[0], v[0])[0]))(torch.stack([q, q]))
    close(nested[1], torch.func.vmap(lambda q: attend(q, k[0], v[0])[0])(q))
    with pytest.raises(errors.TransformNotSupported):
        torch.func.vmap(lambda x: flex_attention(q[0], k[0], v[0], lambda s, b, h, i, j: s + x[h]))(
            torch.randn(3, 2)
        )

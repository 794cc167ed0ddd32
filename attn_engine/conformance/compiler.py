"""Section 4e: options, compilation, checkpoints, wrong arguments."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from attn_engine.conformance.entries import NotApplicable
from attn_engine.conformance.gold import dense_attention
from attn_engine.conformance.properties import causal, prop, qkv, raises
from attn_engine.conformance.subjects import Subject, close


@prop("options of the kernels are accepted", "4e compiler")
def kernel_options(subject: Subject) -> None:
    q, k, v = qkv(1, 2, 128, 16)
    want = dense_attention(q, k, v, None, None, None)[0]
    for options in (
        {"BLOCK_M": 64, "BLOCK_N": 64},
        {"fwd_num_warps": 4, "bwd_BLOCK_M1": 32},
        {"BACKEND": "AUTO"},
    ):
        close(subject.attend(q, k, v, kernel_options=options), want)


@prop("an unknown BACKEND is refused", "4e compiler")
def unknown_backend(subject: Subject) -> None:
    q, k, v = qkv(1, 2, 128, 16)
    raises(lambda: subject.attend(q, k, v, kernel_options={"BACKEND": "NONE_SUCH"}))


@prop("an unknown option is refused", "extra")
def unknown_option(subject: Subject) -> None:
    q, k, v = qkv(1, 2, 128, 16)
    raises(lambda: subject.attend(q, k, v, kernel_options={"BLOCK_SIZE_OF_MINE": 3}))


@prop("two calls and two masks in one graph", "4e compiler")
def several_calls(subject: Subject) -> None:
    q, k, v = qkv(1, 2, 40, 16)
    masks = [subject.mask(m, None, None, 40, 40) for m in (causal, lambda b, h, i, j: (i - j).abs() < 9)]

    def twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        first = subject.in_graph(q, k, v, block_mask=masks[0])
        return subject.in_graph(first, k, v, block_mask=masks[1])

    torch._dynamo.reset()
    want = dense_attention(q, k, v, None, causal, None)[0]
    want = dense_attention(want, k, v, None, lambda b, h, i, j: (i - j).abs() < 9, None)[0]
    close(torch.compile(twice, backend=subject.graph_backend, fullgraph=True)(q, k, v), want)


@prop("what surrounds the call in a graph", "4e compiler")
def surrounded(subject: Subject) -> None:
    q, k, v = qkv(1, 2, 40, 16)
    weight = torch.randn(16, 16, generator=torch.Generator().manual_seed(3))

    def block(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.relu(subject.in_graph(q @ weight, k, v * 2)) + 1

    torch._dynamo.reset()
    want = torch.relu(dense_attention(q @ weight, k, v * 2, None, None, None)[0]) + 1
    close(torch.compile(block, backend=subject.graph_backend, fullgraph=True)(q, k, v), want)


@prop("a length of the graph captured by score_mod and mask_mod", "4e compiler")
def captured_symbols(subject: Subject) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        half = q.shape[2] // 2
        return subject.in_graph(q, k, v, score_mod=lambda s, b, h, i, j: torch.where(j < half, s * 2, s))

    torch._dynamo.reset()
    compiled = torch.compile(attend, backend=subject.graph_backend, fullgraph=True, dynamic=True)
    for length in (40, 33, 64):
        q, k, v = qkv(1, 2, length, 16)
        half = length // 2
        want = dense_attention(q, k, v, lambda s, b, h, i, j: torch.where(j < half, s * 2, s), None, None)[0]
        close(compiled(q, k, v), want)


@prop("tensor subclasses", "4e compiler")
def subclasses(subject: Subject) -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    pairs = [TwoTensor(x, x + 1) for x in qkv(1, 2, 40, 16)]
    got = subject.attend(*pairs)
    first, second = ([getattr(x, name) for x in pairs] for name in ("a", "b"))
    for part, (q, k, v) in ((got.a, first), (got.b, second)):
        close(part, dense_attention(q, k, v, None, None, None)[0])


@prop("few compilations over many lengths", "4e compiler")
def dynamic_lengths(subject: Subject) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend(subject.graph_backend)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return subject.in_graph(q, k, v, score_mod=lambda score, b, h, i, j: score + (i - j))

    torch._dynamo.reset()
    compiled = torch.compile(attend, backend=counter, fullgraph=True)
    for length in range(30, 50, 2):
        q, k, v = qkv(1, 2, length, 16)
        want = dense_attention(q, k, v, lambda score, b, h, i, j: score + (i - j), None, None)[0]
        close(compiled(q, k, v), want)
    if counter.frame_count > 2:
        raise AssertionError(f"{counter.frame_count} compilations")


@prop("selective checkpointing: a policy for each operator", "4e compiler", backward=True)
def selective(subject: Subject) -> None:
    from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

    def policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> Any:
        kept = operator is torch.ops.aten.mm.default or "forward" in str(operator)
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    def block(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.sin(subject.attend(q.sin(), k, v, score_mod=lambda score, b, h, i, j: score * 2))

    inputs = qkv(1, 2, 40, 16, grad=True)
    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    out = checkpoint(block, *inputs, use_reentrant=False, context_fn=contexts)
    for x, y in zip(
        torch.autograd.grad(out.sum(), inputs), torch.autograd.grad(block(*inputs).sum(), inputs), strict=True
    ):
        close(x, y)


@prop("checkpointing", "4e compiler", backward=True)
def checkpointing(subject: Subject) -> None:
    from torch.utils.checkpoint import checkpoint

    inputs = qkv(1, 2, 40, 16, grad=True)
    attend = functools.partial(subject.attend, score_mod=lambda score, b, h, i, j: score * 2)
    got = torch.autograd.grad(checkpoint(attend, *inputs, use_reentrant=False).sum(), inputs)
    want = torch.autograd.grad(attend(*inputs).sum(), inputs)
    for x, y in zip(got, want, strict=True):
        close(x, y)


@prop("autocast", "4e compiler")
def autocast(subject: Subject) -> None:
    q, k, v = qkv(1, 2, 40, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = subject.attend(q, k, v)
    if out.dtype is not torch.bfloat16:
        raise AssertionError(f"the output is {out.dtype}")
    close(out.float(), dense_attention(q, k, v, None, None, None)[0], 2e-2, 2e-2)


@prop("a tensor on another device is refused", "4e compiler")
def other_device(subject: Subject) -> None:
    q, k, v = qkv(1, 2, 40, 16)
    raises(lambda: subject.attend(q, k.to("meta"), v), ValueError, RuntimeError)


@prop("mixed dtypes are refused", "4e compiler")
def mixed_dtypes(subject: Subject) -> None:
    q, k, v = qkv(1, 2, 40, 16)
    raises(lambda: subject.attend(q, k.double(), v))


@prop("an integer query is refused", "4e compiler")
def integer_query(subject: Subject) -> None:
    q, k, v = (x.int() for x in qkv(1, 2, 40, 16))
    raises(lambda: subject.attend(q, k, v))


@prop("tensors that are not 4-D are refused", "4e compiler")
def three_dimensions(subject: Subject) -> None:
    q, k, v = qkv(2, 40, 16)
    raises(lambda: subject.attend(q, k, v), ValueError, NotImplementedError)


@prop("fewer key heads without enable_gqa are refused", "4e compiler")
def groups_not_enabled(subject: Subject) -> None:
    q, k, v = qkv(1, 4, 40, 16)
    raises(lambda: subject.attend(q, k[:, :2], v[:, :2]), ValueError)


@prop("head dimensions of query and key must agree", "4e compiler")
def head_dimensions(subject: Subject) -> None:
    q, k, v = qkv(1, 4, 40, 16)
    raises(lambda: subject.attend(q, k[..., :8], v), ValueError)


@prop("a captured tensor on another device is refused", "4e compiler")
def captured_device(subject: Subject) -> None:
    q, k, v = qkv(1, 2, 40, 16)
    bias = torch.randn(40, device="meta")
    raises(lambda: subject.attend(q, k, v, score_mod=lambda score, b, h, i, j: score + bias[j]))


@prop("CUDA: TMA, CUDA graphs, a second GPU, max-autotune", "4e compiler")
def cuda_only(subject: Subject) -> None:
    if not torch.cuda.is_available():
        raise NotApplicable("needs a GPU")

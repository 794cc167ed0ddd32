"""Section 4f: the BlockMask object, and attention with masks that are more than their mask_mod."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from attn_engine.conformance.entries import NotApplicable
from attn_engine.conformance.properties import causal, prop, qkv, raises, right_or_refused
from attn_engine.conformance.subjects import Subject, close

SECTION = "4f BlockMask"


def _dense(query: Tensor, key: Tensor, value: Tensor, visible: Tensor) -> Tensor:
    scores = (query @ key.mT / math.sqrt(query.shape[3])).masked_fill(~visible, -math.inf)
    return torch.softmax(scores, -1).nan_to_num(0.0) @ value


@prop("shape, numel, sparsity", SECTION)
def sizes(subject: Subject) -> None:
    mask = subject.mask(causal, 4, 2, 256, 512, BLOCK_SIZE=64)
    if tuple(mask.shape) != (4, 2, 256, 512) or mask.numel() != 4 * 2 * 256 * 512:
        raise AssertionError(f"shape {mask.shape}, numel {mask.numel()}")
    if abs(float(mask.sparsity()) - 100 * (1 - 10 / 32)) > 1e-6:
        raise AssertionError(f"sparsity {mask.sparsity()}")


@prop("lists of blocks", SECTION)
def lists(subject: Subject) -> None:
    mask = subject.mask(causal, None, None, 256, 256, BLOCK_SIZE=64)
    close(mask.kv_num_blocks.flatten(), torch.tensor([1, 1, 1, 1]))
    close(mask.full_kv_num_blocks.flatten(), torch.tensor([0, 1, 2, 3]))
    close(mask.full_kv_indices[0, 0, 3, :3].sort().values, torch.tensor([0, 1, 2]))
    close(mask.q_num_blocks.flatten(), torch.tensor([1, 1, 1, 1]))
    close(mask.to_dense().flatten(0, 2), torch.ones(4, 4).tril())


@prop("indexing: numbers, negative ones, slices, tensors", SECTION)
def indexing(subject: Subject) -> None:
    mask = subject.mask(lambda b, h, i, j: i + b * 64 + h * 64 >= j, 4, 2, 256, 256, BLOCK_SIZE=64)
    for index, shape in (
        (0, (1, 2, 4)),
        (-1, (1, 2, 4)),
        (slice(1, 3), (2, 2, 4)),
        ((slice(0, 2), slice(1, 2)), (2, 1, 4)),
        ((slice(0, 2), slice(1, 2), torch.tensor([1], dtype=torch.int32)), (2, 1, 1)),
    ):
        part = mask[index]
        if tuple(part.kv_num_blocks.shape) != shape:
            raise AssertionError(f"[{index}] gives {tuple(part.kv_num_blocks.shape)}")
    close(mask[-1].kv_num_blocks, mask.kv_num_blocks[-1:])


@prop("to another device and back", SECTION)
def moved(subject: Subject) -> None:
    mask = subject.mask(causal, None, None, 128, 128, BLOCK_SIZE=64).to("cpu")
    close(mask.kv_num_blocks.flatten(), torch.tensor([1, 1]))


@prop("a drawing in text", SECTION)
def drawing(subject: Subject) -> None:
    mask = subject.mask(causal, None, None, 256, 256, BLOCK_SIZE=64)
    text = str(mask)
    if "BlockMask" not in text or "█" not in text:
        raise AssertionError(text)
    mask.to_string(grid_size=(2, 2))


@prop("pytree round trip", SECTION)
def round_trip(subject: Subject) -> None:
    mask = subject.mask(causal, None, None, 128, 128, BLOCK_SIZE=64)
    register = getattr(type(mask), "_register_pytree_node", None)
    if type(mask) not in pytree.SUPPORTED_NODES:
        if register is None and type(mask).__module__.startswith("torch"):
            raise NotApplicable("torch registers its BlockMask in its tests only")
        raise AssertionError("BlockMask is not registered with pytree")
    leaves, spec = pytree.tree_flatten(mask)
    close(pytree.tree_unflatten(leaves, spec).kv_num_blocks, mask.kv_num_blocks)


@prop("block sizes must be whole numbers", SECTION)
def block_sizes(subject: Subject) -> None:
    raises(lambda: subject.mask(causal, None, None, 128, 128, BLOCK_SIZE=0))


@prop("an empty mask has no blocks", SECTION)
def empty(subject: Subject) -> None:
    mask = subject.mask(lambda b, h, i, j: i < 0, None, None, 128, 128, BLOCK_SIZE=64)
    close(mask.kv_num_blocks, torch.zeros(1, 1, 2))


def _chosen(subject: Subject, **options: Any) -> tuple[Any, Tensor]:
    """Blocks chosen by hand, partial and full ones, and which pairs they show."""
    counts = torch.tensor([[[1, 2, 0, 1]]], dtype=torch.int32)
    indices = torch.tensor([[[[1, 0, 2, 3], [0, 3, 1, 2], [0, 1, 2, 3], [3, 0, 1, 2]]]], dtype=torch.int32)
    full_counts = torch.tensor([[[1, 0, 0, 2]]], dtype=torch.int32)
    full = torch.tensor([[[[3, 0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3], [1, 0, 2, 3]]]], dtype=torch.int32)
    mask = subject.block_mask.from_kv_blocks(
        counts, indices, full_counts, full, BLOCK_SIZE=32, mask_mod=causal, **options
    )
    partial = torch.zeros(4, 4, dtype=torch.bool)
    partial[[0, 1, 1, 3], [1, 0, 3, 3]] = True
    whole = torch.zeros(4, 4, dtype=torch.bool)
    whole[[0, 3, 3], [3, 1, 0]] = True
    i, j = torch.arange(128)[:, None], torch.arange(128)[None, :]
    return mask, (partial[i // 32, j // 32] & (i >= j)) | whole[i // 32, j // 32]


@prop("from_kv_blocks: the lists decide", SECTION)
def from_lists(subject: Subject) -> None:
    mask, visible = _chosen(subject)
    q, k, v = qkv(1, 2, 128, 16)
    close(subject.attend(q, k, v, block_mask=mask), _dense(q, k, v, visible))


@prop("from_kv_blocks: gradients", SECTION, backward=True)
def from_lists_gradients(subject: Subject) -> None:
    mask, visible = _chosen(subject)
    inputs = qkv(1, 2, 128, 16, grad=True)
    got = torch.autograd.grad(subject.attend(*inputs, block_mask=mask).square().sum(), inputs)
    want = torch.autograd.grad(_dense(*inputs, visible).square().sum(), inputs)
    for x, y in zip(got, want, strict=True):
        close(x, y, 1e-4, 1e-5)


@prop("from_kv_blocks without the side of the keys", SECTION)
def without_q_side(subject: Subject) -> None:
    mask, visible = _chosen(subject, compute_q_blocks=False)
    if mask.q_num_blocks is not None:
        raise AssertionError("compute_q_blocks=False made them")
    q, k, v = qkv(1, 2, 128, 16)
    close(subject.attend(q, k, v, block_mask=mask), _dense(q, k, v, visible))


@prop("from_kv_blocks without the side of the keys: gradients right or refused", SECTION, backward=True)
def without_q_side_gradients(subject: Subject) -> None:
    mask, visible = _chosen(subject, compute_q_blocks=False)
    inputs = qkv(1, 2, 128, 16, grad=True)

    def gradients() -> Tensor:
        out = subject.attend(*inputs, block_mask=mask)
        return torch.stack(torch.autograd.grad(out.square().sum(), inputs))

    want = torch.autograd.grad(_dense(*inputs, visible).square().sum(), inputs)
    right_or_refused(gradients, torch.stack(want), 1e-4)


@prop("a mask cut to shorter lengths", SECTION)
def adjusted(subject: Subject) -> None:
    mask = subject.mask(causal, None, None, 128, 128, BLOCK_SIZE=32)._adjust(70, 90)
    q, k, v = qkv(1, 2, 128, 16)
    q, k, v = q[:, :, :70], k[:, :, :90], v[:, :, :90]
    visible = torch.ones(70, 90, dtype=torch.bool).tril()
    close(subject.attend(q, k, v, block_mask=mask), _dense(q, k, v, visible))


@prop("a slice with a mask_mod of its own", SECTION)
def sliced(subject: Subject) -> None:
    whole = subject.mask(causal, None, None, 128, 128, BLOCK_SIZE=32)
    part = whole[:, :, 2:3]
    part.seq_lengths = (32, 128)
    part.mask_mod = lambda b, h, i, j: i + 64 >= j
    q, k, v = qkv(1, 2, 128, 16)
    visible = torch.ones(128, 128, dtype=torch.bool).tril()
    close(subject.attend(q[:, :, 64:96], k, v, block_mask=part), _dense(q, k, v, visible)[:, :, 64:96])


@prop("a mask of another length is refused", SECTION)
def other_length(subject: Subject) -> None:
    q, k, v = qkv(1, 2, 128, 16)
    for length in (64, 256):
        mask = subject.mask(causal, None, None, length, length, BLOCK_SIZE=32)
        raises(lambda m=mask: subject.attend(q, k, v, block_mask=m), ValueError)


@prop("a mask of other batches or heads is refused", SECTION)
def other_batch(subject: Subject) -> None:
    q, k, v = qkv(2, 2, 128, 16)
    for sizes in ((3, None), (None, 3)):
        mask = subject.mask(lambda b, h, i, j: i + b + h >= j, *sizes, 128, 128, BLOCK_SIZE=32)
        raises(lambda m=mask: subject.attend(q, k, v, block_mask=m))


@prop("a mask that reads the score is refused", SECTION)
def reads_score(subject: Subject) -> None:
    q, k, v = qkv(1, 2, 64, 16)

    def wrong(score: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
        return score > 0

    raises(lambda: subject.attend(q, k, v, block_mask=subject.mask(wrong, None, None, 64, 64)))


@prop("new masks of one kind compile nothing again", SECTION)
def no_recompilation(subject: Subject) -> None:
    q, k, v = qkv(1, 2, 64, 16)
    subject.repeated(q, k, v, block_mask=subject.mask(causal, None, None, 64, 64, BLOCK_SIZE=32))
    counts: list[int] = []
    for first in range(3):
        doc = torch.arange(64) // (9 + first)
        mask = subject.mask(lambda b, h, i, j: doc[i] == doc[j], None, None, 64, 64, BLOCK_SIZE=32)
        got = subject.repeated(q, k, v, block_mask=mask)
        close(got, _dense(q, k, v, doc[:, None] == doc[None, :]))
        counts.append(subject.compilations())
    if counts[-1] > counts[0]:
        raise AssertionError(f"{counts[-1] - counts[0]} more compilations")

"""Sparse attentions to be measured: each with its mask as a formula, and the dense attentions it is compared with.

A part is a function of (kind, length) that makes a `Problem`; further parts are added to PARTS and KINDS.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from attn_engine import AttentionEngine, meta_tensor
from attn_engine.library import (
    LocalStrideSparseAttention,
    SparseAttention,
    block_1d_gqa_sparse_attn_varlen_func,
    block_2d_sparse_attn_varlen_func,
    causal,
    hash_sparse_attention,
    qk_sparse_attention,
)
from benchmarks.measure import Contender, Run

HEADS, DIM, BLOCK, SEER_KV_HEADS = 8, 64, 64, 1
LENGTHS, QUICK_LENGTH = (2048, 8192), 2048
SHORT_LENGTHS = (1024, 1536)  # of what sorts and gathers: from where on does it pay?
FLEX_BLOCK = 128
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
MaskMod = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Case:
    """part: a name in PARTS. kind: what varies in it."""

    part: str
    kind: str
    length: int
    direction: str

    def __str__(self) -> str:
        return f"{self.part} {self.kind}, {self.length}, {self.direction}"


@dataclass(frozen=True, slots=True)
class Problem:
    """ours: a function of q, k, v as `layout` says, with `kv_heads`. visible: (b, h, q, kv) -> bool, causality
    included, for any indices that broadcast."""

    ours: Attention
    visible: MaskMod
    layout: str
    kv_heads: int = HEADS


def qk(kind: str, length: int) -> Problem:
    """kind: the share of queries and of keys that is dropped, in percent."""
    q_keep, k_keep = ((torch.rand(1, length, HEADS) >= float(kind) / 100).float() for _ in range(2))
    kept_q, kept_k = q_keep[0].T.bool(), k_keep[0].T.bool()

    def visible(b: Any, h: Any, q: Any, kv: Any) -> Any:
        return kept_q[h, q] & kept_k[h, kv] & (kv <= q)

    return Problem(lambda q, k, v: qk_sparse_attention(q, k, v, q_keep, k_keep), visible, "bshd")


def hashed(kind: str, length: int) -> Problem:
    """kind: the number of buckets; queries and keys have buckets of their own, drawn uniformly."""
    q_hash, k_hash = (torch.randint(0, int(kind), (1, length, HEADS), dtype=torch.int32) for _ in range(2))
    of_q, of_k = q_hash[0].T.contiguous(), k_hash[0].T.contiguous()

    def visible(b: Any, h: Any, q: Any, kv: Any) -> Any:
        return (of_q[h, q] == of_k[h, kv]) & (kv <= q)

    return Problem(lambda q, k, v: hash_sparse_attention(q, k, v, q_hash, k_hash), visible, "bshd")


def stride(kind: str, length: int) -> Problem:
    """kind: every how many blocks of 64 a head sees one, beside the last 8; 1 is dense attention."""
    every, local = int(kind), 512 // BLOCK
    module = LocalStrideSparseAttention(HEADS, length, BLOCK, local, every, seq_dim=2)
    step = max(1, every // HEADS)

    def visible(b: Any, h: Any, q: Any, kv: Any) -> Any:
        near = q // BLOCK - kv // BLOCK < local
        return (near | ((kv // BLOCK + h * step) % every == 0)) & (kv <= q)

    return Problem(lambda q, k, v: module(q, k, v), visible, "bhsd")


def blocks(kind: str, length: int) -> Problem:
    """kind: the share of blocks of 64 x 64 that a head sees, in percent, drawn for each; the diagonal always."""
    count = length // BLOCK
    pattern = torch.rand(HEADS, count, count) < float(kind) / 100
    pattern |= torch.eye(count, dtype=torch.bool)
    module = SparseAttention(BLOCK, pattern.tril(), seq_dim=2)

    def visible(b: Any, h: Any, q: Any, kv: Any) -> Any:
        return pattern[h, q // BLOCK, kv // BLOCK] & (kv <= q)

    return Problem(lambda q, k, v: module(q, k, v), visible, "bhsd")


def seer_2d(kind: str, length: int) -> Problem:
    """kind: the share of blocks of 64 x 64 that a head of q sees, in percent, the diagonal not always."""
    count = length // BLOCK
    mask = torch.rand(1, HEADS, count, count) < float(kind) / 100

    def visible(b: Any, h: Any, q: Any, kv: Any) -> Any:
        return mask[0, h, q // BLOCK, kv // BLOCK] & (kv <= q)

    return Problem(_seer(block_2d_sparse_attn_varlen_func, mask, length), visible, "bshd")


def seer_1d(kind: str, length: int) -> Problem:
    """kind: how many queries in a row see the same blocks of 64 keys, a tenth of them; drawn for each kv head."""
    shared = int(kind)
    drawn = torch.rand(1, SEER_KV_HEADS, -(-length // shared), length // BLOCK) < 0.1
    mask = drawn.repeat_interleave(shared, 2)[:, :, :length]
    group = HEADS // SEER_KV_HEADS

    def visible(b: Any, h: Any, q: Any, kv: Any) -> Any:
        return mask[0, h // group, q, kv // BLOCK] & (kv <= q)

    return Problem(_seer(block_1d_gqa_sparse_attn_varlen_func, mask, length), visible, "bshd", SEER_KV_HEADS)


def _seer(function: Callable[..., Any], mask: Tensor, length: int) -> Attention:
    """One sequence, packed; lists are made anew in every call, as a gate would ask for."""
    lengths = torch.tensor([0, length], dtype=torch.int32)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        fresh = mask.clone()
        return function(q[0], k[0], v[0], lengths, lengths, length, DIM**-0.5, fresh, BLOCK)[None]

    return ours


PARTS: dict[str, Callable[[str, int], Problem]] = {
    "qk": qk, "hash": hashed, "local-stride": stride, "random blocks": blocks,
    "seer 2d": seer_2d, "seer 1d": seer_1d,
}  # fmt: skip
KINDS = {
    "qk": ("50", "60", "70", "80"),
    "hash": ("4", "16", "64"),
    "local-stride": ("1", "4", "16"),
    "random blocks": ("10",),
    "seer 2d": ("10",),
    "seer 1d": ("1", "16"),
}
DIRECTIONS = ("forward", "backward")
CASES = [
    Case(part, kind, length, direction)
    for part, kinds in KINDS.items()
    for kind in kinds
    for length in (*(SHORT_LENGTHS if part in ("qk", "hash") else ()), *LENGTHS)
    for direction in DIRECTIONS
]


def density(problem: Problem, length: int) -> float:
    """Visible pairs over those of a causal mask."""
    total, keys, rows = 0, torch.arange(length), 512
    for head in range(HEADS):
        for first in range(0, length, rows):
            queries = torch.arange(first, min(first + rows, length))[:, None]
            total += int(problem.visible(0, head, queries, keys).sum())
    return total / (HEADS * length * (length + 1) / 2)


@functools.cache
def dense_engine(layout: str) -> AttentionEngine:
    metas = (meta_tensor(None, None, None, DIM, dtype=torch.float32),) * 3
    return AttentionEngine(metas, mask_mod=causal(), layout=layout, backend="cpu")


def contenders(case: Case, peers: Peers) -> tuple[dict[str, Contender], float]:
    """All that compute the case, in the same numbers, and its density."""
    torch.manual_seed(0)
    problem = PARTS[case.part](case.kind, case.length)
    shapes = [(1, heads, case.length, DIM) for heads in (HEADS, problem.kv_heads, problem.kv_heads, HEADS)]
    tensors = [torch.randn(shape) for shape in shapes]
    own = tensors if problem.layout == "bhsd" else [x.transpose(1, 2).contiguous() for x in tensors]
    found = {
        "ours": Contender(call(problem.ours, own, case.direction)),
        "dense": Contender(call(dense_engine(problem.layout), own, case.direction)),
        "dense, heads first": Contender(call(dense_engine("bhsd"), tensors, case.direction)),
    }
    if problem.layout == "bhsd":
        del found["dense, heads first"]  # the same
    if peers.sdpa:
        masked = sdpa(problem, case.length)
        found["sdpa"] = Contender(call(masked, tensors, case.direction), most=peers.rounds)
    if peers.flex and case.direction == "forward":
        found["flex"] = Contender(call(flex(problem, case.length), tensors, "forward"), most=peers.rounds)
    return found, density(problem, case.length)


@dataclass(frozen=True, slots=True)
class Peers:
    """Which of torch's attentions take part, and in how many rounds at most: they take many seconds a call."""

    sdpa: bool
    flex: bool
    rounds: int | None


def sdpa(problem: Problem, length: int) -> Attention:
    """With a mask of every head, made a few rows at a time."""
    rows, heads = torch.arange(length), torch.arange(HEADS)[:, None, None]
    mask = torch.empty(1, HEADS, length, length, dtype=torch.bool)
    for some in rows.split(512):
        mask[0, :, some] = problem.visible(0, heads, some[:, None], rows)
    return functools.partial(
        F.scaled_dot_product_attention, attn_mask=mask, enable_gqa=problem.kv_heads != HEADS
    )


def flex(problem: Problem, length: int) -> Attention:
    """Its block mask is looked up in a mask of blocks, for the usual way takes length x length numbers per head."""
    torch.compiler.reset()
    mask = block_mask_of(problem, length)
    return functools.partial(
        torch.compile(flex_attention), block_mask=mask, enable_gqa=problem.kv_heads != HEADS
    )


def block_mask_of(problem: Problem, length: int) -> BlockMask:
    """What create_block_mask finds, head by head and row of blocks by row of blocks."""
    size, keys = FLEX_BLOCK, torch.arange(length)
    blocks = -(-length // size)
    some = torch.zeros(1, HEADS, blocks, blocks, dtype=torch.bool)
    every = torch.zeros_like(some)
    for head in range(HEADS):
        for i, queries in enumerate(torch.arange(length).split(size)):
            seen = problem.visible(0, head, queries[:, None], keys)
            parts = seen.expand(len(queries), length).split(size, dim=1)
            some[0, head, i] = torch.stack([x.any() for x in parts])
            every[0, head, i] = torch.stack([x.all() for x in parts])
    partial = (some & ~every).int()
    lists: list[Tensor] = []
    for kind in (partial, every.int()):
        lists += [kind.sum(-1, dtype=torch.int32), kind.argsort(dim=-1, descending=True, stable=True).int()]
    return BlockMask.from_kv_blocks(
        *lists, BLOCK_SIZE=size, mask_mod=problem.visible, seq_lengths=(length, length)
    )


def call(function: Attention, tensors: list[Tensor], direction: str) -> Run:
    """One call; backward is the gradient alone, on a graph that is kept."""
    *inputs, d_out = tensors

    def forward() -> object:
        with torch.no_grad():
            return function(*inputs)

    if direction == "forward":
        return forward
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves)
    return lambda: torch.autograd.grad(out, leaves, d_out, retain_graph=True)

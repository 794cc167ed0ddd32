"""What is measured on a GPU: attentions, sizes and directions, in the order of their importance."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Any

import torch
from torch import Tensor

from attn_engine.frontend import OnlineFunc
from attn_engine.library import OnlineRelu, OnlineRetention, OnlineSigmoid
from benchmarks import gpu_sparse
from benchmarks.gpu_sparse import Sparse, sparse
from benchmarks.patterns import causal, documents, soft_cap, visible_pairs

PATTERNS = (
    "causal", "full", "causal documents", "window 1024", "soft-cap", "alibi", "sigmoid", "relu", "retention",
)  # fmt: skip
DIRECTIONS = ("forward", "backward")
LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)
HEADS = ((64, 8), (16, 16))
WINDOW, CAP = 1024, 20.0
# Products of matrices per visible pair: two forward; the backward pass is counted as two and a half times that.
FLOPS_PER_PAIR = {"forward": 4.0, "backward": 10.0}
NORMALISERS: dict[str, type[OnlineFunc]] = {
    "sigmoid": OnlineSigmoid,
    "relu": OnlineRelu,
    "retention": OnlineRetention,
}


@dataclass(frozen=True, slots=True)
class GpuCase:
    """One attention in one size and direction. Lengths of queries and keys are the same."""

    pattern: str
    direction: str
    length: int
    dim: int = 128
    heads: int = 64
    kv_heads: int = 8
    batches: int = 1
    dtype: str = "bfloat16"
    part: str = "gpu"

    def __str__(self) -> str:
        sizes = f"S={self.length} D={self.dim} H={self.heads}:{self.kv_heads} B={self.batches}"
        return f"{self.pattern} {sizes} {self.direction}"

    @property
    def flops(self) -> float:
        """Arithmetic of the pairs that the mask lets through, in operations."""
        work = FLOPS_PER_PAIR[self.direction] * self.batches * self.heads * self.dim
        if self.pattern in gpu_sparse.PATTERNS:
            return work * gpu_sparse.pairs(self.pattern, self.length, self.heads, self.kv_heads)
        return work * pairs(self.pattern, self.length)


@cache
def pairs(pattern: str, length: int) -> int:
    """How many pairs of a query and a key are visible, per batch and head."""
    if pattern == "window 1024":
        return sum(min(q_idx + 1, WINDOW) for q_idx in range(length))
    known = pattern if pattern in ("full", "causal documents") else "causal"
    return visible_pairs(known, length, length)


def table() -> Iterator[GpuCase]:
    """Every case; first those that have goals, then their neighbours, and both directions of a shape in turn."""
    shapes = sorted(product(LENGTHS, HEADS, (128, 64)), key=_distance)
    for (length, (heads, kv_heads), dim), name in product(shapes, PATTERNS):
        batches = 1 if heads == 64 else max(1, min(4, 16384 // length))
        for direction in DIRECTIONS:
            yield GpuCase(name, direction, length, dim, heads, kv_heads, batches)
    for name, direction in product(gpu_sparse.PATTERNS, DIRECTIONS):
        yield GpuCase(name, direction, 8192)


def _distance(shape: tuple[int, tuple[int, int], int]) -> tuple[int, int]:
    """How far a shape is from the one that the goals are stated for."""
    length, heads, dim = shape
    other = (heads != HEADS[0]) + (dim != 128)
    return other + abs(length.bit_length() - (8192).bit_length()), length


def is_quick(case: GpuCase) -> bool:
    """Whether the case is in the small selection: the shape of the goals, and short rows of the commonest kind."""
    at_the_goals = (case.length, case.dim, case.heads) == (8192, 128, 64) and case.pattern in PATTERNS
    return at_the_goals or ((case.length, case.dim, case.heads, case.pattern) == (2048, 128, 64, "causal"))


@dataclass(frozen=True, slots=True)
class Attention:
    """A pattern's functions, on the device. mask_mod None: every pair is visible. sparse: how ours is called."""

    score_mod: Callable[..., Any] | None
    mask_mod: Callable[..., Any] | None
    normaliser: str
    slopes: Tensor
    document: Tensor
    sparse: Sparse | None = None


def attention(case: GpuCase, device: str) -> Attention:
    """The functions of a case, in a form that flex_attention takes as well."""
    document = documents(case.length).to(device)
    if case.pattern in gpu_sparse.PATTERNS:
        found = sparse(case.pattern, case.length, case.heads, case.kv_heads, device)
        return Attention(
            None, found.mask_mod, "softmax", torch.ones(case.heads, device=device), document, found
        )
    slopes = (2.0 ** -torch.linspace(1.0, 8.0, case.heads)).to(device)

    def past_of_document(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return (document[q_idx] == document[kv_idx]) & (kv_idx <= q_idx)

    def window(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return (kv_idx <= q_idx) & (q_idx - kv_idx < WINDOW)

    def alibi(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return score - slopes[h] * (q_idx - kv_idx)

    masks = {"full": None, "window 1024": window, "causal documents": past_of_document}
    scores = {"soft-cap": soft_cap, "alibi": alibi}
    normaliser = case.pattern if case.pattern in NORMALISERS else "softmax"
    return Attention(scores.get(case.pattern), masks.get(case.pattern, causal), normaliser, slopes, document)

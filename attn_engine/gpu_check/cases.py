"""What the checks compute: score functions, masks and normalisers, as a user writes them and as formulas.

A score or mask function is plain torch: with tensors of indices it is its own formula. A normaliser has one beside it.
Tensors lie as (batch, head, length, dimension).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from attn_engine.frontend import OnlineFunc, online
from attn_engine.gpu_check.sparse import draw_blocks, in_bucket, in_past, kept_rows, local_stride, sorted_rows
from attn_engine.library import OnlineRelu, OnlineRetention, OnlineSigmoid, OnlineSoftmax

Tensors = Mapping[str, Tensor]
Function = Callable[..., Any]
CAP = 20.0
# Where seven documents of uneven lengths end, as parts of the whole length.
DOCUMENT_ENDS = (0.05, 0.2, 0.3, 0.55, 0.6, 0.85)


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of one call."""

    batches: int
    heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    dim: int = 64
    dim_v: int = 64

    def small(self) -> Sizes:
        """Of the same kind, for an interpreter: grouped where this is grouped, ragged where this is ragged."""
        group = min(self.heads // self.kv_heads, 3)
        dim = 16 if self.dim & (self.dim - 1) == 0 else 24
        dim_v = dim if self.dim_v == self.dim else dim // 2 + 4
        kv_heads = min(self.kv_heads, 2)
        q_len, kv_len = (_small_length(n) for n in (self.q_len, self.kv_len))
        return Sizes(min(self.batches, 2), group * kv_heads, kv_heads, q_len, kv_len, dim, dim_v)


def _small_length(length: int) -> int:
    return min(length, 64 + length % 27)


@dataclass(frozen=True, slots=True)
class Mod:
    """A score or mask function over its tensors. learned: those that get gradients."""

    make: Callable[[Tensors], Function]
    tensors: Callable[[Sizes, torch.Generator], dict[str, Tensor]] = lambda sizes, generator: {}
    learned: tuple[str, ...] = ()


def _soft_cap(_: Tensors) -> Function:
    return lambda score, b, h, q_idx, kv_idx: CAP * torch.tanh(score / CAP)


def _alibi(t: Tensors) -> Function:
    slopes = t["slopes"]
    return lambda score, b, h, q_idx, kv_idx: score - slopes[h] * (q_idx - kv_idx)


def _soft_cap_alibi(t: Tensors) -> Function:
    slopes = t["slopes"]
    return lambda score, b, h, q_idx, kv_idx: CAP * torch.tanh(score / CAP) - slopes[h] * (q_idx - kv_idx)


def _biases(t: Tensors) -> Function:
    per_query, per_key = t["per_query"], t["per_key"]
    return lambda score, b, h, q_idx, kv_idx: score + per_query[h, q_idx] * per_key[b, kv_idx]


def _pair_bias(t: Tensors) -> Function:
    bias = t["bias"]
    return lambda score, b, h, q_idx, kv_idx: score + bias[h, q_idx, kv_idx]


def _slopes(sizes: Sizes, generator: torch.Generator) -> dict[str, Tensor]:
    return {"slopes": 2.0 ** -torch.linspace(1.0, 8.0, sizes.heads)}


SCORES: dict[str, Mod] = {
    "soft-cap": Mod(_soft_cap),
    "alibi": Mod(_alibi, _slopes, ("slopes",)),
    "soft-cap alibi": Mod(_soft_cap_alibi, _slopes, ("slopes",)),
    "query and key bias": Mod(
        _biases,
        lambda sizes, generator: {
            "per_query": torch.randn(sizes.heads, sizes.q_len, generator=generator),
            "per_key": torch.randn(sizes.batches, sizes.kv_len, generator=generator),
        },
        ("per_query", "per_key"),
    ),
    "pair bias": Mod(
        _pair_bias,
        lambda sizes, generator: {
            "bias": torch.randn(sizes.heads, sizes.q_len, sizes.kv_len, generator=generator)
        },
        ("bias",),
    ),
}


def _documents(sizes: Sizes, generator: torch.Generator) -> dict[str, Tensor]:
    def ids(length: int) -> Tensor:
        return torch.bucketize(torch.arange(length).float(), torch.tensor(DOCUMENT_ENDS) * length).int()

    return {"document_of_query": ids(sizes.q_len), "document_of_key": ids(sizes.kv_len)}


def _same_document(t: Tensors) -> Function:
    of_query, of_key = t["document_of_query"], t["document_of_key"]
    return lambda b, h, q_idx, kv_idx: of_query[q_idx] == of_key[kv_idx]


def _past_of_document(t: Tensors) -> Function:
    of_query, of_key = t["document_of_query"], t["document_of_key"]
    return lambda b, h, q_idx, kv_idx: (of_query[q_idx] == of_key[kv_idx]) & (kv_idx <= q_idx)


def _window(width: int) -> Callable[[Tensors], Function]:
    return lambda _: lambda b, h, q_idx, kv_idx: (kv_idx <= q_idx) & (q_idx - kv_idx < width)


def _late(_: Tensors) -> Function:
    """The first queries see nothing."""
    return lambda b, h, q_idx, kv_idx: kv_idx + 45 <= q_idx


MASKS: dict[str, Mod] = {
    "causal": Mod(lambda _: lambda b, h, q_idx, kv_idx: kv_idx <= q_idx),
    "window 1024": Mod(_window(1024)),
    "window 50": Mod(_window(50)),
    "documents": Mod(_same_document, _documents),
    "causal documents": Mod(_past_of_document, _documents),
    "prefix": Mod(lambda _: lambda b, h, q_idx, kv_idx: (kv_idx <= q_idx) | (kv_idx < 37)),
    "empty rows": Mod(_late),
    "hash": Mod(
        in_bucket,
        lambda s, generator: sorted_rows((s.batches, s.heads), (s.q_len, s.kv_len), generator),
    ),
    "qk": Mod(
        in_past,
        lambda s, generator: kept_rows((s.batches, s.heads), (s.q_len, s.kv_len), generator),
    ),
    "local-stride": Mod(
        local_stride,
        lambda s, generator: {"offset": torch.full((s.batches,), s.kv_len - s.q_len, dtype=torch.int32)},
    ),
}

Formula = Callable[[Tensor, Tensor], Tensor]


def _softmax(s: Tensor, visible: Tensor) -> Tensor:
    some = visible.any(-1, keepdim=True)
    hidden = s.masked_fill(~visible, -torch.inf).masked_fill(~some, 0.0)
    return torch.softmax(hidden, -1) * (visible & some)


def _retention(s: Tensor, visible: Tensor) -> Tensor:
    s = s * visible
    return s / s.abs().sum(-1, keepdim=True).clamp(min=1.0)


@online
def softmax_of_normalised(s: Any) -> Any:
    """Two passes over the keys: the softmax needs what the whole row says first."""
    p = torch.exp(s / torch.sqrt((s * s).sum() / 64 + 1))
    return p / p.sum()


def _softmax_of_normalised(s: Tensor, visible: Tensor) -> Tensor:
    s = s * visible
    return _softmax(s / torch.sqrt((s * s).sum(-1, keepdim=True) / 64 + 1), visible)


# A normaliser's rule for the engine, and its formula: (scores, visible) -> weights.
NORMALISERS: dict[str, tuple[Callable[[], OnlineFunc], Formula]] = {
    "softmax": (OnlineSoftmax, _softmax),
    "sigmoid": (OnlineSigmoid, lambda s, visible: torch.sigmoid(s) * visible),
    "relu": (OnlineRelu, lambda s, visible: torch.relu(s) * visible),
    "retention": (OnlineRetention, _retention),
    "softmax of normalised": (lambda: softmax_of_normalised, _softmax_of_normalised),
}


@dataclass(frozen=True, slots=True)
class Case:
    """One attention on one shape.

    layout: how q, k, v and the gradient of the output lie, a name of `given.LAYOUTS`. listed: with the lists of a block
    mask. lengths: of sequences packed into one batch, which are as long as both axes together. blocks: given by the
    call, a name of `sparse.BLOCKS`. gradients: backward too. sampled: of output and dQ only some rows are compared,
    where all would be too much.
    """

    sizes: Sizes
    dtype: str = "bfloat16"
    score: str = ""
    mask: str = ""
    normaliser: str = "softmax"
    layout: str = "contiguous"
    listed: bool = False
    lengths: tuple[int, ...] = ()
    blocks: str = ""
    gradients: bool = True
    sampled: bool = False

    def small(self) -> Case:
        """The same kind of case in a size for an interpreter."""
        mask = "window 50" if self.mask == "window 1024" else self.mask
        sizes, lengths = self.sizes.small(), tuple(min(n, 9 + n % 37) for n in self.lengths)
        if lengths:
            sizes = replace(sizes, q_len=sum(lengths), kv_len=sum(lengths))
        return replace(self, sizes=sizes, mask=mask, lengths=lengths)

    @property
    def learned(self) -> tuple[str, ...]:
        return SCORES[self.score].learned if self.score else ()

    @property
    def scale(self) -> float:
        return self.sizes.dim**-0.5

    def tensors(self, generator: torch.Generator) -> dict[str, Tensor]:
        """What the functions read, on the CPU, float32 or integer."""
        mods = [table[name] for table, name in ((SCORES, self.score), (MASKS, self.mask)) if name]
        found = {name: x for mod in mods for name, x in mod.tensors(self.sizes, generator).items()}
        if self.blocks:
            s, longest = self.sizes, max(self.lengths, default=0)
            lengths = (longest, longest) if self.lengths else (s.q_len, s.kv_len)
            found["blocks"] = draw_blocks(
                self.blocks, len(self.lengths) or s.batches, s.kv_heads, *lengths, generator
            )
        return found

    def score_mod(self, tensors: Tensors) -> Function | None:
        return SCORES[self.score].make(tensors) if self.score else None

    def mask_mod(self, tensors: Tensors) -> Function | None:
        return MASKS[self.mask].make(tensors) if self.mask else None

    def __str__(self) -> str:
        s = self.sizes
        parts = [
            self.normaliser,
            *(x for x in (self.score, self.mask) if x),
            self.dtype,
            f"B={s.batches} H={s.heads}:{s.kv_heads} S={s.q_len}x{s.kv_len} D={s.dim}/{s.dim_v}",
            *(["block lists"] if self.listed else []),
            *([f"blocks {self.blocks}"] if self.blocks else []),
            *([f"{len(self.lengths)} sequences"] if self.lengths else []),
            *([self.layout] if self.layout != "contiguous" else []),
            *([] if self.gradients else ["forward"]),
        ]
        return ", ".join(parts)

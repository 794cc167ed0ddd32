"""Section 4a: functions of one score."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attn_engine.conformance.entries import Make, Shape, Table

SCORES = Table()
HIDDEN = -float("inf")
WIDTH = 10  # of the pictures whose pixels some functions take positions for
# Functions that view a captured tensor count on the sizes of `entries.BASE`: 2 batches, 4 heads, length 70.


def add(name: str, score: Make, **what: Any) -> None:
    """The function in float32, and in less: there with the gradients of q, k and v alone, as torch tests them."""
    SCORES.add(name, "4a score_mod", score=score, **what)
    for dtype in (torch.bfloat16, torch.float16):
        low = {**what, "learned": (), "dtype": dtype}
        SCORES.add(f"{name}, {str(dtype)[6:]}", "4a low precision", score=score, **low)


def normal(*sizes: str | int, name: str = "bias") -> Any:
    """A normally distributed tensor; its sizes are numbers or attributes of the shape."""

    def made(shape: Shape, generator: torch.Generator) -> dict[str, Tensor]:
        dims = [size if isinstance(size, int) else getattr(shape, size) for size in sizes]
        return {name: torch.randn(dims, generator=generator)}

    return made


def integers(**tensors: Any) -> Any:
    """Tensors that are computed from the shape."""
    return lambda shape, _: {name: make(shape) for name, make in tensors.items()}


def both(*makers: Any) -> Any:
    def made(shape: Shape, generator: torch.Generator) -> dict[str, Tensor]:
        return {name: x for make in makers for name, x in make(shape, generator).items()}

    return made


add("identity", lambda: lambda score, b, h, q, kv: score)
add("times two", lambda: lambda score, b, h, q, kv: score * 2)
add("squared", lambda: lambda score, b, h, q, kv: score * score)
add("causal by where", lambda: lambda score, b, h, q, kv: torch.where(q >= kv, score, HIDDEN))
add("inverse causal by where", lambda: lambda score, b, h, q, kv: torch.where(q <= kv, score, HIDDEN))
add("relative position", lambda: lambda score, b, h, q, kv: score + (q - kv))
add(
    "relative position, causal",
    lambda: lambda score, b, h, q, kv: torch.where(q >= kv, score + (q - kv), HIDDEN),
)
add("ALiBi", lambda: lambda score, b, h, q, kv: score + (kv - q) * torch.exp2(-((h + 1) * 8.0 / 4)))
add(
    "trigonometry",
    lambda: lambda score, b, h, q, kv: torch.sin(score) + torch.cos(q * 0.1) * torch.sin(kv * 0.1),
)
add(
    "trigonometry, product",
    lambda: lambda score, b, h, q, kv: torch.cos(score) * torch.sin(score) + torch.tan(b * 0.3),
)
add("skip odd keys", lambda: lambda score, b, h, q, kv: torch.where(kv % 2 == 0, score, HIDDEN))
add("SiLU of the score", lambda: lambda score, b, h, q, kv: torch.nn.functional.silu(score))
add("soft cap", lambda: lambda score, b, h, q, kv: 5 * torch.tanh(score / 5))
add(
    "captured offset per head",
    lambda bias: lambda score, b, h, q, kv: score + bias[h] * (q - kv),
    tensors=normal("heads"), learned=("bias",),
)  # fmt: skip
add(
    "double index bias[b][q]",
    lambda bias: lambda score, b, h, q, kv: score + bias[b][q] * kv,
    tensors=normal("batches", "q_len"), learned=("bias",),
)  # fmt: skip
add(
    "index through a view and a 0-dim tensor",
    lambda bias, one: lambda score, b, h, q, kv: score + bias.view(2, 4, 70)[one, h, kv],
    tensors=both(normal(8, 70), integers(one=lambda s: torch.tensor(1))), learned=(),
)  # fmt: skip


def _composed(bias: Tensor) -> Any:
    def first(score: Any, b: Any, h: Any, q: Any, kv: Any) -> Any:
        return score + bias[h] * (q - kv)

    def second(score: Any, b: Any, h: Any, q: Any, kv: Any) -> Any:
        return torch.where(q >= kv, first(score, b, h, q, kv) * 2, HIDDEN)

    return second


add("composition of two functions", _composed, tensors=normal("heads"), learned=("bias",))
add(
    "captures on all dimensions",
    lambda by_b, by_h, by_q, by_kv: lambda score, b, h, q, kv: (
        score + by_b[b] * by_q[q] + by_h[h] * by_kv[kv]
    ),
    tensors=both(
        normal("batches", name="by_b"), normal("heads", name="by_h"), normal("q_len", name="by_q"),
        normal("kv_len", name="by_kv"),
    ),
    learned=("by_b", "by_h", "by_q", "by_kv"),
)  # fmt: skip
add(
    "sequence numbers",
    lambda seq: lambda score, b, h, q, kv: torch.where(seq[q] == seq[kv], score, HIDDEN),
    tensors=integers(seq=lambda s: torch.arange(s.q_len) // 17),
)
add(
    "bias (S, S)",
    lambda bias: lambda score, b, h, q, kv: score + bias[q, kv],
    tensors=normal("q_len", "kv_len"), learned=("bias",),
)  # fmt: skip
add(
    "bias (B, S, S)",
    lambda bias: lambda score, b, h, q, kv: score + bias[b, q, kv],
    tensors=normal("batches", "q_len", "kv_len"), learned=("bias",),
)  # fmt: skip
add(
    "bias (B, H, S, S)",
    lambda bias: lambda score, b, h, q, kv: score + bias[b, h, q, kv],
    tensors=normal("batches", "heads", "q_len", "kv_len"), learned=("bias",),
)  # fmt: skip
add(
    "decomposed relative positions through a view",
    lambda rows, columns: (
        lambda score, b, h, q, kv: (
            score
            + rows.view(8, 70, 7)[b * 4 + h, q, kv // 10]
            + columns.view(8, 70, 10)[b * 4 + h, q, kv % 10]
        )
    ),
    tensors=both(normal(8, 70, 7, 1, name="rows"), normal(8, 70, 1, 10, name="columns")),
)
add(
    "relative position table",
    lambda table: lambda score, b, h, q, kv: score + table[h, q - kv + 69],
    tensors=normal("heads", 139, name="table"), learned=("table",),
)  # fmt: skip
add(
    "prefix per batch",
    lambda prefix: lambda score, b, h, q, kv: torch.where((kv <= q) | (kv < prefix[b]), score, HIDDEN),
    tensors=integers(prefix=lambda s: torch.arange(s.batches) * 20 + 5),
)


def _neighbourhood() -> Any:
    def near(score: Any, b: Any, h: Any, q: Any, kv: Any) -> Any:
        rows = (q // WIDTH - kv // WIDTH).abs() <= 2
        columns = (q % WIDTH - kv % WIDTH).abs() <= 2
        return torch.where(rows & columns, score, HIDDEN)

    return near


add("two-dimensional neighbourhood", _neighbourhood)
add(
    "rows and columns of a picture",
    lambda: lambda score, b, h, q, kv: score + (q // WIDTH - kv // WIDTH) * 0.5 - (q % WIDTH) * 0.1,
)
add(
    "padded dense causal",
    lambda lengths: (
        lambda score, b, h, q, kv: torch.where(
            (q >= kv) & (kv < lengths[b]) & (q < lengths[b]), score, HIDDEN
        )
    ),
    tensors=integers(lengths=lambda s: torch.arange(s.batches) * 13 + 50),
)
add(
    "captured 0-dim integer scale",
    lambda scale: lambda score, b, h, q, kv: score + scale * (q - kv),
    tensors=integers(scale=lambda s: torch.tensor(3)),
)
add(
    "0-dim learned scale",
    lambda scale: lambda score, b, h, q, kv: score * scale,
    tensors=normal(name="scale"), learned=("scale",),
)  # fmt: skip
add(
    "squared distance of points, 3 coordinates",
    lambda points: lambda score, b, h, q, kv: score - ((points[q] - points[kv]) ** 2).sum(-1),
    tensors=normal("q_len", 3, name="points"),
)


class _Doubled(torch.autograd.Function):
    """Twice its input."""

    @staticmethod
    def forward(x: Any) -> Any:
        return x * 2

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Nothing is needed for the gradient."""

    @staticmethod
    def backward(ctx: Any, d_out: Any) -> Any:
        return d_out * 2

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Any) -> Any:
        return _Doubled.apply(x), in_dims[0]


add("an autograd.Function inside", lambda: lambda score, b, h, q, kv: _Doubled.apply(score))


def _packed(offsets: Tensor, documents: Tensor) -> Any:
    def within(score: Any, b: Any, h: Any, q: Any, kv: Any) -> Any:
        same = documents[q] == documents[kv]
        return torch.where(same, score + (q - offsets[documents[q]]) * 0.1, HIDDEN)

    return within


add(
    "offsets within packed sequences",
    _packed,
    tensors=integers(
        offsets=lambda s: torch.tensor([0, 20, 45]),
        documents=lambda s: torch.bucketize(torch.arange(s.q_len), torch.tensor([19, 44])),
    ),
)
add(
    "logarithm of a mass per key",
    lambda mass: lambda score, b, h, q, kv: score + torch.log(mass[b, kv]),
    tensors=lambda s, g: {"mass": torch.rand(s.batches, s.kv_len, generator=g) + 0.5},
    learned=("mass",),
)
# Poison: what the functions do to hidden pairs must not reach any gradient.
_visible = {"mask": lambda **_: lambda b, h, q, kv: q >= kv}
add(
    "poison: one over a hidden zero",
    lambda: lambda score, b, h, q, kv: score + 1.0 / torch.where(q >= kv, q - kv + 1.0, 0.0),
    **_visible,
)
add(
    "poison: the logarithm of a hidden negative number",
    lambda: lambda score, b, h, q, kv: score + torch.log(q - kv + 1.0),
    **_visible,
)
add(
    "poison: NaN in a part of a bias that is not seen",
    lambda bias: lambda score, b, h, q, kv: score + bias[q, kv],
    tensors=lambda s, g: {
        "bias": torch.randn(s.q_len, s.kv_len, generator=g).masked_fill(
            torch.ones(s.q_len, s.kv_len).triu(1).bool(), float("nan")
        )
    },
    learned=("bias",),
    **_visible,
)
# What no list asks for: gradients that are sums of many terms of both signs.
SCORES.add(
    "bias[h] * kv, with large scores",
    "extra",
    score=lambda bias: lambda score, b, h, q, kv: torch.where(q >= kv, (score + bias[h] * kv) * 2, HIDDEN),
    tensors=normal("heads"),
    learned=("bias",),
)
SCORES.add(
    "bias[h] * (q - kv), bfloat16",
    "extra",
    score=lambda bias: lambda score, b, h, q, kv: score + bias[h] * (q - kv),
    tensors=normal("heads"),
    learned=("bias",),
    dtype=torch.bfloat16,
)

"""Row functions of every kind, for tests: each is its own definition, since called with a tensor it is plain torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from attn_engine import online
from attn_engine.frontend import RowFunction

HEADS = 2
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """make(tensors): the row function over its learned tensors. passes: over the keys, forward. lse: it has one."""

    make: Callable[[Tensors], RowFunction]
    passes: int = 1
    learned: Callable[[], Tensors] = dict
    lse: bool = False
    kink: bool = False  # a row of one key lies on a kink, where rounding decides about the gradient
    outputs: tuple[str, ...] = field(default=())


def _plain(function: Callable[..., object]) -> Callable[[Tensors], RowFunction]:
    return lambda _: online(function)


def softmax(s):
    m = s.max()
    p = torch.exp(s - m)
    return p / p.sum()


def softmax_with_rows(s):
    m = s.max()
    p = torch.exp(s - m)
    l = p.sum()
    w = p / l
    rows = {"lse": m + torch.log(l), "entropy": -(w * torch.log(w)).sum(), "top": m, "spread": m - s.min()}
    return w, rows


def softmax_by_lse(s):
    lse = torch.logsumexp(s, -1)
    return torch.exp(s - lse), {"lse": lse}


def softmax_one(s):
    m = s.max()
    p = torch.exp(s - m)
    return p / (p.sum() + torch.exp(-m))


def _sink(t: Tensors) -> RowFunction:
    sink = t["sink"]

    @online
    def with_sink(s, h):
        m = s.max()
        p = torch.exp(s - m)
        return p / (p.sum() + torch.exp(sink[h] - m))

    return with_sink


def _temperature(t: Tensors) -> RowFunction:
    temperature = t["temperature"]

    @online
    def heated(s, h):
        x = s * temperature[h]
        p = torch.exp(x - x.max())
        return p / p.sum()

    return heated


def _scaled_sigmoid(t: Tensors) -> RowFunction:
    gain, offset = t["gain"], t["offset"]

    @online
    def gated(s, h):
        return torch.sigmoid(s - offset[h]) * gain

    return gated


def sigmoid(s):
    return 1 / (1 + torch.exp(-s))


def relu(s):
    return torch.relu(s)


def relu_squared(s):
    return torch.relu(s) ** 2


def silu(s):
    return torch.nn.functional.silu(s)


def retention(s):
    r = s.abs().sum()
    return s / r.clamp(min=1)


def l1_normalised(s):
    return s / s.abs().sum()


def l2_normalised(s):
    return s / torch.sqrt((s * s).sum())


def log_linear(s):
    a = 1 + s + s**2 / 2
    return a / a.sum()


def by_largest(s):
    return s / s.abs().max()


def exp_without_max(s):
    p = torch.exp(s)
    return p / p.sum()


def two_normalisers(s):
    p = torch.exp(s - s.max())
    return (p / p.sum()) * (s / s.abs().sum().clamp(min=1))


def relu_of_centred(s):
    mean = s.mean()
    return torch.relu(s - mean), {"mean": mean}


def standardised(s):
    off = s - s.mean()
    return torch.sigmoid(off / torch.sqrt((off * off).mean() + 0.1))


def softmax_of_normalised(s):
    x = s / torch.sqrt((s * s).sum() + 1)
    p = torch.exp(x)
    return p / p.sum()


def uniform(s):
    return torch.ones_like(s) / s.numel()


def _learned_threshold(t: Tensors) -> RowFunction:
    threshold = t["threshold"]

    @online
    def sparse(s, h):
        return torch.relu(s - threshold[h] * s.abs().max())

    return sparse


def learned(**shapes: tuple[int, ...]) -> Callable[[], Tensors]:
    """Fresh positive float64 tensors that require a gradient."""
    return lambda: {
        name: (torch.rand(shape, dtype=torch.float64) + 0.3).requires_grad_()
        for name, shape in shapes.items()
    }


CASES: dict[str, Case] = {
    "softmax": Case(_plain(softmax), lse=True),
    "softmax with rows": Case(
        _plain(softmax_with_rows), lse=True, outputs=("lse", "entropy", "top", "spread")
    ),
    "softmax by lse": Case(_plain(softmax_by_lse), lse=True, outputs=("lse",)),
    "softmax + 1": Case(_plain(softmax_one), lse=True),
    "sink": Case(_sink, learned=learned(sink=(HEADS,)), lse=True),
    "temperature": Case(_temperature, learned=learned(temperature=(HEADS,))),
    "gain and offset": Case(_scaled_sigmoid, learned=learned(gain=(), offset=(HEADS,))),
    "sigmoid": Case(_plain(sigmoid)),
    "relu": Case(_plain(relu)),
    "relu squared": Case(_plain(relu_squared)),
    "silu": Case(_plain(silu)),
    "retention": Case(_plain(retention)),
    "l1": Case(_plain(l1_normalised)),
    "l2": Case(_plain(l2_normalised)),
    "log linear": Case(_plain(log_linear)),
    "by largest": Case(_plain(by_largest)),
    "exp without max": Case(_plain(exp_without_max), lse=True),
    "two normalisers": Case(_plain(two_normalisers)),
    "uniform": Case(_plain(uniform)),
    "relu of centred": Case(_plain(relu_of_centred), passes=2, outputs=("mean",), kink=True),
    "standardised": Case(_plain(standardised), passes=3),
    "softmax of normalised": Case(_plain(softmax_of_normalised), passes=2),
    "learned threshold": Case(_learned_threshold, passes=2, learned=learned(threshold=(HEADS,))),
}


def dense(
    function: Callable[..., object], takes_head: bool, scores: Tensor, values: Tensor, visible: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """o (B, H, Sq, Dv) and the row outputs (B, H, Sq), row by row; empty rows are 0, and -inf.

    scores (B, H, Sq, Skv), values (B, H, Skv, Dv), visible (B, H, Sq, Skv).
    """
    o = torch.zeros(*scores.shape[:3], values.shape[3], dtype=scores.dtype)
    rows: dict[str, Tensor] = {}
    for b, h, q in torch.cartesian_prod(*(torch.arange(n) for n in scores.shape[:3])).tolist():
        keys = visible[b, h, q]
        if not keys.any():
            continue
        found = function(scores[b, h, q, keys], **({"h": h} if takes_head else {}))
        weights, outputs = found if isinstance(found, tuple) else (found, {})
        o = o.index_put(tuple(torch.tensor(i) for i in (b, h, q)), weights @ values[b, h, keys])
        for name, x in outputs.items():
            empty = torch.full(scores.shape[:3], -torch.inf, dtype=scores.dtype)
            place = tuple(torch.tensor(i) for i in (b, h, q))
            rows[name] = rows.get(name, empty).index_put(place, x)
    return o, rows

"""Attentions over sequences: what each needs, and the definition of all of them, every sequence by itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from attn_engine.library.scores import alibi, pair_bias, relative_bias, soft_cap
from torch import Tensor

from attn_engine import AttentionEngine, meta_tensor, online
from attn_engine.library import OnlineRetention, OnlineSigmoid

HEADS, KV_HEADS = 4, 2
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Program:
    """options(tensors): of the engine. tensors(n, q_len, kv_len): what it captures, lengths those of the longest.

    by_sequence: those whose first dimension is the sequence. learned: those that get gradients.
    """

    options: Callable[[Tensors], dict[str, Any]]
    tensors: Callable[[int, int, int], Tensors] = field(default=lambda n, q_len, kv_len: {})
    by_sequence: tuple[str, ...] = ()
    learned: tuple[str, ...] = ()


def causal(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return kv_idx <= q_idx


def window(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return (kv_idx <= q_idx) & (q_idx - kv_idx < 40)


def _with_offset(t: Tensors) -> dict[str, Any]:
    offset = t["offset"]

    def causal_from_the_end(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return kv_idx <= q_idx + offset[b]

    return {"mask_mod": causal_from_the_end}


def _documents(t: Tensors) -> dict[str, Any]:
    document = t["document"]

    def same_document(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return document[b, q_idx] == document[b, kv_idx]

    return {"mask_mod": same_document}


def _temperatures(t: Tensors) -> dict[str, Any]:
    by_row, by_key, of_all = t["by_row"], t["by_key"], t["of_all"]

    def score_mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return score * by_row[b, q_idx] + by_key[h, kv_idx] * of_all[b]

    return {"score_mod": score_mod, "mask_mod": causal, "scale": 0.3}


def _sink(t: Tensors) -> dict[str, Any]:
    sink = t["sink"]

    @online
    def with_sink(s, h):
        m = s.max()
        p = torch.exp(s - m)
        return p / (p.sum() + torch.exp(sink[h] - m))

    return {"online_func": with_sink, "mask_mod": causal}


def _centred(t: Tensors) -> dict[str, Any]:
    @online
    def centred(s):
        power = torch.relu(s - s.mean()) ** 2
        return power / (1 + power.sum())

    return {"online_func": centred, "mask_mod": window}


def random(*sizes: int) -> Tensor:
    return torch.randn(*sizes, dtype=torch.float64) * 0.5


PROGRAMS = {
    "full": Program(lambda t: {}),
    "causal": Program(lambda t: {"mask_mod": causal}),
    "causal from the end": Program(
        _with_offset, lambda n, q_len, kv_len: {"offset": torch.randint(0, 50, (n,))}, ("offset",)
    ),
    "soft cap and window": Program(lambda t: {"score_mod": soft_cap(4.0), "mask_mod": window, "scale": 0.4}),
    "alibi": Program(
        lambda t: {"score_mod": alibi(t["slopes"]), "mask_mod": causal, "scale": 0.3},
        lambda n, q_len, kv_len: {"slopes": random(HEADS)},
        learned=("slopes",),
    ),
    "documents": Program(
        _documents,
        lambda n, q_len, kv_len: {"document": (torch.rand(n, max(q_len, kv_len)) < 0.03).cumsum(1)},
        ("document",),
    ),
    "biases by row, key and sequence": Program(
        _temperatures,
        lambda n, q_len, kv_len: {
            "by_row": 1 + random(n, q_len),
            "by_key": random(HEADS, kv_len),
            "of_all": random(n),
        },
        ("by_row", "of_all"),
        ("by_row", "by_key", "of_all"),
    ),
    "bias by distance": Program(
        lambda t: {"score_mod": relative_bias(t["bias"]), "mask_mod": causal, "scale": 0.3},
        lambda n, q_len, kv_len: {"bias": random(HEADS, 101)},
        learned=("bias",),
    ),
    "bias by pair": Program(
        lambda t: {"score_mod": pair_bias(t["bias"]), "mask_mod": causal, "scale": 0.3},
        lambda n, q_len, kv_len: {"bias": random(HEADS, q_len, kv_len)},
        learned=("bias",),
    ),
    "bias by pair and sequence": Program(
        lambda t: {"score_mod": pair_bias(t["bias"]), "scale": 0.3},
        lambda n, q_len, kv_len: {"bias": random(n, HEADS, q_len, kv_len)},
        ("bias",),
        ("bias",),
    ),
    "sigmoid": Program(lambda t: {"online_func": OnlineSigmoid(), "mask_mod": causal}),
    "retention": Program(lambda t: {"online_func": OnlineRetention(), "mask_mod": causal}),
    "sink": Program(_sink, lambda n, q_len, kv_len: {"sink": random(HEADS)}, learned=("sink",)),
    "two passes": Program(_centred),
}


def engine(
    name: str,
    tensors: Tensors,
    backend: str,
    dtype: torch.dtype,
    dims: tuple[int, int] = (16, 16),
    **options: Any,
) -> AttentionEngine:
    metas = [meta_tensor(None, None, None, d, dtype=dtype) for d in (dims[0], *dims)]
    return AttentionEngine(metas, backend=backend, **PROGRAMS[name].options(tensors), **options)


def tensors_of(name: str, n: int, q_len: int, kv_len: int, dtype: torch.dtype) -> Tensors:
    program = PROGRAMS[name]
    made = program.tensors(n, max(q_len, 1), max(kv_len, 1))
    found = {k: x.to(dtype) if x.is_floating_point() else x for k, x in made.items()}
    return {k: x.requires_grad_() if k in program.learned else x for k, x in found.items()}


def alone(
    name: str, tensors: Tensors, inputs: Sequence[tuple[Tensor, Tensor, Tensor]], **options: Any
) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """(o, row values) of every sequence by itself, by the dense definition of an engine that knows of no others.

    inputs: q, k, v of each as (rows, heads, dim). o: (rows, heads, dim), row values (heads, rows), in float64.
    """
    program = PROGRAMS[name]
    found: list[tuple[Tensor, dict[str, Tensor]]] = []
    for i, (q, k, v) in enumerate(inputs):
        own = {n: x[i : i + 1] if n in program.by_sequence else x for n, x in tensors.items()}
        one = engine(name, own, "reference", q.dtype, (q.shape[2], v.shape[2]), **options)
        o, rows = one.reference(q[None], k[None], v[None], return_final_rowscales=True)
        found.append((o[0], {n: x[0] for n, x in rows.items()}))
    return found

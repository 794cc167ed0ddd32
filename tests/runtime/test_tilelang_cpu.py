"""Generated TileLang run through its CPU target: forward and every gradient against the dense float64 reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from attn_engine import AttentionEngine, OnlineFunc, create_block_mask, meta_tensor, online
from attn_engine.library.dense.relu import OnlineRelu
from attn_engine.library.dense.retention import OnlineRetention
from attn_engine.library.dense.sigmoid import OnlineSigmoid

pytest.importorskip("tilelang")

D = 16


def causal(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return kv_idx <= q_idx


def window(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return (kv_idx <= q_idx) & (q_idx - kv_idx < 20)


def later(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    """The first 40 rows see nothing."""
    return kv_idx <= q_idx - 40


@dataclass(frozen=True)
class Case:
    """options(tensors): the engine's; tensors(q_len, kv_len, heads): what it captures. sizes: those and kv_heads."""

    options: Callable[[dict[str, Tensor]], dict[str, Any]]
    sizes: tuple[int, int, int, int] = (70, 70, 2, 1)
    tensors: Callable[[int, int, int], dict[str, Tensor]] = lambda *_: {}
    dim_v: int = D
    lists: bool = False
    backward: bool = True
    learned: tuple[str, ...] = field(default=())


def soft_cap_alibi(t: dict[str, Tensor]) -> dict[str, Any]:
    slopes = t["slopes"]

    def score_mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return 5.0 * torch.tanh(score / 5.0) - slopes[h] * (q_idx - kv_idx)

    return {"score_mod": score_mod, "mask_mod": window}


def documents(t: dict[str, Tensor]) -> dict[str, Any]:
    ids = t["ids"]

    def mask_mod(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return (ids[q_idx] == ids[kv_idx]) & (kv_idx <= q_idx)

    return {"mask_mod": mask_mod}


def pair_bias(t: dict[str, Tensor]) -> dict[str, Any]:
    bias = t["bias"]
    return {"score_mod": lambda score, b, h, q_idx, kv_idx: score + bias[h, q_idx, kv_idx]}


def key_and_query_bias(t: dict[str, Tensor]) -> dict[str, Any]:
    keys, queries = t["keys"], t["queries"]
    return {"score_mod": lambda score, b, h, q_idx, kv_idx: score * queries[q_idx] + keys[h, kv_idx]}


def centred(s: Any) -> Any:
    return torch.relu(s - s.sum() / 70.0 + 0.3)


def rule(make: Callable[[], OnlineFunc]) -> Callable[[dict[str, Tensor]], dict[str, Any]]:
    return lambda _: {"online_func": make(), "mask_mod": causal}


CASES: dict[str, Case] = {
    "causal, four query heads": Case(lambda _: {"mask_mod": causal}, (70, 70, 4, 1)),
    "full, ragged, another dim of v": Case(lambda _: {}, (33, 70, 2, 2), dim_v=24),
    "window": Case(lambda _: {"mask_mod": window}, (100, 100, 2, 1)),
    "rows that see nothing": Case(lambda _: {"mask_mod": later}, (70, 50, 2, 1)),
    "soft cap, alibi, window": Case(
        soft_cap_alibi, (70, 70, 4, 2), lambda q, kv, h: {"slopes": torch.rand(h)}, learned=("slopes",)
    ),
    "documents": Case(
        documents, (100, 100, 2, 1), lambda q, kv, h: {"ids": torch.arange(q, dtype=torch.int32) // 37}
    ),
    "pair bias": Case(
        pair_bias, (50, 70, 2, 1), lambda q, kv, h: {"bias": torch.randn(h, q, kv)}, learned=("bias",)
    ),
    "bias of keys, factor of queries": Case(
        key_and_query_bias,
        (50, 40, 2, 1),
        lambda q, kv, h: {"keys": torch.randn(h, kv), "queries": torch.randn(q)},
        learned=("keys", "queries"),
    ),
    "sigmoid": Case(rule(OnlineSigmoid)),
    "relu": Case(rule(OnlineRelu)),
    "retention": Case(rule(OnlineRetention)),
    "two passes": Case(lambda _: {"online_func": online(centred)}),
    "listed blocks, ragged": Case(lambda _: {"mask_mod": causal}, (100, 90, 2, 1), lists=True),
    "listed blocks": Case(lambda _: {"mask_mod": window}, (128, 128, 2, 1), lists=True),
}
FAST = ("soft cap, alibi, window",)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in CASES]
)
def test_like_the_reference(name: str, generator: torch.Generator) -> None:
    case = CASES[name]
    q_len, kv_len, heads, kv_heads = case.sizes
    torch.manual_seed(generator.initial_seed())
    tensors = case.tensors(q_len, kv_len, heads)
    for n in case.learned:
        tensors[n].requires_grad_()
    meta = [meta_tensor(None, None, None, d, dtype=torch.float32) for d in (D, D, case.dim_v)]
    options = case.options(tensors)
    engine = AttentionEngine(meta, backend="tilelang-cpu", **options)
    shapes = ((2, q_len, heads, D), (2, kv_len, kv_heads, D), (2, kv_len, kv_heads, case.dim_v))
    q, k, v = (torch.randn(s, requires_grad=True) for s in shapes)
    lists: dict[str, Any] = (
        {"block_mask": create_block_mask(options["mask_mod"], 2, heads, q_len, kv_len, BLOCK_SIZE=32)}
        if case.lists
        else {}
    )
    o = engine(q, k, v, **lists)
    want = engine.reference(q, k, v, **lists)
    assert isinstance(want, Tensor)
    torch.testing.assert_close(o, want.to(o.dtype), rtol=2e-5, atol=2e-5)
    if not case.backward:
        return
    wrt = [q, k, v, *(tensors[n] for n in case.learned)]
    weights = torch.randn_like(o)
    got = torch.autograd.grad(o, wrt, weights)
    wanted = torch.autograd.grad(want, wrt, weights.to(want.dtype))
    for g, w in zip(got, wanted, strict=True):
        torch.testing.assert_close(g, w.to(g.dtype), rtol=5e-5, atol=5e-5 * max(1.0, w.abs().max().item()))

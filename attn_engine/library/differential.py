"""Differential attention (Differential Transformer, arXiv:2410.05258, section 2.1)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from attn_engine.errors import WrongArgument

if TYPE_CHECKING:
    from attn_engine.engine import AttentionEngine


def differential(
    engine: AttentionEngine, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, weight: float | torch.Tensor
) -> torch.Tensor:
    """The difference of two attentions over the same values, engine(q1, k1, v) - weight * engine(q2, k2, v).

    Noise that both maps share cancels. q, k: twice the heads of the output and of v, the two maps of a head beside each
    other. weight: the paper's lambda, a number or (heads,). The paper's normalisation of the output and its factor
    1 - lambda_init are left to the model.
    """
    heads = 2 if engine.layout == "bshd" else 1
    if q.shape[heads] % 2 or k.shape[heads] != 2 * v.shape[heads]:
        got = (q.shape[heads], k.shape[heads], v.shape[heads])
        expected = "an even number of heads of q, and twice as many heads of k as of v"
        instead = "Keep the two maps of a head beside each other: heads 2 i and 2 i + 1."
        raise WrongArgument(argument="heads of q, k, v", got=got, expected=expected, instead=instead)
    first, second = (engine(_every_second(q, heads, i), _every_second(k, heads, i), v) for i in (0, 1))
    if isinstance(weight, torch.Tensor) and weight.ndim:
        weight = weight[:, None] if engine.layout == "bshd" else weight[:, None, None]
    return first - weight * second


def _every_second(x: torch.Tensor, dimension: int, first: int) -> torch.Tensor:
    return x.unflatten(dimension, (-1, 2)).select(dimension + 1, first)

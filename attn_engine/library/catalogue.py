"""The attentions that the command line knows by name: each is a few arguments of an AttentionEngine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from attn_engine.library.masks import and_masks, causal, document, prefix, sliding_window
from attn_engine.library.normalisers import OnlineRelu, OnlineRetention, OnlineSigmoid
from attn_engine.library.scores import alibi, relative_bias, soft_cap


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of description, and the engine's keyword arguments."""

    summary: str
    arguments: Callable[[], dict[str, Any]]


def _slopes() -> torch.Tensor:
    """ALiBi's geometric slopes for eight heads."""
    return torch.tensor([2.0 ** -(i + 1) for i in range(8)])


def _documents() -> torch.Tensor:
    return torch.arange(4096, dtype=torch.int32) // 512


CATALOGUE: dict[str, Entry] = {
    "full": Entry("softmax attention, every key visible", dict),
    "causal": Entry("softmax attention over the past", lambda: {"mask_mod": causal()}),
    "sliding_window": Entry(
        "causal attention to itself and the 512 keys before (Mistral 7B)",
        lambda: {"mask_mod": sliding_window(512)},
    ),
    "prefix": Entry(
        "bidirectional over the first 128 keys, causal after them (PrefixLM)",
        lambda: {"mask_mod": prefix(128)},
    ),
    "document": Entry(
        "causal inside packed documents of 512 tokens",
        lambda: {"mask_mod": and_masks(causal(), document(_documents()))},
    ),
    "alibi": Entry(
        "causal with linear distance biases (ALiBi)",
        lambda: {"score_mod": alibi(_slopes()), "mask_mod": causal()},
    ),
    "soft_cap": Entry(
        "causal with scores squashed by 30 tanh(s / 30) (Gemma 2)",
        lambda: {"score_mod": soft_cap(30.0), "mask_mod": causal()},
    ),
    "relative_bias": Entry(
        "learned bias per distance, eight heads",
        lambda: {"score_mod": relative_bias(torch.zeros(8, 255, requires_grad=True))},
    ),
    "sigmoid": Entry(
        "sigmoid weights, causal", lambda: {"online_func": OnlineSigmoid(), "mask_mod": causal()}
    ),
    "relu": Entry("relu weights, causal", lambda: {"online_func": OnlineRelu(), "mask_mod": causal()}),
    "retention": Entry(
        "scores over their absolute row sum, causal",
        lambda: {"online_func": OnlineRetention(), "mask_mod": causal()},
    ),
}

"""Transformers are RNNs (arXiv:2006.16236): positive features of q and k, normalised by their sum."""

from __future__ import annotations

from typing import Any

import torch

from attn_engine.errors import UnknownOption


def _elu_plus_one(x: Any) -> Any:
    return torch.nn.functional.elu(x) + 1.0


def _relu(x: Any) -> Any:
    return torch.relu(x)


_FEATURES = {"elu": _elu_plus_one, "relu": _relu}


def linear_transformer(feature: str = "elu", epsilon: float = 1e-6) -> dict[str, Any]:
    """o_t = phi(q_t) S_t / (phi(q_t) . sum of phi(k) + epsilon); feature: "elu" (plus one) or "relu"."""
    if feature not in _FEATURES:
        known = ", ".join(map(repr, _FEATURES))
        raise UnknownOption(option="feature", value=feature, where="linear_transformer", known=known)

    def normalizer(weight_sum: Any) -> Any:
        return weight_sum + epsilon

    phi = _FEATURES[feature]
    return {"q_mod": phi, "k_mod": phi, "normalizer_mod": normalizer, "decay_rank": "none"}

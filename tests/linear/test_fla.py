"""The naive functions of flash-linear-attention as another reference: pip install -e '.[fla]'. float32, as they are."""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from attn_engine import LinearAttentionEngine, meta_tensor

B, T, H, D, DV = 2, 50, 3, 16, 12


def naive(module: str, name: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("fla", reason="fla-core is not installed", exc_type=ImportError)
        return getattr(importlib.import_module(f"fla.ops.{module}.naive"), name)


def engine(**arguments: Any) -> LinearAttentionEngine:
    qk, v = (meta_tensor(None, None, None, n, dtype=torch.float32) for n in (D, DV))
    return LinearAttentionEngine([qk, qk, v], scale=D**-0.5, backend="torch", chunk=16, **arguments)


def rows() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    k = torch.nn.functional.normalize(torch.randn(B, T, H, D), dim=-1)
    return torch.randn(B, T, H, D), k, torch.randn(B, T, H, DV)


def first(x: Any) -> Tensor:
    return x[0] if isinstance(x, tuple) else x


def same(found: Tensor, want: Tensor) -> None:
    assert float((found - want).norm() / want.norm()) < 2e-6


def test_simple_gla():
    function, (q, k, v), g = naive("simple_gla", "naive_recurrent_simple_gla"), rows(), -torch.rand(B, T, H)
    same(engine()(q, k, v, g), first(function(q, k, v, g)))


def test_gla():
    function, (q, k, v), g = naive("gla", "naive_recurrent_gla"), rows(), -torch.rand(B, T, H, D)
    same(engine()(q, k, v, g), first(function(q, k, v, g)))


def test_gated_delta_rule():
    function = naive("gated_delta_rule", "naive_recurrent_gated_delta_rule")
    (q, k, v), g, beta = rows(), -torch.rand(B, T, H), torch.rand(B, T, H)
    same(engine(delta=True)(q, k, v, g, beta=beta), first(function(q, k, v, beta, g)))


def test_kimi_delta():
    function = naive("kda", "naive_recurrent_kda")
    (q, k, v), g, beta = rows(), -torch.rand(B, T, H, D), torch.rand(B, T, H)
    same(engine(delta=True)(q, k, v, g, beta=beta), first(function(q, k, v, g, beta)))

"""Which backend answers, and what happens where the machine lacks its tools."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch

from attn_engine import AttentionEngine, meta_tensor
from attn_engine.errors import CompilerMissing
from attn_engine.runtime import cpu_compile
from attn_engine.runtime.backends import NAMES, backend_named


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    backend_named.cache_clear()
    monkeypatch.setattr(cpu_compile, "find_compiler", lambda *_: None)
    yield
    backend_named.cache_clear()


def causal_engine(**options: str) -> AttentionEngine:
    metas = [meta_tensor(None, None, None, 16, dtype=torch.float32)] * 3
    return AttentionEngine(metas, mask_mod=lambda b, h, q_idx, kv_idx: kv_idx <= q_idx, **options)


def test_without_a_compiler_torch_carries_the_kernels_out(no_compiler: None) -> None:
    q, k, v = (torch.randn(1, 40, 2, 16, requires_grad=True) for _ in range(3))
    with pytest.warns(CompilerMissing, match="g\\+\\+"):
        o = causal_engine()(q, k, v)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = causal_engine()(q, k, v)  # one warning is enough
    assert torch.equal(o, again)
    wanted = causal_engine(backend="reference")(q, k, v)
    torch.testing.assert_close(o, wanted, rtol=1e-5, atol=1e-5)
    weights = torch.randn_like(o)
    for g, w in zip(*(torch.autograd.grad(x, (q, k, v), weights) for x in (o, wanted)), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("auto", "triton", "tilelang")])
def test_every_backend_that_needs_no_gpu_agrees(name: str) -> None:
    q, k, v = (torch.randn(1, 40, 2, 16) for _ in range(3))
    o = causal_engine(backend=name)(q, k, v)
    torch.testing.assert_close(o.double(), causal_engine().reference(q, k, v), rtol=1e-5, atol=1e-5)

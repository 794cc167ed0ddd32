"""The library's attentions through the kernels for GPUs, without a GPU: Triton's interpreter, TileLang's CPU target."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest
import torch

from attn_engine import AttentionEngine, AttentionLibrary
from attn_engine.library import dynamic_sparse_attention
from attn_engine.library.catalogue import ATTENTIONS, MASKS
from attn_engine.library.sparse import dynamic, patterns
from tests.library import test_attention_library as dense_entries
from tests.library import test_block_patterns as block_patterns
from tests.library import test_dynamic_sparse as dynamic_sparse

PACKAGES = {"triton-interpreter": "triton", "tilelang-cpu": "tilelang"}


@pytest.fixture
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The library's engines are made for the backend, whatever device its tensors are on."""
    name: str = request.param
    pytest.importorskip(PACKAGES[name])
    for module in (dynamic, patterns):
        monkeypatch.setattr(module, "AttentionEngine", partial(AttentionEngine, backend=name))
    dynamic._made.cache_clear()  # pyright: ignore[reportPrivateUsage]
    yield name
    dynamic._made.cache_clear()  # pyright: ignore[reportPrivateUsage]


def on_each(*fast: str, slow: tuple[str, ...] = tuple(PACKAGES)) -> pytest.MarkDecorator:
    """Those named first in the fast suite too."""
    rest = [pytest.param(b, marks=pytest.mark.slow) for b in slow if b not in fast]
    return pytest.mark.parametrize("backend", [*fast, *rest], indirect=True)


@on_each("triton-interpreter")
def test_hash(backend: str, seed: int) -> None:
    torch.manual_seed(seed)
    lengths = 70, 90
    dynamic_sparse.agrees(*dynamic_sparse.tensors(*lengths), *dynamic_sparse.indices("hash", lengths), "hash")


@on_each("tilelang-cpu")
def test_qk_forward(backend: str, seed: int) -> None:
    torch.manual_seed(seed)
    lengths = 70, 90
    (q, k, v), kept = dynamic_sparse.tensors(*lengths), dynamic_sparse.indices("qk", lengths)
    out = dynamic_sparse_attention(q, k, v, *kept, sparsity_mode="qk")
    want = dynamic_sparse.dense(q, k, v, dynamic_sparse.visible("qk", *kept), 0.25)
    torch.testing.assert_close(out, want.float(), atol=2e-6, rtol=2e-5)


@on_each()
@pytest.mark.parametrize("mode", ["hash", "qk"])
@pytest.mark.parametrize("lengths", [(1, 1), (129, 128), (31, 200)])
def test_dynamic(mode: str, lengths: tuple[int, int], backend: str, seed: int) -> None:
    torch.manual_seed(seed)
    given = dynamic_sparse.tensors(*lengths, 16, 24)
    dynamic_sparse.agrees(*given, *dynamic_sparse.indices(mode, lengths), mode, sm_scale=0.7, causal="strict")


@on_each("triton-interpreter")
def test_local_stride_grouped_with_a_dense_head(backend: str, seed: int) -> None:
    torch.manual_seed(seed)
    block_patterns.test_local_stride("grouped, a dense head")


@on_each()
@pytest.mark.parametrize("name", [n for n in block_patterns.OPTIONS if n != "grouped, a dense head"])
def test_local_stride(name: str, backend: str, seed: int) -> None:
    torch.manual_seed(seed)
    block_patterns.test_local_stride(name)


@on_each()
@pytest.mark.parametrize(("size", "pattern_heads"), [(16, 1), (32, 4)])
def test_any_pattern(size: int, pattern_heads: int, backend: str, seed: int) -> None:
    torch.manual_seed(seed)
    block_patterns.test_any_pattern(size, pattern_heads)


@pytest.mark.slow
@pytest.mark.parametrize("backend", PACKAGES)
@pytest.mark.parametrize("name", [n for n, e in ATTENTIONS.items() if e.compose is None])
def test_every_attention(name: str, backend: str, seed: int) -> None:
    pytest.importorskip(PACKAGES[backend])
    torch.manual_seed(seed)
    shapes = dense_entries.LEARNED.get(name, {})
    learned = {n: torch.randn(shape, requires_grad=True) for n, shape in shapes.items()}
    given = {**dense_entries.SMALL.get(name, {}), **learned}
    dense_entries.agrees(
        AttentionLibrary(name, backend=backend, **given), dense_entries.qkv(), [*learned.values()]
    )


@pytest.mark.slow
@pytest.mark.parametrize("backend", PACKAGES)
@pytest.mark.parametrize("name", MASKS)
def test_every_mask(name: str, backend: str, seed: int) -> None:
    pytest.importorskip(PACKAGES[backend])
    torch.manual_seed(seed)
    given = dense_entries.SMALL.get(name, {})
    dense_entries.agrees(AttentionLibrary(mask_type=name, backend=backend, **given), dense_entries.qkv(), [])

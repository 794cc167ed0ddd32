"""Tiles that a mask hides are skipped, tiles that it shows are not masked: every backend, forward and backward."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from attn_engine import AttentionEngine, meta_tensor
from attn_engine.ir.tile import Let, Stmt
from attn_engine.library import OnlineRetention
from attn_engine.runtime import tile_program
from attn_engine.runtime.cpu_compile import find_compiler
from tests.part import part_of

Mask = Callable[..., Any]
DIM = 16
META = (meta_tensor(None, None, None, DIM, dtype=torch.float32),) * 3
BACKENDS = [
    "torch",
    pytest.param("cpu", marks=pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler")),
    "triton-interpreter",
]


def engine(mask: Mask, backend: str, rule: object = None) -> AttentionEngine:
    return AttentionEngine(
        META, None, mask_mod=mask, online_func=rule, layout="bhsd", scale=0.25, backend=backend
    )


def inputs(q_len: int, kv_len: int, batches: int = 1, heads: int = 2, kv_heads: int = 1) -> list[Tensor]:
    """q, k, v and the gradient of o."""
    sizes = ((heads, q_len), (kv_heads, kv_len), (kv_heads, kv_len), (heads, q_len))
    return [torch.randn(batches, *size, DIM) for size in sizes]


def gradients(
    function: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, d_out: Tensor
) -> list[Tensor]:
    """o and the gradients of q, k, v."""
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, d_out.to(out.dtype))]


def agree(mask: Mask, backend: str, tensors: list[Tensor], rule: object = None) -> None:
    attention = engine(mask, backend, rule)
    wanted = gradients(lambda q, k, v: attention.reference(q, k, v), *tensors)
    for name, found, exact in zip("o dq dk dv".split(), gradients(attention, *tensors), wanted, strict=True):
        torch.testing.assert_close(
            found, exact.to(found.dtype), rtol=2e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


def sorted_ids(length: int, most: int) -> Tensor:
    return torch.randint(0, most, (length,)).sort().values


def masks(q_len: int, kv_len: int, batches: int, heads: int) -> dict[str, Mask]:
    """One of each kind that only classes of tiles understand; all tensors are new in every call."""
    most = max(q_len, kv_len)
    documents, wide = sorted_ids(most, 5).int(), sorted_ids(most, 4)
    shuffled = torch.randint(0, 3, (batches, most), dtype=torch.int16)
    by_head = torch.stack([sorted_ids(most, 3) for _ in range(heads)]).to(torch.uint8)
    valid = torch.rand(most) < 0.5
    valid[most // 4 : most // 2] = False
    time = torch.rand(most).sort().values
    time[most // 3] = math.nan
    reach = torch.randint(1, most // 2, (most,))
    return {
        "documents": lambda b, h, q_idx, kv_idx: documents[q_idx] == documents[kv_idx],
        "documents, int64": lambda b, h, q_idx, kv_idx: wide[q_idx] == wide[kv_idx],
        "documents and causal": lambda b, h, q_idx, kv_idx: (
            (documents[q_idx] == documents[kv_idx]) & (kv_idx <= q_idx)
        ),
        "other documents": lambda b, h, q_idx, kv_idx: documents[q_idx] != documents[kv_idx],
        "by batch": lambda b, h, q_idx, kv_idx: shuffled[b, q_idx] == shuffled[b, kv_idx],
        "by head": lambda b, h, q_idx, kv_idx: by_head[h, q_idx] <= by_head[h, kv_idx],
        "valid keys": lambda b, h, q_idx, kv_idx: valid[kv_idx],
        "valid or near": lambda b, h, q_idx, kv_idx: valid[kv_idx] | ((q_idx - kv_idx).abs() < 4),
        "earlier": lambda b, h, q_idx, kv_idx: time[kv_idx] <= time[q_idx],
        "own reach": lambda b, h, q_idx, kv_idx: (kv_idx <= q_idx) & (q_idx - kv_idx < reach[q_idx]),
        "blocks": lambda b, h, q_idx, kv_idx: q_idx // 64 == kv_idx // 64,
        "strided": lambda b, h, q_idx, kv_idx: (q_idx % 96 < 48) == (kv_idx % 80 < 40),
        "sink or window": lambda b, h, q_idx, kv_idx: (
            (kv_idx < 20) | ((kv_idx <= q_idx) & (q_idx - kv_idx <= 90))
        ),
        "dilated blocks": lambda b, h, q_idx, kv_idx: (q_idx // 256 - kv_idx // 256) % 3 == 0,
        "nothing": lambda b, h, q_idx, kv_idx: documents[q_idx] == documents[kv_idx] + 100,
    }


NAMES = tuple(masks(8, 8, 1, 1))


# Tables by document, by key, by head, by ranges of indices, and none; the tile program has every mask.
SHOWN = (
    "documents and causal",
    "by head",
    "valid or near",
    "own reach",
    "sink or window",
    "strided",
    "nothing",
)


@pytest.mark.parametrize(
    ("name", "backend"), part_of(lambda n, b: b == "torch" or n in SHOWN, NAMES, BACKENDS)
)
def test_numbers(name: str, backend: str) -> None:
    """Ragged tiles, two batches, grouped heads, against the dense reference in float64."""
    q_len, kv_len = (150, 203) if backend != "torch" else (290, 601)
    tensors = inputs(q_len, kv_len, batches=2, heads=2)
    agree(masks(q_len, kv_len, 2, 2)[name], backend, tensors)


@pytest.mark.parametrize("backend", BACKENDS)
def test_numbers_of_a_rule_that_needs_the_mask_itself(backend: str) -> None:
    agree(masks(150, 203, 1, 2)["documents and causal"], backend, inputs(150, 203), OnlineRetention())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [False, True])
def test_what_is_skipped_is_not_read(causal: bool, backend: str) -> None:
    """NaN in one document's tensors stays there: a masked tile would make 0 * NaN of it."""
    n = 256  # a multiple of every tile
    documents = torch.arange(3 * n) // n

    def mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        same = documents[q_idx] == documents[kv_idx]
        return same & (kv_idx <= q_idx) if causal else same

    clean = inputs(3 * n, 3 * n)
    poisoned = [x.clone() for x in clean]
    for x in poisoned:
        x[:, :, n : 2 * n] = math.nan
    attention = engine(mask, backend)
    wanted = gradients(lambda q, k, v: attention.reference(q, k, v), *clean)
    for found, exact in zip(gradients(attention, *poisoned), wanted, strict=True):
        for rows in (slice(0, n), slice(2 * n, 3 * n)):
            torch.testing.assert_close(found[:, :, rows], exact[:, :, rows].float(), rtol=2e-4, atol=2e-5)
        assert found[:, :, n : 2 * n].isnan().all()


@pytest.mark.parametrize(
    "name",
    [
        "documents",
        "documents and causal",
        "valid keys",
        "blocks",
        "other documents",
        "sink or window",
        "dilated blocks",
    ],
)
def test_steps_are_counted(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exactly the tiles with a visible pair take a step, and exactly those with a hidden one mask it."""
    n, block_q, block_kv = 1024, 128, 256  # the tiles of the torch backend
    mask = masks(n, n, 1, 1)[name]
    steps: Counter[bool] = Counter()
    run = tile_program._Instance._run

    def counted(self: Any, body: tuple[Stmt, ...]) -> None:
        names = {s.name for s in body if isinstance(s, Let)}
        if "score" in names:
            steps["visible" in names] += 1
        run(self, body)

    monkeypatch.setattr(tile_program._Instance, "_run", counted)
    position = torch.arange(n)
    seen = mask(0, 0, position[:, None], position[None]).expand(n, n)
    tiles = seen.reshape(n // block_q, block_q, n // block_kv, block_kv).transpose(1, 2).flatten(2)
    some, every = tiles.any(-1), tiles.all(-1)
    q, k, v, d_out = inputs(n, n, heads=1)
    attention = engine(mask, "torch")
    gradients(attention, q, k, v, d_out)
    # Of a mask with two conditions, both may hold somewhere in a tile and nowhere together: those are visited.
    assert steps[False] == 2 * int(every.sum())
    extra = steps[True] - 2 * int((some & ~every).sum())
    assert extra == 0 if "and" not in name else 0 <= extra <= 4


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("q_len", "kv_len"), [(1, 70), (70, 1), (5, 0)])
def test_few_rows(q_len: int, kv_len: int, backend: str) -> None:
    documents = torch.randint(0, 2, (70,))
    agree(lambda b, h, q_idx, kv_idx: documents[q_idx] == documents[kv_idx], backend, inputs(q_len, kv_len))


def test_explain_names_the_tensors() -> None:
    documents = torch.arange(70) // 10

    def mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return (documents[q_idx] == documents[kv_idx]) & (kv_idx <= q_idx)

    text = str(engine(mask, "torch").explain())
    assert "kv tiles visited: [0, q_last + 1)" in text
    assert "each of them is tested: what documents holds in the two tiles says" in text

"""Kernels under random masks, against the formula in float64: what is hidden may hold NaN and infinities.

A factor on every score is NaN or infinite wherever the mask hides the pair; keys and values of blocks that no query
sees are NaN where the mask comes as exact block lists. Outputs and gradients must not notice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from attn_engine import AttentionEngine, and_masks, create_block_mask, meta_tensor, or_masks
from attn_engine.codegen.schedule import Edges, Gradients, Schedule
from tests.masks.random_masks import BATCHES, HEADS, LENGTH, dense, random_masks

DIM, BLOCK = 16, 32
SCALE = 1 / math.sqrt(DIM)
META = (meta_tensor(None, None, None, DIM, dtype=torch.float64),) * 3
OPTIONS: dict[str, Any] = {"deadline": None, "suppress_health_check": list(HealthCheck)}
masks = random_masks(150)
lengths = st.one_of(st.integers(1, LENGTH), st.sampled_from([1, 2, 64, 128, LENGTH]))


@pytest.fixture(autouse=True, scope="module")
def small_tiles() -> Iterator[None]:
    """Many tiles in a short length for the evaluated tile program; other backends keep theirs."""
    with pytest.MonkeyPatch.context() as patch:
        small = Schedule(16, 32, 32, 16, Edges.SPLIT, Gradients.ONE_KERNEL)
        patch.setattr("attn_engine.runtime.backends.torch_schedule", lambda: small)
        yield


def poisoned_factor(visible: Tensor) -> Tensor:
    """A finite factor where a pair is visible; NaN, inf, -inf or a huge number where it is hidden."""
    poison = torch.tensor([math.nan, math.inf, -math.inf, 1e300], dtype=torch.float64)
    hidden = poison[torch.randint(0, 4, visible.shape)]
    return torch.where(visible, 1 + torch.rand(visible.shape, dtype=torch.float64), hidden)


def formula(q: Tensor, k: Tensor, v: Tensor, factor: Tensor, visible: Tensor) -> Tensor:
    """softmax over the visible pairs, 0 in a row without one; one kv head for all."""
    scores = q @ k.mT * SCALE * factor.masked_fill(~visible, 0.0)
    dead = ~visible.any(-1, keepdim=True)
    weights = torch.softmax(scores.masked_fill(~visible, -math.inf).masked_fill(dead, 0.0), -1)
    return weights.masked_fill(dead, 0.0) @ v


def unseen(visible: Tensor) -> Tensor:
    """The keys in blocks of BLOCK that no query of any head sees: (B, 1, Skv, 1)."""
    keys = visible.any(dim=(1, 2))
    padded = torch.nn.functional.pad(keys, (0, -keys.shape[1] % BLOCK))
    seen = padded.unflatten(1, (-1, BLOCK)).any(-1).repeat_interleave(BLOCK, 1)[:, : keys.shape[1]]
    return ~seen[:, None, :, None]


def compare(mask_mod: Callable[..., Any], q_len: int, kv_len: int, backend: str, listed: bool) -> None:
    """o, lse and the gradients of one call with fresh inputs."""
    visible = dense(mask_mod, BATCHES, HEADS, q_len, kv_len)
    factor = poisoned_factor(visible)

    def score_mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return score * SCALE * factor[b, h, q_idx, kv_idx]

    run = AttentionEngine(META, score_mod=score_mod, mask_mod=mask_mod, layout="bhsd", backend=backend)
    q = torch.randn(BATCHES, HEADS, q_len, DIM, dtype=torch.float64)
    k, v = torch.randn(2, BATCHES, 1, kv_len, DIM, dtype=torch.float64)
    exact_inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    block_mask = None
    if listed:
        block_mask = create_block_mask(mask_mod, BATCHES, HEADS, q_len, kv_len, "cpu", BLOCK)
        k, v = (x.masked_fill(unseen(visible), math.nan) for x in (k, v))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    o, rows = run(*inputs, block_mask=block_mask, return_final_rowscales=True)
    exact = formula(*exact_inputs, factor, visible)
    torch.testing.assert_close(o, exact, rtol=1e-9, atol=1e-11)
    empty = ~visible.any(-1)
    assert not o[empty].any() and torch.equal(rows["lse"].isneginf(), empty)
    weight = torch.randn_like(o)
    found = torch.autograd.grad(o, inputs, weight)
    for mine, its in zip(found, torch.autograd.grad(exact, exact_inputs, weight), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-9, atol=1e-10)
    assert not found[0][empty].any()


@settings(max_examples=20, **OPTIONS)
@given(masks, lengths, lengths, st.booleans())
def test_tile_program(mask_mod: Callable[..., Any], q_len: int, kv_len: int, listed: bool) -> None:
    """The statements that every backend spells, evaluated."""
    compare(mask_mod, q_len, kv_len, "torch", listed)


@pytest.mark.slow
@settings(max_examples=600, **OPTIONS)
@given(masks, lengths, lengths, st.booleans())
def test_tile_program_at_length(mask_mod: Callable[..., Any], q_len: int, kv_len: int, listed: bool) -> None:
    compare(mask_mod, q_len, kv_len, "torch", listed)


@pytest.mark.slow
@settings(max_examples=80, **OPTIONS)
@given(masks, lengths, lengths, st.booleans())
def test_cpu_at_length(mask_mod: Callable[..., Any], q_len: int, kv_len: int, listed: bool) -> None:
    """Each mask is a kernel of its own to compile."""
    compare(mask_mod, q_len, kv_len, "cpu", listed)


@st.composite
def parts(draw: st.DrawFn) -> tuple[Callable[..., Any], int, int]:
    """One traced mask that reads everything at run time, so that all examples run on the same kernels."""
    q_len, kv_len = draw(lengths), draw(lengths)
    numbers = torch.tensor(draw(st.lists(st.integers(0, 220), min_size=4, max_size=4)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    drawn = torch.randint(0, draw(st.sampled_from([1, 3, 9])), (LENGTH,), generator=generator)
    ids = drawn.sort().values if draw(st.booleans()) else drawn
    offset, chunk = draw(st.integers(-150, 150)), draw(st.integers(1, 90))
    on = torch.tensor(draw(st.lists(st.booleans(), min_size=3, max_size=3)))

    def banded(b: Any, h: Any, q: Any, k: Any) -> Any:
        return (k <= q + offset) & (q + offset - k <= numbers[h])

    def chunked(b: Any, h: Any, q: Any, k: Any) -> Any:
        return (q // chunk == k // chunk) & on[0]

    def documents(b: Any, h: Any, q: Any, k: Any) -> Any:
        return (ids[q] == ids[k]) & (on[1] | (k <= q))

    def prefix(b: Any, h: Any, q: Any, k: Any) -> Any:
        return (k < numbers[2 + b]) & on[2]

    kinds = (
        or_masks(and_masks(banded, documents), prefix),
        and_masks(documents, lambda b, h, q, k: ~chunked(b, h, q, k)),
    )
    return draw(st.sampled_from(kinds)), q_len, kv_len


@settings(max_examples=20, **OPTIONS)
@given(parts(), st.booleans())
def test_cpu(drawn: tuple[Callable[..., Any], int, int], listed: bool) -> None:
    compare(*drawn, "cpu", listed)

"""flex_attention inside torch.compile: numbers and lengths that vary, and what kernel_options may say."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import torch.nn.attention.flex_attention as theirs
from torch import Tensor

import attn_engine
from attn_engine import AttentionEngine, create_block_mask, errors, flex_attention, meta_tensor
from attn_engine.conformance.gold import dense_attention
from attn_engine.flex.kernel_options import IGNORED, chosen_backend
from attn_engine.flex.programs import kernels_made

D = 16


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def test_a_number_and_a_length_that_vary_in_a_graph():
    def attend(x: Tensor, factor: float) -> Tensor:
        half = x.shape[2] // 2
        return flex_attention(x, x, x, lambda s, b, h, i, j: torch.where(j < half, s * factor, s))

    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    for step in range(12):  # torch's limit is 8 graphs
        x, factor = torch.randn(1, 2, 40 + step, D), 1.0 + step / 3
        half = (40 + step) // 2
        want = dense_attention(
            x, x, x, lambda s, b, h, i, j: torch.where(j < half, s * factor, s), None, None
        )[0]
        torch.testing.assert_close(compiled(x, factor), want)
    assert graphs() <= 3


def test_many_lengths_share_their_kernels():
    made = None
    for length in range(40, 60):
        x = torch.randn(1, 2, length, D)
        mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, length, length, "cpu")
        flex_attention(x, x, x, lambda s, b, h, i, j: s * 1.5, mask)
        made = kernels_made() if made is None else made
    assert kernels_made() == made


def test_every_option_of_torch_is_taken_and_says_why_it_is_not_followed():
    options = theirs.FlexKernelOptions.__annotations__
    for key in options:
        plain = key.removeprefix("fwd_").removeprefix("bwd_")
        assert plain == "BACKEND" or len(IGNORED[plain]) > 20
    assert chosen_backend({key: 1 for key in options if key != "BACKEND"}) == "auto"
    assert chosen_backend({"BACKEND": "TRITON"}) == "auto"
    assert chosen_backend({"BACKEND": "reference"}) == "reference"


@pytest.mark.parametrize("name", ["flex_attention", "create_block_mask"])
def test_parameters_are_those_of_torch(name: str):
    ours, wanted = (inspect.signature(getattr(place, name)).parameters for place in (attn_engine, theirs))
    both = [n for n in wanted if n in ours]
    assert [(n, ours[n].kind, ours[n].default) for n in both] == [
        (n, wanted[n].kind, wanted[n].default) for n in both
    ]
    assert set(wanted) - set(ours) <= {"compute_dq_write_order", "dq_kv_order"}  # docs/flex_attention.md
    assert not set(ours) - set(wanted)


def test_a_slope_of_a_missing_index_is_refused_with_the_line():
    x, bias = torch.randn(1, 2, 20, D), torch.randn(20, 100)
    with pytest.raises(errors.VectorTooLong, match=r"test_flex_graphs\.py"):
        flex_attention(x, x, x, lambda s, b, h, i, j: s + bias[i])


def test_second_derivatives_that_are_not_there_say_so():
    x = torch.randn(1, 9, 2, D, requires_grad=True)
    built = AttentionEngine([meta_tensor(None, None, None, D, dtype=torch.float32)] * 3)
    (first,) = torch.autograd.grad(built(x, x, x).sum(), x, create_graph=True)
    with pytest.raises(errors.TransformNotSupported, match=r"engine\.reference"):
        first.sum().backward()


def squared(points: Tensor) -> Any:
    return lambda s, b, h, i, j: s - ((points[i] - points[j]) ** 2).sum(-1)


@pytest.mark.parametrize(
    "make",
    [
        squared,
        lambda points: lambda s, b, h, i, j: s + points[i] @ points[j] - 0.5 * points[j].abs().mean(),
        lambda points: lambda s, b, h, i, j: s + torch.dot(points[i, :], 2 * points[j]) * points[i][1],
    ],
)
def test_short_vectors_and_their_gradients(make: Any):
    q, k, v = (torch.randn(1, 2, 20, D, dtype=torch.float64) for _ in range(3))
    points = torch.randn(20, 3, dtype=torch.float64, requires_grad=True)
    got, want = flex_attention(q, k, v, make(points)), dense_attention(q, k, v, make(points), None, None)[0]
    torch.testing.assert_close(got, want)
    for x, y in zip(*(torch.autograd.grad(o.square().sum(), points) for o in (got, want))):
        torch.testing.assert_close(x, y)

"""Random row functions: output, row values and gradients of the kernels against plain torch, with edges in the mask."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from torch import Tensor

from attn_engine import AttentionEngine, meta_tensor
from tests.drawn_row_functions import made, row_functions
from tests.row_functions import HEADS, dense

Q_LEN, KV_LEN, D, DV = 9, 8, 4, 3
ALIVE = torch.tensor([q not in (0, 2) for q in range(Q_LEN)])

# The sum of two terms keeps 1 / (1 + r0 * r0) inside the ratio of the output, which is inf / 2 before the first key.
A_RATIO_FROM_INFINITY = """def drawn(s):
    r0 = (s * s).min()
    return (s / (1 + r0 * r0)) + (s / (1 + r0 * r0)), {"r0": r0}
"""


def seen(b, h, q_idx, kv_idx):
    """Rows 0 and 2 see nothing, row 1 two keys, later ones not the first tile of keys that others see."""
    return (kv_idx <= q_idx) & ((q_idx < 6) | (kv_idx >= 4)) & (q_idx != 2) & (q_idx >= 1)


def results(o: Tensor, rows: dict[str, Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """o, the row values of rows with keys, and the gradients of a fixed weighting of them."""
    generator = torch.Generator().manual_seed(3)

    def weighted(x: Tensor) -> Tensor:
        weight = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        return (x * weight.to(x.dtype)).sum()

    values = [torch.where(ALIVE, rows[name], 0.0) for name in sorted(rows) if name.startswith("r")]
    loss = torch.stack([weighted(x) for x in (o, *values)]).sum()
    gradients = torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)
    return [o, *values, *gradients]


def compare(text: str, backend: str, dtype: torch.dtype, scale: float, tolerance: float) -> None:
    function, generator = made(text), torch.Generator().manual_seed(1)
    metas = [meta_tensor(None, HEADS, None, d, dtype=dtype) for d in (D, D, DV)]
    engine = AttentionEngine(
        metas, online_func=function, mask_mod=seen, backend=backend, layout="bhsd", scale=scale
    )
    shapes = ((1, HEADS, Q_LEN, D), (1, HEADS, KV_LEN, D), (1, HEADS, KV_LEN, DV))
    qkv = [torch.randn(s, generator=generator, dtype=dtype).requires_grad_() for s in shapes]
    exact = [x.detach().double().requires_grad_() for x in qkv]
    scores = exact[0] @ exact[1].mT * scale
    visible = seen(0, 0, torch.arange(Q_LEN)[:, None], torch.arange(KV_LEN)).expand(scores.shape)
    want_o, want_rows = dense(function, False, scores, exact[2], visible)
    o, rows = engine(*qkv, return_final_rowscales=True)
    assert (o[:, :, ~ALIVE] == 0).all()
    found = results(o, {name: rows[name] for name in want_rows}, qkv)
    for x, y in zip(found, results(want_o, want_rows, exact), strict=True):
        size = 1 + y.abs().max().item()
        torch.testing.assert_close(x.double() / size, y / size, rtol=0, atol=tolerance)


def drawn(count: int) -> settings:
    return settings(
        max_examples=count, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck)
    )


@drawn(1)
@given(row_functions())
@example(A_RATIO_FROM_INFINITY)
def test_on_the_cpu(text: str) -> None:
    compare(text, "cpu", torch.float64, 0.4, 1e-9)


@drawn(3)
@given(row_functions())
@example(A_RATIO_FROM_INFINITY)
def test_in_the_triton_interpreter(text: str) -> None:
    compare(text, "triton-interpreter", torch.float32, 0.4, 1e-3)


@drawn(8)
@given(row_functions())
@example(A_RATIO_FROM_INFINITY)
def test_of_the_reference(text: str) -> None:
    compare(text, "reference", torch.float64, 0.4, 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("scale", [0.4, 1e4])
@drawn(40)
@given(row_functions())
def test_many_on_the_cpu(scale: float, text: str) -> None:
    compare(text, "cpu", torch.float64, scale, 1e-7)

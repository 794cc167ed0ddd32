"""Row functions through the engine, against the same functions in plain torch, row by row; their gradients too."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import Tensor

from attn_engine import AttentionEngine, meta_tensor
from tests.row_functions import CASES, HEADS, Tensors, dense

D, DV = 4, 3
SCALE = 0.4
# The cpu backend runs a few of the types; the reference runs all cases in float64.
BACKENDS = ("reference", "cpu")


def masked(b, h, q_idx, kv_idx):
    """Row 0 sees nothing, row 1 one key; the first tile of keys is hidden from the last rows."""
    return (kv_idx < q_idx) & ((q_idx < 5) | (kv_idx > 3))


def inputs(q_len: int, kv_len: int, dtype: torch.dtype) -> list[Tensor]:
    shapes = ((1, HEADS, q_len, D), (1, HEADS, kv_len, D), (1, HEADS, kv_len, DV))
    return [torch.randn(s, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def engine_of(name: str, tensors: Tensors, dtype: torch.dtype, backend: str) -> AttentionEngine:
    return AttentionEngine(
        [meta_tensor(None, HEADS, None, d, dtype=dtype) for d in (D, D, DV)],
        online_func=CASES[name].make(tensors),
        mask_mod=masked,
        backend=backend,
        layout="bhsd",
        scale=SCALE,
    )


def formula(name: str, tensors: Tensors, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    function = CASES[name].make(tensors)
    visible = masked(0, 0, torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2]))
    scores = q @ k.mT * SCALE
    takes_head = "h" in inspect.signature(function.function).parameters
    return dense(function, takes_head, scores, v, visible.expand(scores.shape))


def loss_of(o: Tensor, rows: dict[str, Tensor], names: tuple[str, ...], alive: Tensor) -> Tensor:
    """A weighting of the output and of the row outputs of rows with keys, the same on both sides."""
    generator = torch.Generator().manual_seed(3)
    total = (o * torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.dtype)).sum()
    for name in names:
        weight = torch.randn(alive.shape, generator=generator, dtype=torch.float64).to(rows[name].dtype)
        total = total + torch.where(alive, rows[name] * weight, 0.0).sum()
    return total


def compare(name: str, backend: str, dtype: torch.dtype, tolerance: float, with_rows: bool) -> None:
    tensors = {n: x.detach().to(dtype).requires_grad_() for n, x in CASES[name].learned().items()}
    names = CASES[name].outputs if with_rows else ()
    qkv = inputs(8, 7, dtype)
    o, rows = engine_of(name, tensors, dtype, backend)(*qkv, return_final_rowscales=True)
    exact = [x.detach().double().requires_grad_() for x in qkv]
    learned = {n: x.detach().double().requires_grad_() for n, x in tensors.items()}
    want, want_rows = formula(name, learned, *exact)
    torch.testing.assert_close(o.double(), want, rtol=tolerance, atol=tolerance)
    assert o.isfinite().all() and (o[:, :, 0] == 0).all()
    for n, x in want_rows.items():
        torch.testing.assert_close(rows[n].double(), x, rtol=tolerance, atol=tolerance)
    alive = torch.ones(rows[names[0]].shape, dtype=torch.bool) if names else torch.ones(())
    if names:
        alive[:, :, 0] = False
    got = torch.autograd.grad(loss_of(o, rows, names, alive), [*qkv, *tensors.values()], allow_unused=True)
    expected = torch.autograd.grad(
        loss_of(want, want_rows, names, alive), [*exact, *learned.values()], allow_unused=True
    )
    for what, x, y, like in zip(
        ("dq", "dk", "dv", *tensors), got, expected, [*qkv, *tensors.values()], strict=True
    ):
        x, y = (torch.zeros_like(like) if g is None else g for g in (x, y))
        torch.testing.assert_close(
            x.double(), y.double(), rtol=tolerance, atol=tolerance, msg=lambda m: f"{what}: {m}"
        )


@pytest.mark.parametrize("name", CASES)
def test_reference_is_the_function(name: str) -> None:
    compare(name, "reference", torch.float64, 1e-9, with_rows=True)

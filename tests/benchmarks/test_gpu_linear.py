"""What the peers of linear attention are called with: stand-ins with fla-core's signatures, and the package's own."""

from __future__ import annotations

import importlib
import inspect
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import gpu_linear, gpu_rows
from benchmarks.gpu_linear import KINDS, LinearCase


def recurrence(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, g: Tensor | None = None, beta: Tensor | None = None
) -> tuple[Tensor, None]:
    """Token by token, as the papers have it: g (B, T, H) or (B, T, H, K), heads behind tokens."""
    left = (
        torch.ones(*q.shape[:3], 1)
        if g is None
        else g.exp().unflatten(-1, (*g.shape[-1:], 1))
        if g.ndim == 3
        else g.exp()
    )
    state, found = torch.zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3]), []
    for t in range(q.shape[1]):
        state = state * left[:, t, :, :, None].float()
        row, key = v[:, t].float(), k[:, t].float()
        if beta is not None:
            row = beta[:, t, :, None].float() * (row - (key[..., None] * state).sum(-2))
        state = state + key[..., None] * row[..., None, :]
        found.append((q[:, t].float()[..., None] * state).sum(-2))
    o = torch.stack(found, 1) * (q.shape[-1] ** -0.5 if scale is None else scale)
    return o.to(v.dtype), None


def chunk_simple_gla(q, k, v, g=None, g_gamma=None, scale=None, initial_state=None, output_final_state=False):
    return recurrence(q, k, v, scale, g_gamma.expand(q.shape[:3]) if g is None else g)


def chunk_gla(q, k, v, g, scale=None, initial_state=None, output_final_state=False):
    return recurrence(q, k, v, scale, g)


def chunk_linear_attn(q, k, v, scale=None, initial_state=None, output_final_state=False, normalize=True):
    assert not normalize
    return recurrence(q, k, v, scale)


def chunk_delta_rule(q, k, v, beta, scale=None, initial_state=None, output_final_state=False):
    return recurrence(q, k, v, scale, beta=beta)


def chunk_gated_delta_rule(q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False):
    return recurrence(q, k, v, scale, g, beta)


def mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size, D=None, z=None):
    """x: v; dt (batch, token, head), A (head,)."""
    return recurrence(C, B, x * dt[..., None].to(x.dtype), 1.0, A * dt)[0]


STAND_INS = SimpleNamespace(
    chunk_simple_gla=chunk_simple_gla,
    chunk_gla=chunk_gla,
    chunk_linear_attn=chunk_linear_attn,
    chunk_delta_rule=chunk_delta_rule,
    chunk_gated_delta_rule=chunk_gated_delta_rule,
    chunk_kda=chunk_gated_delta_rule,
    mamba_chunk_scan_combined=mamba_chunk_scan_combined,
)


@pytest.mark.parametrize("kind", KINDS)
def test_peers_compute_the_same(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A contender that is told something else would be left out: that nobody is says that all agree."""
    monkeypatch.setattr(gpu_linear, "module_named", lambda _: STAND_INS)
    monkeypatch.setattr(gpu_rows, "in_turns", lambda runs, timer: {name: [0.0] for name in runs})
    for direction in ("forward", "backward"):
        seconds, left_out = gpu_linear.measure(LinearCase(kind, direction, 2, 24, 2, 16), "cpu")
        expected = {"ours, torch", "fla"} | ({"mamba_ssm"} if kind == "retention" else set())
        assert set(seconds) == expected, left_out


@pytest.mark.parametrize("kind", KINDS)
def test_arguments_are_those_of_the_package(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("fla.ops", reason="fla-core is not installed", exc_type=ImportError)
    bound: list[Any] = []

    def recorded(name: str) -> Any:
        """The module's functions, which say what they were called with instead of running."""

        class Recorder:
            def __getattr__(self, function: str) -> Any:
                signature = inspect.signature(getattr(importlib.import_module(name), function))

                def run(*args: Any, **options: Any) -> tuple[Tensor, None]:
                    bound.append(signature.bind(*args, **options).arguments)
                    return args[2], None

                return run

        return Recorder()

    monkeypatch.setattr(gpu_linear, "module_named", recorded)
    case = LinearCase(kind, "forward", 1, 8, 2, 16)
    given = gpu_linear.tensors(case, "cpu")
    gpu_linear.fla(case)(**{n: x for n, x in given.items() if n != "d_out"})
    (arguments,) = bound
    assert "kwargs" not in arguments
    assert arguments["scale"] == 0.25
    assert ("beta" in arguments) == ("beta" in given)

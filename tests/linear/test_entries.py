"""Every library entry: its recurrence, chunks of any length, the parallel form and steps are one definition."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from attn_engine import LinearAttentionEngine, meta_tensor
from attn_engine.library import linear
from tests.linear.variants import worst

F32, F64 = torch.float32, torch.float64
B, T, H, D, DV = 2, 45, 3, 8, 6
TOKEN, VECTOR, BY_HEAD = (B, T, H), (B, T, H, D), (1, H)


@dataclass(frozen=True)
class Entry:
    """The arguments of an engine, the shapes of what a call gives beside q, k, v; `of_tokens`: customs (B, H, T)."""

    arguments: dict[str, Any]
    decay: tuple[int, ...] | None = None
    custom: tuple[tuple[int, ...], ...] = ()
    beta: bool = False
    drawn_decay: Any = field(default=lambda x: x)

    def inputs(self) -> dict[str, Tensor]:
        torch.manual_seed(4)
        found = {name: torch.randn(B, T, H, n) for name, n in (("q", D), ("k", D), ("v", DV))}
        if self.decay:
            found["decay"] = self.drawn_decay(torch.randn(self.decay))
        found |= {f"custom{n}": torch.randn(shape) for n, shape in enumerate(self.custom)}
        if self.beta:
            found["beta"] = torch.randn(TOKEN)
        return found

    def results(
        self, function: Any, inputs: dict[str, Tensor], dtype: torch.dtype, **options: Any
    ) -> dict[str, Tensor]:
        """o, the final state and every gradient of a random weighting of both."""
        x = {name: one.detach().to(dtype, copy=True).requires_grad_() for name, one in inputs.items()}
        custom = [one for name, one in x.items() if name.startswith("custom")]
        options |= {"beta": x["beta"]} if self.beta else {}
        o, state = function(
            x["q"], x["k"], x["v"], x.get("decay"), *custom, return_final_state=True, **options
        )
        torch.manual_seed(5)
        loss = sum((y.double() * torch.randn(y.shape, dtype=F64)).sum() for y in (o, state))
        gradients = torch.autograd.grad(loss, list(x.values()), allow_unused=True)
        found = {f"d_{name}": g for name, g in zip(x, gradients, strict=True) if g is not None}
        return {name: y.detach().double() for name, y in (found | {"o": o, "state": state}).items()}

    def engine(self, dtype: torch.dtype, **options: Any) -> LinearAttentionEngine:
        qk, v = (meta_tensor(None, None, None, n, dtype=dtype) for n in (D, DV))
        return LinearAttentionEngine([qk, qk, v], **self.arguments, **options)


def negative(x: Tensor) -> Tensor:
    return -torch.nn.functional.softplus(x)


ENTRIES = {
    "linear_transformer": Entry(linear.linear_transformer()),
    "linear_transformer_relu": Entry(linear.linear_transformer("relu", 1.0)),
    "retnet": Entry(linear.retnet(H, D)),
    "lightning": Entry(linear.lightning(H, 1, 4)),
    "mamba2": Entry(linear.mamba2(), TOKEN, (BY_HEAD,), drawn_decay=torch.nn.functional.softplus),
    "simple_gla": Entry(linear.simple_gla(D), TOKEN),
    "gla": Entry(linear.gla(D), VECTOR),
    "hgrn2": Entry(linear.hgrn2(), VECTOR, drawn_decay=negative),
    "rwkv6": Entry(linear.rwkv6(), VECTOR, ((H, D),)),
    "rwkv7": Entry(linear.rwkv7(), VECTOR, ((B, H, T, D),), drawn_decay=negative),
    "delta_net": Entry(linear.delta_net(D), beta=True),
    "delta_net_negative": Entry(linear.delta_net(D, allow_negative_eigenvalues=True), beta=True),
    "gated_delta_net": Entry(linear.gated_delta_net(D), TOKEN, (BY_HEAD, BY_HEAD), beta=True),
    "kimi_delta": Entry(linear.kimi_delta(D), VECTOR, beta=True, drawn_decay=negative),
    "mlstm": Entry(linear.mlstm(D), TOKEN, ((B, H, T), (B, H, T)), drawn_decay=negative),
}
SHOWN = ["gated_delta_net", "hgrn2", "mlstm"]


def inputs_of(name: str) -> dict[str, Tensor]:
    """mLSTM's gates belong together, and its decay, -1 at most, keeps the eraser of RWKV-7 short."""
    inputs = ENTRIES[name].inputs()
    if name == "mlstm":
        gates = linear.mlstm_gates(*torch.randn(2, B, T, H))
        inputs |= dict(zip(("decay", "custom0", "custom1"), gates, strict=True))
    if name == "rwkv7":
        inputs["custom0"] = torch.nn.functional.normalize(inputs["custom0"], dim=-1)
        inputs["k"] = torch.nn.functional.normalize(inputs["k"], dim=-1)
    if name == "mamba2":
        inputs["custom0"] = negative(inputs["custom0"])
    return inputs


def test_no_entry_is_left_out():
    functions = {name for name in linear.__all__ if not name.endswith(("_gates", "_rows"))}
    assert functions <= set(ENTRIES)


@pytest.mark.parametrize("name", ENTRIES)
def test_every_form_is_the_recurrence(name: str):
    entry, inputs = ENTRIES[name], inputs_of(name)
    engine = entry.engine(F64, backend="torch", chunk=16)
    wanted = entry.results(engine.reference, inputs, F64)
    assert all(torch.isfinite(x).all() and x.abs().max() > 0 for x in wanted.values())
    for found in (
        entry.results(engine, inputs, F64),
        entry.results(entry.engine(F64, backend="torch", chunk=32), inputs, F64),
        entry.results(engine.reference, inputs, F64, form="parallel"),
    ):
        assert not any(
            found[name].any() for name in found.keys() - wanted.keys()
        )  # of an input that is not used
        assert worst(found, wanted) < 1e-9


def one_token(entry: Entry, x: Tensor, name: str, t: int) -> Tensor:
    """What a step takes of an input of a call."""
    if name.startswith("custom"):
        return x[:, :, t : t + 1] if x.shape[:3] == (B, H, T) else x
    return x[:, t]


@pytest.mark.parametrize(
    "name", [n if n in SHOWN else pytest.param(n, marks=pytest.mark.slow) for n in ENTRIES]
)
def test_kernels_and_steps_are_the_recurrence(name: str):
    entry, inputs = ENTRIES[name], inputs_of(name)
    engine = entry.engine(F32, backend="cpu")
    wanted = entry.results(entry.engine(F64).reference, inputs, F64)
    assert worst(entry.results(engine, inputs, F32), wanted) < 1e-5
    state, rows = torch.zeros(B, H, D, engine.state_columns), []
    for t in range(T):
        at = {key: one_token(entry, x, key, t) for key, x in inputs.items()}
        custom = [x for key, x in at.items() if key.startswith("custom")]
        beta = {"beta": at["beta"]} if entry.beta else {}
        o, state = engine.step(at["q"], at["k"], at["v"], at.get("decay"), state, *custom, t=t, **beta)
        rows.append(o)
    found = {"o": torch.stack(rows, 1).double(), "state": state.double()}
    assert worst(found, {key: wanted[key] for key in found}) < 1e-5

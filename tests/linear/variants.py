"""Linear attentions of every kind, with their inputs: what the tests of this folder share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attn_engine import CustomIO, LinearAttentionEngine, meta_tensor

CUSTOM = CustomIO({"u": ("heads", "dimqk"), "s": ("batch", "heads", "seq_len"), "a": (1, "heads")})


@dataclass(frozen=True)
class Variant:
    """One kind. groups: how many heads of v share a head of q, and of k. strong: the size of the decays."""

    rank: str = "none"
    delta: bool = False
    exclusive: bool = False
    normalized: bool = False
    reverse: bool = False
    packed: bool = False
    groups: tuple[int, int] = (1, 1)
    strong: float = 1.0
    tokens: int = 41
    dims: tuple[int, int] = (8, 5)

    def __str__(self) -> str:
        flags = ("delta", "exclusive", "normalized", "reverse", "packed")
        return "-".join([self.rank, *(f for f in flags if getattr(self, f))])

    def engine(self, dtype: torch.dtype, **options: Any) -> LinearAttentionEngine:
        """Every mod reads something, and `s` is read by two of them."""
        mods: dict[str, Any] = {}
        if self.exclusive:
            mods["bonus_mod"] = lambda k, c, b, h, t: c.input_tensors["u"] * k
        if self.normalized:
            mods["normalizer_mod"] = lambda w: torch.abs(w) + 1.0
        if self.delta:
            mods["beta_mod"] = lambda beta: torch.sigmoid(beta)
        if self.rank != "none":
            mods["decay_mod"] = lambda g, c: (
                -torch.nn.functional.softplus(g) * torch.exp(c.input_tensors["a"])
            )
        qk, v = (meta_tensor(None, None, None, n, dtype=dtype) for n in self.dims)
        return LinearAttentionEngine(
            [qk, qk, v],
            q_mod=lambda q: q * 0.5 + torch.tanh(q),
            k_mod=lambda k, c: k * torch.rsqrt((k * k).sum(-1) + 1e-6) * (1.0 + c.input_tensors["s"] * 0.1),
            v_mod=lambda v, c: v * c.input_tensors["s"],
            custom_io=CUSTOM,
            phase="exclusive" if self.exclusive else "inclusive",
            reverse=self.reverse,
            scale=0.3,
            **mods,
            **options,
        )

    def inputs(self, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
        """Leaves by name; "bounds" is not one."""
        torch.manual_seed(seed)
        batch, heads, t, (k, v) = 1 if self.packed else 2, 4, self.tokens, self.dims
        found = {
            "q": torch.randn(batch, t, heads // self.groups[0], k),
            "k": torch.randn(batch, t, heads // self.groups[1], k),
            "v": torch.randn(batch, t, heads, v),
            "u": torch.randn(heads, k),
            "s": torch.randn(batch, heads, t),
            "a": torch.randn(1, heads),
            "state": torch.randn(3 if self.packed else batch, heads, k, v + self.normalized),
        }
        if self.delta:
            found["beta"] = torch.randn(batch, t, heads)
        shapes = {"head": (heads,), "token": (batch, t, heads), "vector": (batch, t, heads, k)}
        if self.rank != "none":
            found["decay"] = torch.randn(shapes[self.rank]) * self.strong
        return {name: x.to(dtype).requires_grad_() for name, x in found.items()}

    def call(self, function: Any, x: dict[str, Tensor], **options: Any) -> tuple[Tensor, Tensor]:
        """o and the final state of the engine or of its reference."""
        options |= {"beta": x["beta"]} if self.delta else {}
        if self.packed:
            options["cu_seqlens"] = torch.tensor([0, 7, 7, self.tokens])
        rows = x["q"], x["k"], x["v"], x.get("decay")
        custom = x["u"], x["s"], x["a"]
        return function(*rows, *custom, initial_state=x["state"], return_final_state=True, **options)

    def results(self, function: Any, x: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
        """o, the final state, and the gradients of a random weighting of both, in float64."""
        o, state = self.call(function, x, **options)
        torch.manual_seed(9)
        loss = (o.double() * torch.randn(o.shape, dtype=torch.float64)).sum()
        loss = loss + (state.double() * torch.randn(state.shape, dtype=torch.float64)).sum()
        found = torch.autograd.grad(loss, list(x.values()), allow_unused=True)
        gradients = {f"d_{n}": g for n, g in zip(x, found, strict=True) if g is not None}
        return {"o": o.double(), "state": state.double(), **{n: g.double() for n, g in gradients.items()}}


def worst(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """The largest error beside the largest number of its tensor. A gradient that is missing must be zero."""
    errors = [0.0]
    for name, want in wanted.items():
        have = found.get(name, torch.zeros_like(want))
        assert torch.isfinite(have).all(), name
        errors.append(float((have - want).detach().abs().max() / (want.detach().abs().max() + 1e-30)))
    return max(errors)


EVERY = [
    Variant(rank, delta, exclusive, normalized)
    for rank in ("none", "head", "token", "vector")
    for delta in (False, True)
    for exclusive in (False, True)
    for normalized in (False, True)
    if not (delta and normalized)
] + [
    Variant("token", delta=True, exclusive=True, reverse=True, packed=True, groups=(2, 4)),
    Variant("vector", delta=True, reverse=True, packed=True, groups=(4, 2)),
    Variant("vector", normalized=True, reverse=True, groups=(4, 2)),
    Variant("vector", delta=True, exclusive=True, groups=(4, 2), strong=30.0),
]

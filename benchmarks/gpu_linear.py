"""Speed of linear attention's Triton kernels on this machine's GPU, beside flash-linear-attention and mamba_ssm.

    python -m benchmarks.gpu_linear                     every case (minutes)
    python -m benchmarks.gpu_linear --only 'gla.*8192'
    python -m benchmarks.gpu_linear --list

Peers that are not installed, or do not take a case, are left out and say why. Goals: at least 1.1 times as fast as
fla's chunk_simple_gla, chunk_retention and chunk_gla at B=1, T=8192, H=96, D=128, forward and backward.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attn_engine import LinearAttentionEngine, meta_tensor
from benchmarks.gpu_contenders import Cannot, module_named
from benchmarks.gpu_rows import Measured, command, measured

# (batches, length, heads, dim), the goals' shape first.
SHAPES = ((1, 8192, 96, 128), (2, 16384, 16, 128), (4, 2048, 16, 128), (4, 4096, 64, 128), (8, 4096, 32, 64))
# What our engine is told.
KINDS: Mapping[str, dict[str, Any]] = {
    "simple gla": {"decay_rank": "token"},
    "retention": {"decay_rank": "head"},
    "gla": {"decay_rank": "vector"},
    "linear": {"decay_rank": "none"},
    "delta rule": {"decay_rank": "none", "beta_mod": lambda b: b},
    "gated delta rule": {"decay_rank": "token", "beta_mod": lambda b: b},
    "kda": {"decay_rank": "vector", "beta_mod": lambda b: b},
}
Function = Callable[..., Tensor]


@dataclass(frozen=True, slots=True)
class LinearCase:
    """One linear attention in one size and direction."""

    kind: str
    direction: str
    batches: int
    length: int
    heads: int
    dim: int

    def __str__(self) -> str:
        sizes = f"B={self.batches} T={self.length} H={self.heads} D={self.dim}"
        return f"{self.kind} {sizes} {self.direction}"


def table() -> Iterator[LinearCase]:
    for shape in SHAPES:
        for kind in KINDS:
            for direction in ("forward", "backward"):
                yield LinearCase(kind, direction, *shape)


def tensors(case: LinearCase, device: str) -> dict[str, Tensor]:
    """q, k, v and the output's gradient (batch, token, head, dim) in bfloat16; decay and beta in float32."""
    generator = torch.Generator(device).manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, generator=generator)

    rows = (case.batches, case.length, case.heads, case.dim)
    found = {name: drawn(*rows) for name in ("q", "k", "v", "d_out")}
    found["k"] = torch.nn.functional.normalize(found["k"], dim=-1)
    found = {name: x.to(torch.bfloat16) for name, x in found.items()}
    decay = {
        "token": lambda: torch.nn.functional.logsigmoid(drawn(*rows[:3])),
        "vector": lambda: torch.nn.functional.logsigmoid(drawn(*rows)) / 16,
        "head": lambda: torch.log1p(-(2.0 ** -(5.0 + torch.arange(case.heads, device=device) % 16))),
    }.get(KINDS[case.kind]["decay_rank"])
    if decay is not None:
        found["decay"] = decay()
    if "beta_mod" in KINDS[case.kind]:
        found["beta"] = torch.sigmoid(drawn(*rows[:3]))
    return found


def ours(backend: str) -> Callable[[LinearCase], Function]:
    def make(case: LinearCase) -> Function:
        meta = meta_tensor(None, None, None, case.dim, dtype=torch.bfloat16)
        engine = LinearAttentionEngine([meta] * 3, scale=case.dim**-0.5, backend=backend, **KINDS[case.kind])

        def run(
            q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None = None, beta: Tensor | None = None
        ) -> Tensor:
            return engine(q, k, v, decay) if beta is None else engine(q, k, v, decay, beta=beta)

        return run

    return make


def fla(case: LinearCase) -> Function:
    """flash-linear-attention's chunked kernel of the same attention."""
    module, name, gate = {
        "simple gla": ("simple_gla", "chunk_simple_gla", "g"),
        "retention": ("simple_gla", "chunk_simple_gla", "g_gamma"),  # what chunk_retention calls
        "gla": ("gla", "chunk_gla", "g"),
        "linear": ("linear_attn", "chunk_linear_attn", ""),
        "delta rule": ("delta_rule", "chunk_delta_rule", ""),
        "gated delta rule": ("gated_delta_rule", "chunk_gated_delta_rule", "g"),
        "kda": ("kda", "chunk_kda", "g"),
    }[case.kind]
    function = getattr(module_named(f"fla.ops.{module}"), name)
    options: dict[str, Any] = {"normalize": False} if case.kind == "linear" else {}

    def run(
        q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None = None, beta: Tensor | None = None
    ) -> Tensor:
        given: dict[str, Any] = dict(options)
        if gate and decay is not None:
            given[gate] = decay
        if beta is not None:
            given["beta"] = beta.to(q.dtype)
        return function(q, k, v, scale=case.dim**-0.5, **given)[0]

    return run


def mamba(case: LinearCase) -> Function:
    """mamba_ssm's scan over chunks: C, B, x are our q, k, v, and dt is 1 with A_h dt our decay; one for each head."""
    if case.kind != "retention":
        raise Cannot("a decay of each head alone, where dt is 1")
    scan = module_named("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined

    def run(
        q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None = None, beta: Tensor | None = None
    ) -> Tensor:
        dt = torch.ones(q.shape[:3], device=q.device)
        return scan(v, dt, decay, k, q * case.dim**-0.5, chunk_size=256)

    return run


CONTENDERS: Mapping[str, Callable[[LinearCase], Function]] = {
    "ours, triton": ours("triton"),
    "ours, torch": ours("torch"),
    "fla": fla,
    "mamba_ssm": mamba,
}


def run_of(function: Function, case: LinearCase, given: Mapping[str, Tensor]) -> Callable[[], Any]:
    """One call in the case's direction; backward is the gradient alone, on a graph that is kept."""
    x = {name: t for name, t in given.items() if name != "d_out"}
    if case.direction == "forward":

        def forward() -> Tensor:
            with torch.no_grad():
                return function(**x)

        return forward
    learned = [name for name in x if not (name == "decay" and case.kind == "retention")]
    leaves = {name: t.detach().requires_grad_(name in learned) for name, t in x.items()}
    out = function(**leaves)
    wrt = [leaves[name] for name in learned]
    return lambda: torch.autograd.grad(out, wrt, given["d_out"].to(out.dtype), retain_graph=True)[0]


def measure(case: LinearCase, device: str) -> Measured:
    """Quartiles of the seconds of a call, by contender, and why others have none."""
    given = tensors(case, device)

    def maker(make: Callable[[LinearCase], Function]) -> Callable[[], Callable[[], Tensor]]:
        return lambda: run_of(make(case), case, given)

    return measured({name: maker(make) for name, make in CONTENDERS.items()}, device)


if __name__ == "__main__":
    sys.exit(command("gpu_linear", table(), measure))

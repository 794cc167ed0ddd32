"""Linear attentions: their kernels tried on the GPU, and compiled ahead of time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attn_engine import LinearAttentionEngine, meta_tensor
from attn_engine.codegen.chunk_schedule import chunk_schedule
from attn_engine.codegen.targets import target_named
from attn_engine.gpu_check.ahead import KernelsAhead
from attn_engine.gpu_check.checks import Failed, Place
from attn_engine.gpu_check.jobs import Comparison
from attn_engine.runtime.aot_report import TARGETS, AotReport
from attn_engine.runtime.linear_tilelang import TileLangChunks
from attn_engine.runtime.linear_triton import TritonChunks
from attn_engine.runtime.linear_triton_aot import compile_phases_ahead
from attn_engine.runtime.tilelang_aot import cubin_of, find_nvcc, lower_tilelang

# What 16-bit kernels may differ from float64 by, as a part of each tensor's size; float32 ones.
MOST_DIFFERENCE = {torch.bfloat16: 0.02, torch.float16: 0.01, torch.float32: 1e-5}


def _gate(g: Any) -> Any:
    return torch.nn.functional.logsigmoid(g)


def _strength(b: Any) -> Any:
    return torch.sigmoid(b)


# What the engine is told; a beta is given where there is a beta_mod.
KINDS: dict[str, dict[str, Any]] = {
    "no decay": {"decay_rank": "none"},
    "a decay for each head": {"decay_rank": "head"},
    "a decay for each token": {"decay_rank": "token", "decay_mod": _gate},
    "a decay for each dimension": {"decay_rank": "vector", "decay_mod": _gate},
    "delta rule": {"decay_rank": "none", "beta_mod": _strength},
    "gated delta rule": {"decay_rank": "token", "decay_mod": _gate, "beta_mod": _strength},
    "delta rule, a decay for each dimension": {
        "decay_rank": "vector",
        "decay_mod": _gate,
        "beta_mod": _strength,
    },
}
TILELANG_TARGET = "sm_90"
WANTED = ("q", "k", "v", "decay", "beta")


def inputs_of(
    kind: str, tokens: int, heads: int, dim: int, dtype: torch.dtype, device: str, batches: int = 2
) -> dict[str, Tensor]:
    """A call's tensors by name; keys have length 1. q, k, v: (batch, token, head, dim)."""
    generator = torch.Generator(device).manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    k = torch.nn.functional.normalize(drawn(batches, tokens, heads, dim), dim=-1)
    rows = {"q": drawn(batches, tokens, heads, dim), "k": k, "v": drawn(batches, tokens, heads, dim)}
    found = {name: x.to(dtype) for name, x in rows.items()}
    shapes = {"head": (heads,), "token": (batches, tokens, heads), "vector": (batches, tokens, heads, dim)}
    rank = KINDS[kind]["decay_rank"]
    if rank != "none":
        found["decay"] = -drawn(heads).abs() if rank == "head" else drawn(*shapes[rank])
    if "beta_mod" in KINDS[kind]:
        found["beta"] = drawn(batches, tokens, heads)
    return found


def engine_of(kind: str, dim: int, dtype: torch.dtype, backend: str) -> LinearAttentionEngine:
    meta = meta_tensor(None, None, None, dim, dtype=dtype)
    return LinearAttentionEngine([meta] * 3, scale=dim**-0.5, backend=backend, **KINDS[kind])


def call(function: Callable[..., Any], x: dict[str, Tensor]) -> Tensor:
    beta = {"beta": x["beta"]} if "beta" in x else {}
    return function(x["q"], x["k"], x["v"], x.get("decay"), **beta)


@dataclass(frozen=True, slots=True)
class LinearCheck(Comparison):
    """Numbers of one linear attention, outputs and gradients, against float64."""

    kind: str
    dim: int
    dtype: str
    place: Place
    heavy: bool = False

    @property
    def name(self) -> str:
        return f"linear attention: {self.kind}, D={self.dim} {self.dtype}"

    def compare(self) -> str:
        dtype, small = getattr(torch, self.dtype), self.place.small
        dim, tokens = (16, 37) if small else (self.dim, 1000)
        x = inputs_of(self.kind, tokens, 1 if small else 8, dim, dtype, self.place.device, 1 if small else 2)
        given = {n: t.requires_grad_() for n, t in x.items()}
        exact = {n: t.detach().double().requires_grad_() for n, t in x.items()}
        found = _results(engine_of(self.kind, dim, dtype, self.place.backend), given)
        reference = engine_of(self.kind, dim, torch.float64, "reference")

        def chunks(*rows: Any, **more: Any) -> Any:
            return reference.reference(*rows, form="chunk", **more)

        wanted = _results(chunks, exact)
        worst = 0.0
        for name, want in wanted.items():
            off = float((found[name].double() - want).norm() / (want.norm() + 1e-30))
            if not off <= MOST_DIFFERENCE[dtype]:
                raise Failed(f"{name} differs from float64 by {off:.1e} of its size")
            worst = max(worst, off)
        return f"at most {worst:.1e} of a tensor's size"


def _results(function: Callable[..., Any], x: dict[str, Tensor]) -> dict[str, Tensor]:
    o = call(function, x)
    weights = torch.randn(o.shape, generator=torch.Generator().manual_seed(1)).to(o.device)
    found = torch.autograd.grad(o, list(x.values()), weights.to(o.dtype))
    return {"o": o.detach(), **{f"d_{n}": g for n, g in zip(x, found, strict=True)}}


@dataclass(frozen=True, slots=True)
class LinearAhead(KernelsAhead):
    """Every kernel of a linear attention in bfloat16, compiled for a target with its default schedule."""

    kind: str
    dim: int
    target: str
    backend: str = "triton"
    heavy: bool = False

    @property
    def name(self) -> str:
        return f"linear attention: {self.kind}, D={self.dim}"

    def reports(self) -> Iterator[tuple[str, AotReport]]:
        for direction in ("forward", "backward"):
            for report in self.reports_of(direction):
                yield f"{direction}: {report.kernel}", report

    def reports_of(self, direction: str) -> tuple[AotReport, ...]:
        """What the compiler says of the kernels of "forward" or "backward"."""
        engine = engine_of(self.kind, self.dim, torch.bfloat16, "reference")
        call(engine, inputs_of(self.kind, 1, 1, self.dim, torch.bfloat16, "cpu", 1))
        program = engine.program
        if self.backend == "tilelang":
            return _with_tilelang(TileLangChunks(program, None), direction, self.target)
        machine = TritonChunks(program, None, False, chunk_schedule(program, target_named(self.target), None))
        phases, options = machine.phases(direction, WANTED)
        return compile_phases_ahead(machine.source(direction, WANTED), phases, options, self.target)


def _with_tilelang(machine: TileLangChunks, direction: str, target: str) -> tuple[AotReport, ...]:
    source, (phases, _) = machine.source(direction, WANTED), machine.phases(direction, WANTED)
    return tuple(cubin_of(lower_tilelang(source, phase.name, target)) for phase in phases)


def checks(backend: str, device: str, small: bool) -> list[LinearCheck]:
    """TileLang has kernels of 16-bit inputs on a GPU, and of float32 on its CPU target."""
    place = Place(backend, device, small)
    if backend == "tilelang-cpu":
        return [LinearCheck(kind, 64, "float32", place) for kind in KINDS]
    found = [LinearCheck(kind, 128 if i % 2 else 64, "bfloat16", place) for i, kind in enumerate(KINDS)]
    if backend == "tilelang":
        return found
    return [*found, LinearCheck("a decay for each dimension", 64, "float32", place)]


def ahead_jobs(compilers: Sequence[str], targets: tuple[str, ...] = TARGETS) -> list[LinearAhead]:
    """TileLang takes minutes to compile the larger ones, and is tried for one target."""
    found: list[LinearAhead] = []
    if "triton" in compilers:
        found += [LinearAhead(kind, dim, t) for kind in KINDS for dim in (64, 128) for t in targets]
    if "tilelang" in compilers and TILELANG_TARGET in targets and find_nvcc() is not None:
        found += [LinearAhead(kind, 64, TILELANG_TARGET, "tilelang", heavy=True) for kind in KINDS]
    return found

"""Attention over chosen tokens: token lists and native sparse attention, forward and backward, against float64.

What chose the tokens is tried elsewhere (selection.py): the formulas are given what a call attended to.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from attn_engine import AttentionEngine, meta_tensor
from attn_engine.codegen.gpu_schedule import default_schedule
from attn_engine.codegen.pipeline import lower
from attn_engine.codegen.targets import target_named
from attn_engine.gpu_check.ahead import KernelsAhead, compiled
from attn_engine.gpu_check.checks import Failed, Place
from attn_engine.gpu_check.jobs import Comparison
from attn_engine.gpu_check.linear import MOST_DIFFERENCE
from attn_engine.ir.passes.token_lists import over_token_lists
from attn_engine.library import native_sparse_attention, sparse_attention
from attn_engine.runtime.aot_report import TARGETS, AotReport


@dataclass(frozen=True, slots=True)
class Tokens:
    """A call over lists: values are the first columns of the keys, or tensors of their own where dims are equal.

    ragged: lists of different lengths, one of them empty, and entries that count for nothing.
    """

    name: str
    heads: int
    kv_heads: int
    dims: tuple[int, int]
    rows: int
    keys: int
    topk: int
    ragged: bool

    @property
    def shared(self) -> bool:
        return self.dims[0] != self.dims[1]

    def small(self) -> Tokens:
        """For an interpreter."""
        dims = (48, 32) if self.shared else (16, 16)
        group = min(self.heads // self.kv_heads, 3)
        return replace(self, heads=group, kv_heads=1, dims=dims, rows=3, keys=40, topk=8)


TOKENS = (
    Tokens("latent 576/512, 64 heads", 64, 1, (576, 512), 192, 4096, 512, False),
    Tokens("latent 576/512, 16 heads, ragged", 16, 1, (576, 512), 100, 3000, 300, True),
    Tokens("heads of 128, 16:2, ragged", 16, 2, (128, 128), 200, 2000, 256, True),
)


class _Differences(Comparison):
    """Each tensor differs from that in float64 by no more than a part of its size."""

    __slots__ = ()

    def results(self, dtype: torch.dtype) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        """What was found and what is wanted."""
        raise NotImplementedError

    def compare(self) -> str:
        dtype = torch.float32 if self.place.small else torch.bfloat16
        worst = 0.0
        found, wanted = self.results(dtype)
        for name, want in wanted.items():
            hidden = torch.isinf(want)
            if not torch.equal(torch.isinf(found[name]), hidden):
                raise Failed(f"{name} is infinite elsewhere than in float64")
            x, y = (t.double().masked_fill(hidden, 0.0) for t in (found[name], want))
            off = float((x - y).norm() / (y.norm() + 1e-30))
            if not off <= MOST_DIFFERENCE[dtype]:
                raise Failed(f"{name} differs from float64 by {off:.1e} of its size")
            worst = max(worst, off)
        return f"at most {worst:.1e} of a tensor's size"


def _drawn(dtype: torch.dtype, device: str, *shapes: tuple[int, ...]) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(5)
    return tuple(torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)


def _with_gradients(o: Tensor, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    weights = torch.randn(o.shape, generator=torch.Generator().manual_seed(1)).to(o.device, o.dtype)
    gradients = torch.autograd.grad(o, list(inputs.values()), weights)
    return {"o": o.detach(), **{f"d_{n}": g for n, g in zip(inputs, gradients, strict=True)}}


@dataclass(frozen=True, slots=True)
class TokensCheck(_Differences):
    """Output, lse and gradients of `sparse_attention`."""

    kind: Tokens
    place: Place
    heavy: bool = False

    @property
    def name(self) -> str:
        return f"token lists: {self.kind.name}"

    def results(self, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        kind, device = self.kind.small() if self.place.small else self.kind, self.place.device
        shapes = [(2, kind.rows, kind.heads, kind.dims[0]), (2, kind.keys, kind.kv_heads, kind.dims[0])]
        shapes += [] if kind.shared else [(2, kind.keys, kind.kv_heads, kind.dims[1])]
        given = dict(zip("qkv", _drawn(dtype, device, *shapes), strict=False))
        indices = _lists(kind).to(device)
        inputs, exact = _leaves(given, dtype), _leaves(given, torch.float64)
        o, lse = sparse_attention(
            inputs["q"], inputs["k"], indices, inputs.get("v"), dim_v=kind.dims[1] if kind.shared else None,
            return_lse=True, backend=self.place.backend,
        )  # fmt: skip
        wanted, wanted_lse = _over_lists(kind, exact, indices)
        return {**_with_gradients(o, inputs), "lse": lse.detach()}, {
            **_with_gradients(wanted, exact),
            "lse": wanted_lse.detach(),
        }


def _leaves(given: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {n: x.detach().to(dtype).requires_grad_() for n, x in given.items()}


def _lists(kind: Tokens) -> Tensor:
    """Different tokens for each query, in no order."""
    generator = torch.Generator().manual_seed(6)
    order = torch.rand(2, kind.rows, kind.kv_heads, kind.keys, generator=generator).argsort(-1)
    indices = order[..., : kind.topk].to(torch.int32)
    if kind.ragged:
        indices[torch.rand(indices.shape, generator=generator) < 0.3] = -1
        indices[0, 0] = -1
        indices[1, 0, :, 1] = kind.keys + 5
    return indices


def _over_lists(kind: Tokens, x: Mapping[str, Tensor], indices: Tensor) -> tuple[Tensor, Tensor]:
    """o (B, S, H, Dv) and lse (B, H, S) by the formula."""
    group, there = kind.heads // kind.kv_heads, (indices >= 0) & (indices < kind.keys)
    place = torch.where(there, indices, 0).long().movedim(2, 1)  # (B, Hkv, S, topk)
    b, h = (torch.arange(n, device=place.device).view(-1, *[1] * d) for n, d in ((2, 3), (kind.kv_heads, 2)))
    keys = x["k"].movedim(2, 1)[b, h, place]
    values = x["v"].movedim(2, 1)[b, h, place] if "v" in x else keys[..., : kind.dims[1]]
    q = x["q"].unflatten(2, (kind.kv_heads, group))
    score = torch.einsum("bshgd,bhsud->bhgsu", q, keys) * kind.dims[0] ** -0.5
    visible = there.movedim(2, 1)[:, :, None]
    some = visible.any(-1, keepdim=True)
    score = score.masked_fill(~visible, -torch.inf).masked_fill(~some, 0.0)
    weights = score.softmax(-1) * (visible & some)
    lse = score.logsumexp(-1).masked_fill(~some[..., 0], -torch.inf)
    o = torch.einsum("bhgsu,bhsud->bshgd", weights, values)
    return o.flatten(2, 3), lse.flatten(1, 2)


@dataclass(frozen=True, slots=True)
class Native:
    """Sizes of native sparse attention, by their names in the paper."""

    name: str
    heads: int
    kv_heads: int
    dim: int
    tokens: int
    compressed: int
    stride: int
    selected: int
    count: int
    window: int

    def small(self) -> Native:
        """For an interpreter."""
        heads = min(self.heads // self.kv_heads, 2)
        return Native(self.name, heads, 1, 16, 37, 8, 4, 8, 3, 10)


NATIVE = (
    Native("16:1 heads of 64, l 32, d 16, l' 64, n 8, w 256", 16, 1, 64, 1100, 32, 16, 64, 8, 256),
    Native("12:4 heads of 128, l 32, d 32, l' 32, n 8, w 100", 12, 4, 128, 1000, 32, 32, 32, 8, 100),
)


@dataclass(frozen=True, slots=True)
class NativeCheck(_Differences):
    """Output and gradients of `native_sparse_attention` over the blocks that it selected."""

    kind: Native
    place: Place
    heavy: bool = False

    @property
    def name(self) -> str:
        return f"native sparse attention: {self.kind.name}"

    def results(self, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        n, device = self.kind.small() if self.place.small else self.kind, self.place.device
        of_q, of_k = (2, n.tokens, n.heads, n.dim), (2, n.tokens, n.kv_heads, n.dim)
        names = ("q", "k", "v", "g_cmp", "g_slc", "g_win")
        given: dict[str, Tensor] = dict(
            zip(names, _drawn(dtype, device, of_q, of_k, of_k, *[of_q[:3]] * 3), strict=True)
        )
        given |= {name: x.sigmoid() for name, x in given.items() if name.startswith("g_")}
        inputs, exact = _leaves(given, dtype), _leaves(given, torch.float64)
        attend: Any = native_sparse_attention
        o, blocks = attend(
            **inputs, compression_block=n.compressed, compression_stride=n.stride, selection_block=n.selected,
            selected_blocks=n.count, window=n.window, return_block_indices=True, backend=self.place.backend,
        )  # fmt: skip
        return _with_gradients(o, inputs), _with_gradients(_native(n, exact, blocks), exact)


def _native(n: Native, x: Mapping[str, Tensor], blocks: Tensor) -> Tensor:
    """The three branches with masks of all pairs, and the mean for phi."""
    t = torch.arange(n.tokens, device=blocks.device)
    count = max(0, (n.tokens - n.compressed) // n.stride + 1)
    k_cmp, v_cmp = (
        x[name].unfold(1, n.compressed, n.stride)[:, :count].mean(-1) for name in ("k", "v")
    )  # (B, blocks, H, D)
    last = torch.arange(count, device=t.device) * n.stride + n.compressed - 1
    chosen = (blocks[..., None] == t // n.selected).any(-2).movedim(2, 1)  # (B, Hkv, TQ, T)
    past = t <= t[:, None]
    branches = (
        (k_cmp, v_cmp, (last <= t[:, None])[None, None], x["g_cmp"]),
        (x["k"], x["v"], chosen & past, x["g_slc"]),
        (x["k"], x["v"], (past & (t > t[:, None] - n.window))[None, None], x["g_win"]),
    )
    return sum((_branch(n, x["q"], *b) for b in branches), torch.zeros_like(x["q"]))


def _branch(n: Native, q: Tensor, k: Tensor, v: Tensor, visible: Tensor, gate: Tensor) -> Tensor:
    q = q.unflatten(2, (n.kv_heads, -1))
    score = torch.einsum("bthgd,buhd->bhgtu", q, k) * n.dim**-0.5
    visible = visible[:, :, None]
    some = visible.any(-1, keepdim=True)
    score = score.masked_fill(~visible, -torch.inf).masked_fill(~some, 0.0)
    weights = score.softmax(-1) * (visible & some)
    return torch.einsum("bhgtu,buhd->bthgd", weights, v).flatten(2, 3) * gate[..., None]


@dataclass(frozen=True, slots=True)
class TokensAhead(KernelsAhead):
    """The kernels of calls over lists in bfloat16: forward and backward passes on gathered keys."""

    kind: Tokens
    target: str
    backend: str = "triton"
    heavy: bool = False

    @property
    def name(self) -> str:
        return f"token lists: {self.kind.name}"

    def reports(self) -> Iterator[tuple[str, AotReport]]:
        metas = [meta_tensor(None, None, None, self.kind.dims[i], dtype=torch.bfloat16) for i in (0, 0, 1)]
        program = over_token_lists(AttentionEngine(metas, backend="torch").program, ragged=self.kind.ragged)
        schedule = default_schedule(program, target_named(self.target))
        for direction in ("forward", "backward"):
            for kernel in lower(program, schedule, direction).kernels:
                yield kernel.name, compiled(kernel, schedule, self.target)


def checks(backend: str, device: str, small: bool) -> list[Comparison]:
    place = Place(backend, device, small)
    return [*(TokensCheck(kind, place) for kind in TOKENS), *(NativeCheck(kind, place) for kind in NATIVE)]


def ahead_jobs(targets: tuple[str, ...] = TARGETS) -> list[TokensAhead]:
    return [TokensAhead(kind, t) for kind in TOKENS[1:] for t in targets]

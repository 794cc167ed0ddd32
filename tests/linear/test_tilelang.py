"""Generated TileLang of linear attentions, run through its CPU target, against the float64 recurrence."""

from __future__ import annotations

import ast
from dataclasses import replace

import pytest
import torch

from attn_engine import LinearAttentionEngine, errors, linear_errors, meta_tensor
from attn_engine.codegen.backends.triton_chunk_params import ChunkOptions
from attn_engine.codegen.chunk_schedule import ChunkSchedule
from attn_engine.runtime.linear_tilelang import TileLangChunks
from tests.linear.variants import Variant, worst

pytest.importorskip("tilelang")

F32 = torch.float32
# Initial and final states, and dimensions that do not fill their tiles, are in all of them.
SHOWN = [Variant("token", packed=True, groups=(2, 4), tokens=25)]
OPTIONS = ChunkOptions(16, 16)
SCHEDULE = ChunkSchedule((OPTIONS,) * 2, (OPTIONS,) * 3)
REST = [
    Variant(),
    Variant("head", normalized=True),
    Variant("token", dims=(16, 32), tokens=32),
    Variant("token", reverse=True, normalized=True, packed=True, groups=(4, 2), dims=(8, 24)),
    Variant("token", delta=True, exclusive=True, packed=True, groups=(2, 4), tokens=25),
    Variant("none", delta=True, dims=(16, 40)),
    Variant("vector", exclusive=True, strong=30.0),
    Variant("vector", normalized=True, reverse=True, groups=(4, 2)),
    Variant("vector", delta=True, exclusive=True, packed=True, strong=8.0, dims=(24, 40), tokens=33),
]


@pytest.fixture(autouse=True)
def nothing_is_zero_by_chance(monkeypatch: pytest.MonkeyPatch):
    """What kernels write to begins as NaN: an element that they leave out shows."""
    empty = torch.empty

    def poisoned(*args, **options):
        x = empty(*args, **options)
        return x.fill_(float("nan")) if x.is_floating_point() else x.fill_(2**31 - 2)

    monkeypatch.setattr(torch, "empty", poisoned)


def agrees(variant: Variant, monkeypatch: pytest.MonkeyPatch) -> None:
    """2e-6 beside the largest number of each result; chunks of 16 tokens, parts of 16 columns."""
    monkeypatch.setattr(TileLangChunks, "chosen", lambda _: SCHEDULE)
    inputs = variant.inputs(F32)
    exact = {n: x.detach().double().requires_grad_() for n, x in inputs.items()}
    wanted = variant.results(variant.engine(torch.float64).reference, exact)
    found = variant.results(variant.engine(F32, backend="tilelang-cpu"), inputs)
    assert worst(found, wanted) < 2e-6


@pytest.mark.parametrize("variant", SHOWN, ids=str)
def test_kernels_agree_with_the_recurrence(variant: Variant, monkeypatch: pytest.MonkeyPatch):
    agrees(variant, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("variant", REST, ids=lambda v: f"{v}-{v.dims}")
def test_every_kind_of_kernel_agrees_with_the_recurrence(variant: Variant, monkeypatch: pytest.MonkeyPatch):
    agrees(variant, monkeypatch)


def engine_of(backend: str, dtype: torch.dtype, **options: object) -> LinearAttentionEngine:
    return LinearAttentionEngine(
        [meta_tensor(None, None, None, 16, dtype=dtype)] * 3, backend=backend, **options
    )


@pytest.mark.slow
@pytest.mark.parametrize("vector", [False, True])
def test_decays_of_any_strength(vector: bool):
    """A head for each of -1, -6, -20, -100 and a mixture: each number of the decay's gradient is right."""
    torch.manual_seed(0)
    tokens, strengths = 37, torch.tensor([-1.0, -6.0, -20.0, -100.0, -0.01])
    g = strengths.repeat(1, tokens, 1)
    g[:, :, 4] = torch.where(torch.rand(1, tokens) < 0.5, -100.0, -0.01)
    g = g[..., None].repeat(1, 1, 1, 16) if vector else g
    inputs = [x.requires_grad_() for x in (*(torch.randn(1, tokens, 5, 16) for _ in range(3)), g)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    o = engine_of("tilelang-cpu", F32, chunk=16)(*inputs)
    want = engine_of("reference", torch.float64)(*exact)
    weights = torch.randn(o.shape)
    found = [o, *torch.autograd.grad(o, inputs, weights)]
    wanted = [want, *torch.autograd.grad(want, exact, weights.double())]
    for one, other in zip(found, wanted, strict=True):
        assert torch.isfinite(one).all()
        error = float((one.detach().double() - other.detach()).abs().max())
        assert error < 2e-6 * float(other.detach().abs().max())
    wrong = (found[4].double() - wanted[4]).abs() / (wanted[4].abs() + 1e-30)
    for head in range(5):
        visible = wanted[4][:, :, head].abs() > 1e-30  # smaller ones are subnormal products in float32
        assert not visible.any() or float(wrong[:, :, head][visible].median()) < 1e-5


def softened(k):
    gently = torch.tanh(k) * 0.5
    return gently * gently.sum(-1, keepdim=True)


def test_the_source_is_a_file_of_its_own():
    """It parses, imports TileLang alone, has the user's name for a value, and defines a function for each phase."""
    engine = engine_of("tilelang", torch.bfloat16, k_mod=softened, decay_rank="token")
    for direction, kernels in (
        ("forward", {"linear_states", "linear_output"}),
        ("backward", {"linear_states", "linear_state_gradients", "linear_gradients"}),
    ):
        source = engine.source(direction)
        tree = ast.parse(source)
        imported = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        assert imported == {"tilelang.language"}
        assert kernels <= {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}
        assert "gently = " in source
        assert "test_tilelang.py" in source
        assert not [line for line in source.splitlines() if line != line.rstrip() or len(line) > 130]


def test_what_is_no_decay_is_reported_with_its_token(monkeypatch: pytest.MonkeyPatch):
    """By the kernels of the first test, whose decay_mod makes -softplus(g) e^a of what is given."""
    monkeypatch.setattr(TileLangChunks, "chosen", lambda _: SCHEDULE)
    engine = SHOWN[0].engine(F32, backend="tilelang-cpu")
    inputs = SHOWN[0].inputs(F32)
    for bad, error in ((torch.nan, linear_errors.DecayPositive), (torch.inf, linear_errors.DecayInfinite)):
        x = {n: t.detach().clone() for n, t in inputs.items()}
        x["a"][:, 1] = bad
        with pytest.raises(error, match="head 1, token 0"):
            SHOWN[0].call(engine, x)


def test_what_has_no_kernel_is_refused():
    """By the type, before anything is compiled, and with what to do instead."""
    for backend, dtype in (("tilelang", F32), ("tilelang-cpu", torch.bfloat16), ("tilelang", torch.float64)):
        rows = [torch.randn(1, 4, 2, 16).to(dtype) for _ in range(3)]
        with pytest.raises(errors.UnsupportedOnBackend, match=str(dtype).split(".")[1]):
            engine_of(backend, dtype)(*rows)
    if not torch.cuda.is_available():
        with pytest.raises(errors.AttnEngineError, match="tilelang"):
            engine_of("tilelang", torch.bfloat16)(*(torch.randn(1, 4, 2, 16).bfloat16() for _ in range(3)))


@pytest.mark.slow
def test_whole_chunks_of_the_default_schedule():
    """64 tokens a chunk and two programs for the columns, as a GPU has them."""
    variant = replace(SHOWN[0], tokens=130, dims=(64, 128), packed=False, groups=(1, 2))
    inputs = variant.inputs(F32)
    exact = {n: x.detach().double().requires_grad_() for n, x in inputs.items()}
    wanted = variant.results(variant.engine(torch.float64).reference, exact)
    found = variant.results(variant.engine(F32, backend="tilelang-cpu"), inputs)
    assert worst(found, wanted) < 5e-6

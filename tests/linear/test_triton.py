"""Generated Triton of linear attentions, through Triton's interpreter, against the float64 recurrence."""

from __future__ import annotations

import ast
from dataclasses import replace

import pytest
import torch

from attn_engine import LinearAttentionEngine, errors, linear_errors, meta_tensor
from attn_engine.codegen.backends.triton_chunk_params import ChunkOptions
from attn_engine.codegen.chunk_schedule import ChunkSchedule
from attn_engine.runtime.linear_triton import TritonChunks
from tests.linear.variants import EVERY, Variant, worst

pytest.importorskip("triton")

F32 = torch.float32
SHOWN = [
    Variant("token", normalized=True, packed=True, groups=(2, 4), tokens=29, dims=(8, 24)),
    Variant(
        "vector", delta=True, exclusive=True, reverse=True, packed=True, groups=(4, 2), strong=8.0, tokens=25
    ),
]
# Dimensions that fill their tiles, several programs for the columns of one state, and lengths around whole chunks.
WIDE = [
    replace(v, dims=dims, tokens=tokens)
    for v in EVERY[-8:]
    for dims, tokens in (((16, 32), 32), ((32, 40), 33))
]


@pytest.fixture(autouse=True)
def nothing_is_zero_by_chance(monkeypatch: pytest.MonkeyPatch):
    """What kernels write to begins as NaN: an element that they leave out shows."""
    empty = torch.empty

    def poisoned(*args, **options):
        x = empty(*args, **options)
        return x.fill_(float("nan")) if x.is_floating_point() else x.fill_(2**31 - 2)

    monkeypatch.setattr(torch, "empty", poisoned)


def agrees(variant: Variant, monkeypatch: pytest.MonkeyPatch, columns: int | None = 16) -> None:
    """2e-6 beside the largest number of each output and gradient; chunks of 16 tokens."""
    options = ChunkOptions(16, columns)
    monkeypatch.setattr(TritonChunks, "chosen", lambda _: ChunkSchedule((options,) * 2, (options,) * 3))
    inputs = variant.inputs(F32)
    exact = {n: x.detach().double().requires_grad_() for n, x in inputs.items()}
    wanted = variant.results(variant.engine(torch.float64).reference, exact)
    found = variant.results(variant.engine(F32, backend="triton-interpreter"), inputs)
    assert worst(found, wanted) < 2e-6


@pytest.mark.parametrize("variant", SHOWN, ids=str)
def test_kernels_agree_with_the_recurrence(variant: Variant, monkeypatch: pytest.MonkeyPatch):
    agrees(variant, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("variant", EVERY, ids=str)
def test_every_kernel_agrees_with_the_recurrence(variant: Variant, monkeypatch: pytest.MonkeyPatch):
    agrees(variant, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("variant", WIDE, ids=lambda v: f"{v}-{v.dims}")
def test_whole_tiles_and_shared_columns(variant: Variant, monkeypatch: pytest.MonkeyPatch):
    agrees(variant, monkeypatch)


def engine_of(backend: str, dtype: torch.dtype, **options: object) -> LinearAttentionEngine:
    return LinearAttentionEngine(
        [meta_tensor(None, None, None, 16, dtype=dtype)] * 3, backend=backend, **options
    )


@pytest.mark.parametrize("vector", [False, True])
def test_decays_of_any_strength(vector: bool):
    """A head for each of -1, -6, -20, -100 and a mixture: each number of the decay's gradient is right, not only their
    scale."""
    torch.manual_seed(0)
    tokens, strengths = 37, torch.tensor([-1.0, -6.0, -20.0, -100.0, -0.01])
    g = strengths.repeat(1, tokens, 1)
    g[:, :, 4] = torch.where(torch.rand(1, tokens) < 0.5, -100.0, -0.01)
    g = g[..., None].repeat(1, 1, 1, 16) if vector else g
    inputs = [x.requires_grad_() for x in (*(torch.randn(1, tokens, 5, 16) for _ in range(3)), g)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    o, want = (
        engine_of("triton-interpreter", F32, chunk=16)(*inputs),
        engine_of("reference", torch.float64)(*exact),
    )
    weights = torch.randn(o.shape)
    found = torch.autograd.grad(o, inputs, weights)
    wanted = torch.autograd.grad(want, exact, weights.double())
    for one, other in zip([o, *found], [want, *wanted], strict=True):
        assert torch.isfinite(one).all()
        assert float((one.detach().double() - other.detach()).abs().max()) < 2e-6 * float(
            other.detach().abs().max()
        )
    wrong = (found[3].double() - wanted[3]).abs() / (wanted[3].abs() + 1e-30)
    for head in range(5):
        visible = wanted[3][:, :, head].abs() > 1e-30  # smaller ones are subnormal products in float32
        assert not visible.any() or float(wrong[:, :, head][visible].median()) < 1e-5


def test_the_source_is_a_file_of_its_own():
    """It parses, imports triton alone, has the user's name for a value, and says how it is launched."""

    def softened(k):
        gently = torch.tanh(k) * 0.5
        return gently * gently.sum(-1, keepdim=True)

    engine = engine_of("triton-interpreter", F32, k_mod=softened, decay_rank="token")
    for direction, kernels in (
        ("forward", {"linear_states", "linear_output"}),
        ("backward", {"linear_states", "linear_state_gradients", "linear_gradients"}),
    ):
        source = engine.source(direction)
        tree = ast.parse(source)
        imported = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        assert imported == {"triton", "triton.language"}
        assert kernels <= {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}
        assert "gently = " in source
        assert "test_triton.py" in source
        assert "num_warps=" in source
        assert not [line for line in source.splitlines() if line != line.rstrip()]


def test_what_is_no_decay_is_reported_with_its_token():
    engine = engine_of("triton-interpreter", F32, decay_rank="token", reverse=True, chunk=16)
    rows = [torch.randn(1, 20, 2, 16) for _ in range(3)]
    decay = torch.full((1, 20, 2), -1.0)
    decay[0, 18, 1] = 0.5
    with pytest.raises(linear_errors.DecayPositive, match="head 1, token 18"):
        engine(*rows, decay)
    decay[0, 18, 1] = -torch.inf
    with pytest.raises(linear_errors.DecayInfinite, match="head 1, token 18"):
        engine(*rows, decay)


def test_what_has_no_gpu_kernel_is_refused():
    with pytest.raises(errors.UnsupportedOnBackend, match="float64"):
        engine_of("triton", torch.float64)(*(torch.randn(1, 4, 2, 16, dtype=torch.float64) for _ in range(3)))
    if not torch.cuda.is_available():
        with pytest.raises(errors.AttnEngineError, match="triton"):
            engine_of("triton", F32)(*(torch.randn(1, 4, 2, 16) for _ in range(3)))


def test_without_tokens_the_state_stays_as_it_is():
    """And sequences without tokens among others, and no sequences at all."""
    engine = engine_of("triton-interpreter", F32, chunk=16)
    state = torch.randn(2, 2, 16, 16)
    o, after = engine(
        *(torch.randn(2, 0, 2, 16) for _ in range(3)), initial_state=state, return_final_state=True
    )
    assert o.shape == (2, 0, 2, 16)
    assert torch.equal(after, state)
    assert engine(*(torch.randn(0, 3, 2, 16) for _ in range(3))).shape == (0, 3, 2, 16)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "rank, delta", [("token", False), ("vector", False), ("token", True), ("vector", True)]
)
def test_short_elements(dtype: torch.dtype, rank: str, delta: bool):
    """Rounded to elements as products read them: as near as torch's own chunks in that type of input."""
    torch.manual_seed(0)
    options = {"decay_rank": rank, "beta_mod": (lambda b: b) if delta else None, "scale": 0.25}
    rows = [torch.randn(1, 40, 2, 16) for _ in range(3)]
    rows[1] = torch.nn.functional.normalize(rows[1], dim=-1)
    decay = -torch.rand(1, 40, 2, 16) if rank == "vector" else -torch.rand(1, 40, 2)
    call = {"beta": torch.rand(1, 40, 2)} if delta else {}
    given = [x.to(dtype).requires_grad_() for x in rows]
    exact = [x.detach().double().requires_grad_() for x in given]
    o = engine_of("triton-interpreter", dtype, chunk=16, **options)(*given, decay, **call)
    want = engine_of("reference", torch.float64, **options)(
        *exact, decay.double(), **{n: x.double() for n, x in call.items()}
    )
    weights = torch.randn(o.shape).to(dtype)
    found = [o, *torch.autograd.grad(o, given, weights)]
    wanted = [want, *torch.autograd.grad(want, exact, weights.double())]
    for one, other in zip(found, wanted, strict=True):
        error = (one.double() - other).norm() / other.norm()
        assert float(error.detach()) < (0.01 if dtype is torch.bfloat16 else 0.002)

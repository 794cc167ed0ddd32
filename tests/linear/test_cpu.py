"""Generated C++ of linear attentions against the float64 recurrence."""

from __future__ import annotations

import ctypes
import platform

import pytest
import torch

from attn_engine import LinearAttentionEngine, meta_tensor
from attn_engine.runtime.cpu_compile import find_compiler
from tests.linear.variants import Variant, worst

pytestmark = pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler on this machine")

F32 = torch.float32


@pytest.fixture(autouse=True, scope="module")
def nothing_is_zero_by_chance():
    """Memory that is handed out holds large numbers: a kernel that reads what it has not written shows."""
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt"):
        yield
        return
    perturb, threshold = -6, -3
    library.mallopt(threshold, 1 << 30)
    library.mallopt(perturb, 1)
    yield
    library.mallopt(perturb, 0)


SHOWN = [
    Variant("token", normalized=True, groups=(2, 4), tokens=75, dims=(8, 64)),
    Variant("vector", delta=True, reverse=True, packed=True, groups=(4, 2), strong=8.0),
    Variant("vector", exclusive=True, tokens=150, dims=(20, 33)),
    Variant("token", delta=True, exclusive=True, strong=30.0, tokens=1100, dims=(9, 4)),
]
REST = [
    Variant(rank, delta, exclusive, normalized)
    for rank in ("none", "head", "token", "vector")
    for delta, exclusive, normalized in (
        (False, False, False), (True, False, False), (False, True, True), (True, True, False)
    )
]  # fmt: skip


def agrees(variant: Variant, dtype: torch.dtype, tolerance: float, **options: int) -> None:
    inputs = variant.inputs(dtype)
    engine = variant.engine(dtype, backend="cpu", **options)
    exact = {n: x.detach().double().requires_grad_() for n, x in inputs.items()}
    wanted = variant.results(variant.engine(torch.float64).reference, exact)
    assert worst(variant.results(engine, inputs), wanted) < tolerance


@pytest.mark.parametrize("variant", SHOWN, ids=str)
def test_kernels_agree_with_the_recurrence(variant: Variant):
    agrees(variant, F32, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("variant", REST, ids=str)
@pytest.mark.parametrize("dtype", [F32, torch.float64], ids=str)
def test_every_kernel_agrees_with_the_recurrence(variant: Variant, dtype: torch.dtype):
    agrees(variant, dtype, 1e-5 if dtype is F32 else 1e-9, chunk=16)


@pytest.mark.slow
@pytest.mark.parametrize("processor", ["haswell", "x86-64"])
@pytest.mark.parametrize("variant", SHOWN, ids=str)
def test_older_processors(processor: str, variant: Variant, monkeypatch: pytest.MonkeyPatch):
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("for x86")
    monkeypatch.setattr(find_compiler, "__defaults__", (processor,))
    agrees(variant, F32, 1e-5)


@pytest.fixture(scope="module")
def plain() -> LinearAttentionEngine:
    return LinearAttentionEngine([meta_tensor(None, None, None, 16, dtype=F32)] * 3, backend="cpu")


def drawn(tokens: int, decay: str, seed: int = 0) -> list[torch.Tensor]:
    torch.manual_seed(seed)
    g = {
        "-1": torch.full((1, tokens, 2), -1.0),
        "-6": torch.full((1, tokens, 2), -6.0),
        "-20": torch.full((1, tokens, 2), -20.0),
        "-100": torch.full((1, tokens, 2), -100.0),
        "mixed": torch.where(torch.rand(1, tokens, 2) < 0.5, -100.0, -0.01),
    }[decay]
    return [*(torch.randn(1, tokens, 2, 16) for _ in range(3)), g]


@pytest.mark.parametrize("vector", [False, True])
@pytest.mark.parametrize("decay", ["-1", "-6", "-20", "-100", "mixed"])
def test_decays_of_any_strength(plain: LinearAttentionEngine, decay: str, vector: bool):
    """Values and gradients stay finite, and each number of the decay's gradient is right, not only their scale."""
    q, k, v, g = drawn(150, decay)
    g = g[..., None].repeat(1, 1, 1, 16) if vector else g
    inputs = [x.requires_grad_() for x in (q, k, v, g)]
    o = plain(*inputs)
    weights = torch.randn(o.shape)
    found = torch.autograd.grad(o, inputs, weights)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    want = LinearAttentionEngine(
        [meta_tensor(None, None, None, 16, dtype=torch.float64)] * 3, backend="reference"
    )(*exact)
    wanted = torch.autograd.grad(want, exact, weights.double())
    torch.testing.assert_close(o.double(), want, atol=1e-5, rtol=1e-5)
    for one, other in zip(found[:3], wanted[:3], strict=True):
        torch.testing.assert_close(one.double(), other, atol=2e-5, rtol=1e-5)
    dg, wanted_dg = found[3].double(), wanted[3]
    assert torch.isfinite(dg).all()
    wrong = (dg - wanted_dg).abs() / (wanted_dg.abs() + 1e-30)
    visible = wanted_dg.abs() > 1e-30  # smaller ones are subnormal products in float32
    assert decay == "-100" or float(wrong[visible].median()) < 1e-5


def test_the_number_of_threads_changes_no_bit(plain: LinearAttentionEngine):
    inputs = [x.requires_grad_() for x in drawn(200, "mixed")]
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        o = plain(*inputs)
        results.append([o, *torch.autograd.grad(o.square().sum(), inputs)])
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def norm_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize("delta", [False, True])
def test_bfloat16(delta: bool):
    """What is multiplied is rounded to bfloat16, as GPU kernels do; sums and the state are float32."""
    metas = [meta_tensor(None, None, None, n, dtype=torch.bfloat16) for n in (20, 20, 40)]
    engine = LinearAttentionEngine(metas, delta=delta, backend="cpu")
    torch.manual_seed(0)
    tokens = 530 if delta else 100  # of more than one segment, of one
    k = torch.nn.functional.normalize(torch.randn(1, tokens, 2, 20), dim=-1)
    rows = [torch.randn(1, tokens, 2, 20), k, torch.randn(1, tokens, 2, 40)]
    q, k, v = (x.to(torch.bfloat16).requires_grad_() for x in rows)
    g, state = (
        (-0.02 * torch.rand(1, tokens, 2)).requires_grad_(),
        torch.randn(1, 2, 20, 40, requires_grad=True),
    )
    given = {"beta": torch.rand(1, tokens, 2, requires_grad=True)} if delta else {}
    inputs = [q, k, v, g, state, *given.values()]
    weights = torch.randn(1, tokens, 2, 40)
    found, wanted = (
        f(q, k, v, g, initial_state=state, return_final_state=True, **given)
        for f in (engine, engine.reference)
    )
    gradients = (torch.autograd.grad((o * weights).sum() + s.sum(), inputs) for o, s in (found, wanted))
    pairs = [*zip(found, wanted, strict=True), *zip(*gradients, strict=True)]
    errors = [norm_error(x.detach(), y.detach()) for x, y in pairs]
    assert max(errors) < 6e-3  # numbers of bfloat16 lie up to 8e-3 apart


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize("tokens", [0, 1, 64, 65])
def test_lengths_and_layouts(layout: str, tokens: int):
    engine = LinearAttentionEngine([meta_tensor(None, None, None, 16, dtype=F32)] * 3, layout=layout)
    q, k, v, g = drawn(tokens, "-1")
    given = [x if layout == "bshd" else x.transpose(1, 2) for x in (q, k, v, g)]
    o, state = engine(*given, return_final_state=True)
    want, after = engine.reference(*given, return_final_state=True)
    torch.testing.assert_close(o, want.float(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(state, after.float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rank", ["token", "vector"])
def test_step_by_step(rank: str):
    """Decoding, token after token, is the call with all tokens."""
    variant = Variant(rank, delta=rank == "vector", normalized=rank == "token", tokens=20)
    engine = variant.engine(F32, backend="cpu")
    x = {n: y.detach() for n, y in variant.inputs(F32).items()}
    wanted, after = variant.call(engine.reference, x)
    state, found = x["state"].clone(), []
    for t in range(variant.tokens):
        rows = [x[n][:, t] for n in ("q", "k", "v", "decay")]
        beta = {"beta": x["beta"][:, t]} if variant.delta else {}
        custom = x["u"], x["s"][:, :, t : t + 1], x["a"]
        o, state = engine.step(*rows, state, *custom, **beta, t=t)
        found.append(o)
    torch.testing.assert_close(torch.stack(found, 1), wanted.float(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(state, after.float(), atol=1e-5, rtol=1e-5)
    slow = variant.engine(F32, backend="torch")
    o, state = slow.step(*[x[n][:, 0] for n in ("q", "k", "v", "decay")], x["state"].clone(), x["u"],
                         x["s"][:, :, :1], x["a"], **({"beta": x["beta"][:, 0]} if variant.delta else {}))  # fmt: skip
    torch.testing.assert_close(o, wanted[:, 0].float(), atol=1e-5, rtol=1e-5)


def test_the_source_shows_the_users_lines():
    def squashed(k):
        small = torch.tanh(k)
        return small * 2.0

    meta = meta_tensor(None, None, None, 16, dtype=F32)
    text = LinearAttentionEngine([meta] * 3, k_mod=squashed).source()
    assert "small = torch.tanh(k)" in text and "small_" in text and "gram<" in text and "state_step<" in text

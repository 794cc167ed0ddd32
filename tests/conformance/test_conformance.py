"""Normalisers x masks and score functions x dtypes x head ratios x lengths: output and gradients, against formulas."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from attn_engine import AttentionEngine, meta_tensor
from attn_engine.library import OnlineRelu, OnlineRetention, OnlineSigmoid, OnlineSoftmax
from tests.conformance.cases import NORMALISERS, VARIANTS, Context, Variant, dense_attention
from tests.part import part_of

RULES = {"softmax": OnlineSoftmax, "sigmoid": OnlineSigmoid, "relu": OnlineRelu, "retention": OnlineRetention}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
HEADS = {"mha": (4, 4), "gqa": (4, 1), "mqa": (3, 1)}
LENGTHS = ((130, 130), (70, 200), (1, 130))
DIM, DIM_V, BATCHES = 32, 24, 2
SCALE = 0.25

EAGER_DRAWS = 8  # inputs on which eager torch is measured


def run_case(
    backend: str,
    normaliser: str,
    variant: Variant,
    dtype: torch.dtype,
    heads: tuple[int, int],
    lengths: tuple[int, int],
) -> dict[str, tuple[float, float]]:
    """(error, budget) of the output and of each gradient."""
    (h, h_kv), (q_len, kv_len) = heads, lengths
    tensors = variant.tensors(BATCHES, h, q_len, kv_len)
    compute = torch.float64 if dtype is torch.float64 else torch.float32
    tensors = {n: t.to(compute).requires_grad_() if n in variant.learned else t for n, t in tensors.items()}
    shapes = ((q_len, h, DIM), (kv_len, h_kv, DIM), (kv_len, h_kv, DIM_V))
    inputs = [torch.randn(BATCHES, *s).to(dtype).requires_grad_() for s in shapes]
    engine = AttentionEngine(
        [meta_tensor(None, None, None, d, dtype=dtype) for d in (DIM, DIM, DIM_V)],
        score_mod=variant.score_mod(tensors) if variant.score_mod else None,
        mask_mod=variant.mask_mod(tensors) if variant.mask_mod else None,
        online_func=RULES[normaliser](),
        backend=backend,
        scale=SCALE,
    )
    learned = [tensors[n] for n in variant.learned]
    got = outputs_and_gradients(lambda: engine(*inputs), [*inputs, *learned])
    want = dense(normaliser, variant, inputs, tensors, torch.float64, like=got[0])
    names = ("o", "dq", "dk", "dv", *variant.learned)
    lost = [0.0] * len(names)  # by eager torch
    for draw in range(EAGER_DRAWS):
        near = [_nudged(x) for x in inputs] if draw else inputs
        true = dense(normaliser, variant, near, tensors, torch.float64, like=got[0]) if draw else want
        eager = dense(normaliser, variant, near, tensors, dtype, like=got[0])
        lost = [max(before, _error(e, w)) for before, e, w in zip(lost, eager, true, strict=True)]
    return {
        n: (_error(g, w), max(_budget(w, dtype), 3 * e))
        for n, g, w, e in zip(names, got, want, lost, strict=True)
    }


def dense(
    normaliser: str,
    variant: Variant,
    inputs: list[Tensor],
    tensors: dict[str, Tensor],
    dtype: torch.dtype,
    like: Tensor,
) -> list[Tensor]:
    """The formulas in `dtype`, with gradients: the truth in float64, and what eager torch would give in another."""
    exact = [x.detach().to(dtype).requires_grad_() for x in inputs]
    captured = {
        n: t.detach().to(dtype).requires_grad_() if n in variant.learned else t for n, t in tensors.items()
    }
    q, k, v = (x.transpose(1, 2) for x in exact)
    context = Context(q.shape[0], q.shape[1], q.shape[2], k.shape[2], captured)
    return outputs_and_gradients(
        lambda: dense_attention(normaliser, variant, q, k, v, SCALE, context).transpose(1, 2),
        [*exact, *(captured[n] for n in variant.learned)],
        like=like,
    )


def outputs_and_gradients(
    run: Callable[[], Tensor], wrt: list[Tensor], like: Tensor | None = None
) -> list[Tensor]:
    """The output, and its gradients under a weighting that both sides of a comparison share."""
    o = run()
    weights = torch.randn(o.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    if like is not None:
        weights = weights.to(like.dtype).double()
    gradients = torch.autograd.grad(o, wrt, weights.to(o.dtype))
    return [o.detach(), *gradients]


def _error(got: Tensor, want: Tensor) -> float:
    assert got.shape == want.shape
    return (got.double() - want).abs().max().item()


def _nudged(x: Tensor) -> Tensor:
    """x with every element a unit in the last place up or down: as good an input as x."""
    signs = torch.randint(0, 2, x.shape) * 2 - 1
    return (x.detach().double() * (1 + signs * torch.finfo(x.dtype).eps)).to(x.dtype)


def _budget(want: Tensor, dtype: torch.dtype) -> float:
    """A few units in the last place of the largest value: what rounding o, dO and the results once each can cost.

    Sums with cancellation (a slope's gradient over all distances) may lose more; there eager torch is the measure: what
    it loses on these inputs and on ones beside them, for a sum of few elements may be right by luck.
    """
    units = {torch.float64: 2000, torch.float32: 100, torch.bfloat16: 4, torch.float16: 4}[dtype]
    return units * torch.finfo(dtype).eps * max(want.abs().max().item(), 1e-2)


def _assert_within(errors: dict[str, tuple[float, float]]) -> None:
    for name, (error, budget) in errors.items():
        assert error <= budget, f"{name}: error {error:.2e} above {budget:.2e}"  # also false for NaN


# The fast suite compiles every variant and, with two of them, every normaliser and dtype.
# The others reach it as tile programs, which backends only spell, and on the reference.
SHARED = ("causal", "learned_bias")


def is_fast(normaliser: str, variant: str, dtype: str) -> bool:
    plain = (normaliser == "softmax") + (dtype == "float32")
    return plain == 2 or (plain == 1 and variant in SHARED)


@pytest.mark.parametrize(("normaliser", "variant", "dtype"), part_of(is_fast, NORMALISERS, VARIANTS, DTYPES))
def test_cpu(normaliser: str, variant: str, dtype: str) -> None:
    for heads in HEADS.values():
        for lengths in LENGTHS:
            errors = run_case("cpu", normaliser, VARIANTS[variant], DTYPES[dtype], heads, lengths)
            _assert_within(errors)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("normaliser", NORMALISERS)
def test_torch_tile_program(normaliser: str, variant: str) -> None:
    _assert_within(run_case("torch", normaliser, VARIANTS[variant], torch.float32, HEADS["gqa"], (70, 200)))


@pytest.mark.parametrize(
    ("normaliser", "variant", "dtype"),
    part_of(lambda n, v, d: d == "float32" or v in SHARED, NORMALISERS, VARIANTS, DTYPES),
)
def test_reference_gradients(normaliser: str, variant: str, dtype: str) -> None:
    for heads in HEADS.values():
        for lengths in LENGTHS:
            errors = run_case("reference", normaliser, VARIANTS[variant], DTYPES[dtype], heads, lengths)
            _assert_within(errors)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("normaliser", NORMALISERS)
def test_reference(normaliser: str, variant: str) -> None:
    """`engine.reference` is the oracle of engine.check: it must agree with the formulas itself."""
    v = VARIANTS[variant]
    h, h_kv, q_len, kv_len = 4, 2, 70, 90
    tensors = v.tensors(BATCHES, h, q_len, kv_len)
    q, k = torch.randn(BATCHES, q_len, h, DIM), torch.randn(BATCHES, kv_len, h_kv, DIM)
    value = torch.randn(BATCHES, kv_len, h_kv, DIM_V)
    engine = AttentionEngine(
        [meta_tensor(None, None, None, d, dtype=torch.float32) for d in (DIM, DIM, DIM_V)],
        score_mod=v.score_mod(tensors) if v.score_mod else None,
        mask_mod=v.mask_mod(tensors) if v.mask_mod else None,
        online_func=RULES[normaliser](),
        scale=SCALE,
        backend="reference",
    )
    context = Context(
        BATCHES, h, q_len, kv_len, {n: t.double() if t.is_floating_point() else t for n, t in tensors.items()}
    )
    want = dense_attention(
        normaliser, v, *(x.double().transpose(1, 2) for x in (q, k, value)), SCALE, context
    )
    torch.testing.assert_close(engine.reference(q, k, value), want.transpose(1, 2), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(engine(q, k, value), want.transpose(1, 2).float(), rtol=1e-6, atol=1e-6)


INTERPRETED = (
    ("softmax", "causal"), ("softmax", "alibi"), ("softmax", "learned_bias"), ("sigmoid", "window"),
    ("relu", "document"), ("retention", "prefix"), ("softmax", "soft_cap"),
)  # fmt: skip


@pytest.mark.parametrize(("normaliser", "variant"), INTERPRETED)
def test_triton_interpreter(normaliser: str, variant: str) -> None:
    heads, lengths = HEADS["gqa"], (70, 130)
    _assert_within(
        run_case("triton-interpreter", normaliser, VARIANTS[variant], torch.float32, heads, lengths)
    )

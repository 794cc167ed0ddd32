"""Prologs of latent attention and of its indexer against their formulas; weights in tiles; narrow formats."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from attn_engine.errors import ShapeMismatch, WrongArgument
from attn_engine.library import (
    dequantise,
    from_nz,
    hadamard,
    indexer_prolog,
    mla_prolog,
    to_fp8,
    to_int8,
    to_nz,
)
from tests.serving.pto_formulas import Operands, operands, prologs

MLA = ("x", "w_dq", "w_uq_qr", "w_uk", "w_dkv_kr", "gamma_cq", "gamma_ckv", "sin", "cos")
INDEXER = ("w_idx_qb", "w_idx_k", "w_idx_proj", "in_gamma_k", "in_beta_k", "sin", "cos")
KINDS = ("first_interleaved", "first_halves", "last_interleaved", "last_halves")


def both(given: Operands, **options: Any) -> tuple[list[Tensor], list[Tensor]]:
    t = given.tensors
    found = mla_prolog(*(t[n] for n in MLA), rounding=options.get("rounding", True))
    return list(found), list(indexer_prolog(t["x"], found.c_q, *(t[n] for n in INDEXER), **options))


@pytest.mark.parametrize("kind", KINDS)
def test_formulas(kind: str, seed: int) -> None:
    torch.manual_seed(seed)
    given = operands([5, 9], 2)
    of_mla, of_indexer = both(given, indexer_rope=kind)
    g = prologs(given, kind=kind)
    wanted = (g.c_q, g.q_latent, g.q_rope, g.latent, g.k_rope, g.index_q, g.index_k, g.weights)
    for x, want in zip((*of_mla, *of_indexer), wanted, strict=True):
        torch.testing.assert_close(x.double(), want, rtol=2e-6, atol=2e-6)


def test_pairing_of_outputs_is_a_permutation(seed: int) -> None:
    """Products of queries and keys do not know in which order the pairs were written; those of halves differ."""
    torch.manual_seed(seed)
    given = operands([5, 9], 2)
    t = given.tensors
    t["cos"], t["sin"] = (x[..., :4].repeat_interleave(2, -1) for x in (t["cos"], t["sin"]))
    x, y = torch.randn(2, 2, 2, 8, dtype=torch.float64)
    cos, sin = t["cos"].double(), t["sin"].double()
    turned = [torch.stack((-a[..., 1::2], a[..., ::2]), -1).flatten(-2) * sin + a * cos for a in (x, y)]
    from attn_engine.library.serving.prologs import rotate

    half = (torch.cat((s[..., ::2], s[..., ::2]), -1) for s in (sin, cos))
    sin, cos = half
    ours = [rotate(a, sin, cos) for a in (x, y)]
    products = [(a * b).sum(-1) for a, b in (turned, ours)]
    torch.testing.assert_close(products[0], products[1])
    other = [rotate(a, sin, cos, interleaved=False) for a in (x, y)]
    assert not torch.allclose((other[0] * other[1]).sum(-1), products[0])


def test_what_is_stored_is_rounded(seed: int) -> None:
    """bfloat16 step by step; without it everything stays in float32."""
    torch.manual_seed(seed)
    given = operands([5, 9], 2, dtype=torch.bfloat16)
    of_mla, of_indexer = both(given)
    assert {x.dtype for x in (*of_mla, *of_indexer)} == {torch.bfloat16}
    exact_mla, exact_indexer = both(given, rounding=False)
    assert {x.dtype for x in (*exact_mla, *exact_indexer)} == {torch.float32}
    for found, stored, most in (
        (exact_mla + exact_indexer, torch.float64, 3e-6),
        (of_mla + of_indexer, torch.bfloat16, 2**-6),
    ):
        g = prologs(given, stored=stored)
        wanted = (g.c_q, g.q_latent, g.q_rope, g.latent, g.k_rope, g.index_q, g.index_k, g.weights)
        for x, want in zip(found, wanted, strict=True):
            torch.testing.assert_close(x.double(), want, rtol=most, atol=most)
            if (
                stored is torch.bfloat16
            ):  # a sum next to the middle of two numbers may be rounded to the other
                assert float((x.double() == want).double().mean()) > 0.95


def test_gradients_flow() -> None:
    given = operands([5], 2, dtype=torch.float64)
    t = {n: x.requires_grad_(x.is_floating_point() and "cache" not in n) for n, x in given.tensors.items()}
    found = mla_prolog(*(t[n] for n in MLA))
    torch.stack([x.square().sum() for x in found]).sum().backward()
    assert all(t[n].grad is not None for n in MLA)


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("w_dq", lambda x: x[:-1], "w_dq has shape (39, 24); expected (40, 24)"),
        ("w_uq_qr", lambda x: x[:, :-8], "w_uq_qr"),
        ("w_uk", lambda x: x[..., 0], "w_uk"),
        ("w_dkv_kr", lambda x: x[:, :-1], "w_dkv_kr has shape (40, 39); expected (40, 40)"),
        ("gamma_ckv", lambda x: x[:-1], "gamma_ckv"),
        ("cos", lambda x: x[..., :-2], "cos"),
        ("gamma_cq", lambda x: x.bfloat16(), "gamma_cq"),
        ("w_dq", lambda x: x[None], "from_nz"),
    ],
)
def test_operands_that_do_not_fit(name: str, change: Any, says: str) -> None:
    given = operands([5], 2).tensors
    given[name] = change(given[name])
    with pytest.raises((ShapeMismatch, WrongArgument)) as found:
        mla_prolog(*(given[n] for n in MLA))
    assert found.value.details["argument"] == name
    assert says in " ".join(str(found.value).split())


def test_indexer_operands_that_do_not_fit() -> None:
    t = operands([5], 2).tensors
    c_q = torch.zeros(1, 2, 24)
    for name, wrong in (("w_idx_qb", t["w_idx_qb"][:, 1:]), ("in_beta_k", t["in_beta_k"][1:])):
        with pytest.raises(ShapeMismatch) as found:
            indexer_prolog(t["x"], c_q, *({**t, name: wrong}[n] for n in INDEXER))
        assert found.value.details["argument"] == name
    for name, options in (
        ("indexer_rope", {"indexer_rope": "middle"}),
        ("quantisation", {"quantisation": "fp4"}),
    ):
        with pytest.raises(WrongArgument) as wrong_option:
            indexer_prolog(t["x"], c_q, *(t[n] for n in INDEXER), **options)  # pyright: ignore[reportArgumentType]
        assert wrong_option.value.details["argument"] == name


def test_tiles_of_weights() -> None:
    weight = torch.arange(32 * 48, dtype=torch.float32).view(32, 48)
    tiles = to_nz(weight)
    assert torch.equal(tiles, weight.view(32, 3, 16).permute(1, 0, 2))
    assert torch.equal(from_nz(tiles), weight)
    assert torch.equal(from_nz(tiles.view(3, 2, 16, 16)), weight)
    with pytest.raises(ShapeMismatch):
        to_nz(weight[:, 1:])
    with pytest.raises(ShapeMismatch):
        from_nz(weight)


def sylvester(n: int) -> Tensor:
    h = torch.ones(1, 1, dtype=torch.float64)
    while len(h) < n:
        h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1)))
    return h


def test_hadamard(seed: int) -> None:
    """Sylvester's matrix / sqrt(D); twice is nothing; products of turned vectors are those of the vectors."""
    torch.manual_seed(seed)
    for n in (1, 2, 16, 128):
        x, y = torch.randn(2, 3, n, dtype=torch.float64)
        torch.testing.assert_close(hadamard(x), x @ sylvester(n) / math.sqrt(n))
        torch.testing.assert_close(hadamard(hadamard(x)), x)
        torch.testing.assert_close((hadamard(x) * hadamard(y)).sum(-1), (x * y).sum(-1))
    with pytest.raises(ShapeMismatch):
        hadamard(torch.zeros(2, 12))


@pytest.mark.parametrize("ue8m0", [False, True])
def test_fp8(ue8m0: bool, seed: int) -> None:
    torch.manual_seed(seed)
    x = torch.randn(5, 7, 300) * torch.logspace(-6, 4, 7)[:, None]
    x[0, 0] = 0
    values, codes, scales = to_fp8(x, ue8m0=ue8m0)
    assert codes.dtype is torch.float8_e4m3fn
    assert scales.shape == (5, 7, 3)
    for j in range(3):
        part = x[..., j * 128 : (j + 1) * 128]
        want = part.abs().amax(-1).clamp_min(1e-4) / 448
        if ue8m0:
            want = 2.0 ** torch.ceil(torch.log2(want.double()))
        torch.testing.assert_close(scales[..., j].double(), want.double(), rtol=1e-6, atol=0)
        error = (values[..., j * 128 : (j + 1) * 128] - part).abs()
        assert bool((error <= part.abs() * 2**-4 + scales[..., j : j + 1] * 2**-10).all())
    assert torch.equal(dequantise(codes, scales), values)
    exact = to_fp8(torch.tensor([[448.0, -1.5, 0.25] + [0.0] * 125]))
    assert exact.scales.item() == 1.0
    assert exact.values[0, :3].tolist() == [448.0, -1.5, 0.25]


def test_powers_of_two_stay(seed: int) -> None:
    """A largest magnitude of 448 * 2^n has the scale 2^n, and one slightly larger the next."""
    for n in (-3, 0, 5):
        x = torch.full((1, 128), 448 * 2.0**n)
        assert to_fp8(x, ue8m0=True).scales.item() == 2.0**n
        assert to_fp8(x * 1.001, ue8m0=True).scales.item() == 2.0 ** (n + 1)


def test_int8(seed: int) -> None:
    torch.manual_seed(seed)
    x = torch.randn(5, 7, 40)
    values, codes, scales = to_int8(x)
    assert codes.dtype is torch.int8
    torch.testing.assert_close(scales[..., 0], x.abs().amax(-1) / 127)
    assert bool(((values - x).abs() <= scales / 2 * 1.0001).all())
    assert int(codes.abs().max()) == 127


def test_scales_factor_out_of_scores(seed: int) -> None:
    """I = k_scale * sum (w * q_scale) relu(q8 . k8): positive scales pass through relu."""
    torch.manual_seed(seed)
    q, k, w = torch.randn(4, 128), torch.randn(50, 128), torch.randn(4)
    of_q, of_k = to_fp8(q), to_fp8(k)
    simulated = (w[:, None] * torch.relu(of_q.values.double() @ of_k.values.double().T)).sum(0)
    codes = torch.relu(of_q.codes.double() @ of_k.codes.double().T)
    factored = of_k.scales[:, 0] * ((w * of_q.scales[:, 0]).double()[:, None] * codes).sum(0)
    largest = float(factored.abs().max())  # heads of both signs cancel
    torch.testing.assert_close(simulated, factored, rtol=0, atol=1e-6 * largest)


def test_hadamard_helps_outliers() -> None:
    """One column twenty times as large: fewer of the best 256 of 4096 are lost after turning."""
    torch.manual_seed(0)
    q, k = torch.randn(64, 128), torch.randn(4096, 128)
    q[:, 3], k[:, 3] = q[:, 3] / 20, k[:, 3] * 20

    def best(q: Tensor, k: Tensor) -> set[int]:
        return set(torch.relu(q @ k.T).sum(0).topk(256).indices.tolist())

    want = best(q, k)
    plain = best(to_int8(q).values, to_int8(k).values)
    turned = best(to_int8(hadamard(q)).values, to_int8(hadamard(k)).values)
    assert len(want & turned) > len(want & plain)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("kind", ["fp8", "fp8_ue8m0", "int8"])
def test_what_narrow_formats_leave(kind: str, turned: bool, seed: int) -> None:
    """Queries and keys, turned first and then quantised; weights stay as they are."""
    torch.manual_seed(seed)
    given = operands([5, 9], 2)
    _, (query, key, weights) = both(given)
    _, found = both(given, quantisation=kind, hadamard=turned)
    matrix = (sylvester(16) / 4 if turned else torch.eye(16)).float()

    def narrow(x: Tensor) -> Tensor:
        return to_int8(x).values if kind == "int8" else to_fp8(x, ue8m0=kind == "fp8_ue8m0").values

    for x, exact in zip(found, (query, key), strict=False):
        assert not torch.equal(x, exact @ matrix)
        step = (
            exact.abs().amax(-1, keepdim=True) / 8
        )  # sums in another order may be rounded to the next number
        torch.testing.assert_close(x, narrow(exact @ matrix), rtol=0.13, atol=float(step.max()))
        assert float((x - narrow(exact @ matrix)).abs().gt(1e-6).float().mean()) < 0.05
    assert torch.equal(found[2], weights)

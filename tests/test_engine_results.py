"""What the engine computes: outputs, row values and gradients, against plain torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from attn_engine import CustomIO, OnlineFunc
from tests.ir.user_rules import Softmin
from tests.small_engine import (
    D,
    DerivedSoftmax,
    SeedSoftmax,
    assert_same_gradients,
    causal,
    engine,
    qkv,
    softmax_attention,
)

# -- derivatives


SHARED = {
    "squared relu": (lambda s: torch.relu(s) ** 2, lambda s: torch.relu(s) ** 2),
    "square of a double": (lambda s: (2 * s) ** 2, lambda s: (2 * s) ** 2),
    "square of tanh": (lambda s: torch.tanh(s) ** 2, lambda s: torch.tanh(s) ** 2),
    "product with itself": (
        lambda s: (s + 1) * torch.sigmoid(s + 1),
        lambda s: (s + 1) * torch.sigmoid(s + 1),
    ),
    "abs and max": (
        lambda s: torch.maximum(abs(s), 0.3 * s + 1),
        lambda s: torch.maximum(abs(s), 0.3 * s + 1),
    ),
    "exp log sqrt": (
        lambda s: torch.log(1 + torch.exp(s)) * torch.sqrt(s * s + 1),
        lambda s: torch.log(1 + torch.exp(s)) * torch.sqrt(s * s + 1),
    ),
    "waves": (lambda s: torch.sin(s) * torch.cos(2 * s), lambda s: torch.sin(s) * torch.cos(2 * s)),
    "where": (lambda s: torch.where(s > 0, s * s, -s), lambda s: torch.where(s > 0, s * s, -s)),
}


@pytest.mark.parametrize("name", SHARED)
def test_score_functions_with_shared_values(name: str) -> None:
    traced, dense = SHARED[name]
    q, k, v = qkv(requires_grad=True)
    scale = 0.1  # squares of larger scores magnify the rounding of either side
    built = engine(score_mod=lambda score, b, h, q_idx, kv_idx: traced(score), scale=scale)
    assert_same_gradients(built(q, k, v), softmax_attention(q, k, v, scale, dense), [q, k, v])


def test_one_tensor_read_twice() -> None:
    bias = torch.randn(50, requires_grad=True)
    built = engine(score_mod=lambda s, b, h, q_idx, kv_idx: s + bias[q_idx] * bias[kv_idx], scale=0.3)
    q, k, v = qkv(requires_grad=True)
    wanted = softmax_attention(q, k, v, 0.3, lambda s: s + bias[:, None] * bias[None, :])
    assert_same_gradients(built(q, k, v), wanted, [q, k, v, bias])


def test_indices_through_an_index_tensor() -> None:
    bucket = torch.randint(0, 7, (50,))
    table = torch.randn(4, 7, requires_grad=True)
    built = engine(score_mod=lambda s, b, h, q_idx, kv_idx: s + table[h, bucket[kv_idx]], scale=0.3)
    q, k, v = qkv(requires_grad=True)
    wanted = softmax_attention(q, k, v, 0.3, lambda s: s + table[:, bucket][:, None, :])
    assert_same_gradients(built(q, k, v), wanted, [q, k, v, table])


def test_indices_as_values() -> None:
    built = engine(
        score_mod=lambda s, b, h, q_idx, kv_idx: s * 0.5 + (h + 1) * 0.01 * (kv_idx - q_idx) % 3 - b // 2
    )
    q, k, v = qkv(requires_grad=True)
    q_idx, kv_idx, h = torch.arange(50)[:, None], torch.arange(50)[None, :], torch.arange(4)[:, None, None]
    wanted = softmax_attention(q, k, v, 1.0, lambda s: s * 0.5 + (h + 1) * 0.01 * (kv_idx - q_idx) % 3)
    assert_same_gradients(built(q, k, v), wanted, [q, k, v])


def test_floor_division_of_negative_numbers() -> None:
    built = engine(
        mask_mod=lambda b, h, q_idx, kv_idx: ((q_idx - kv_idx) // 7 == -2) | ((kv_idx - 30) % 5 == 3)
    )
    q, k, v = qkv(heads=2)
    q_idx, kv_idx = torch.arange(50)[:, None], torch.arange(50)[None, :]
    visible = ((q_idx - kv_idx) // 7 == -2) | ((kv_idx - 30) % 5 == 3)
    torch.testing.assert_close(built(q, k, v), softmax_attention(q, k, v, D**-0.5, lambda s: s, visible))


def test_gradcheck() -> None:
    slopes = torch.rand(4, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(9, 11, dtype=torch.float64, requires_grad=True)

    def score_mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return 3 * torch.tanh(score / 3) + slopes[h] * (kv_idx - q_idx) + bias[q_idx, kv_idx]

    built = engine(score_mod=score_mod, mask_mod=causal, dtype=torch.float64, scale=0.4)
    q, k, v = qkv(9, 11, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda q, k, v, *_: built(q, k, v), (q, k, v, slopes, bias))


# -- rows, lengths, layouts


def test_rows_without_a_key_are_zero_and_have_zero_gradients() -> None:
    built = engine(mask_mod=lambda b, h, q_idx, kv_idx: (kv_idx < q_idx - 20) & (kv_idx > 3))
    q, k, v = qkv(requires_grad=True)
    o, rows = built(q, k, v, return_final_rowscales=True)
    assert (o[:, :25] == 0).all()
    assert (rows["lse"][:, :, :25] == float("-inf")).all()
    assert not rows["lse"][:, :, 26:].isinf().any()
    dq, dk, dv = torch.autograd.grad(o, (q, k, v), torch.randn_like(o))
    assert (dq[:, :25] == 0).all()
    assert (dk[:, :4] == 0).all() and (dv[:, :4] == 0).all()
    assert not any(x.isnan().any() for x in (o, dq, dk, dv))


def test_scores_of_minus_infinity_count_as_hidden() -> None:
    def score_mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return torch.where(kv_idx < q_idx, score, -float("inf"))

    built = engine(score_mod=score_mod, scale=0.3)
    q, k, v = qkv(requires_grad=True)
    o = built(q, k, v)
    assert (o[:, 0] == 0).all()
    gradients = torch.autograd.grad(o, (q, k, v), torch.randn_like(o))
    assert not any(x.isnan().any() for x in gradients)
    visible = torch.arange(50)[None, :] < torch.arange(50)[:, None]
    wanted = softmax_attention(q, k, v, 0.3, lambda s: s, visible)
    torch.testing.assert_close(o[:, 1:], wanted[:, 1:], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("hostile", ["log", "reciprocal", "overflow"])
def test_functions_that_explode_at_hidden_pairs(hostile: str) -> None:
    """A hidden pair is never NaN's way in, whatever the function or its derivative is there."""
    functions: dict[str, Callable[[Any], Any]] = {
        "log": lambda x: torch.log(x),
        "reciprocal": lambda x: 1 / x,
        "overflow": lambda x: torch.exp(x * 1000),
    }
    compute = functions[hostile]
    mod = lambda s, b, h, q_idx, kv_idx: (
        s + compute((q_idx - kv_idx + 0.0) if hostile != "overflow" else (kv_idx - q_idx + 0.0))
    )
    built = engine(score_mod=mod, mask_mod=lambda b, h, q_idx, kv_idx: kv_idx < q_idx, scale=0.3)
    q, k, v = qkv(requires_grad=True)
    o = built(q, k, v)
    gradients = torch.autograd.grad(o, (q, k, v), torch.randn_like(o))
    assert not any(x.isnan().any() for x in (o, *gradients))
    torch.testing.assert_close(o.double(), built.reference(q, k, v), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("q_len", "kv_len"), [(1, 1), (7, 0), (0, 5), (33, 64), (64, 33), (65, 129), (300, 1)]
)
def test_lengths(q_len: int, kv_len: int) -> None:
    built = engine(dim_v=24)
    q, k, v = qkv(q_len, kv_len, dim_v=24, requires_grad=True)
    o = built(q, k, v)
    assert o.shape == (2, q_len, 4, 24)
    gradients = torch.autograd.grad(o, (q, k, v), torch.ones_like(o))
    assert [g.shape for g in gradients] == [q.shape, k.shape, v.shape]
    if kv_len == 0:
        assert (o == 0).all()
    else:
        torch.testing.assert_close(o, softmax_attention(q, k, v, D**-0.5, lambda s: s), rtol=2e-5, atol=2e-5)


def test_large_scores_do_not_overflow() -> None:
    q, k, v = (x * 40 for x in qkv())
    built = engine(mask_mod=causal)
    o = built(q, k, v)
    assert o.isfinite().all()
    torch.testing.assert_close(o.double(), built.reference(q, k, v), rtol=1e-3, atol=1e-2)


def test_layouts_and_strides_agree() -> None:
    q, k, v = qkv()
    wanted = engine(mask_mod=causal)(q, k, v)
    other = engine(mask_mod=causal, layout="bhsd")(*(x.transpose(1, 2) for x in (q, k, v)))
    assert torch.equal(other.transpose(1, 2), wanted)
    spread = [torch.empty(*x.shape[:3], 2 * x.shape[3])[..., ::2].copy_(x) for x in (q, k, v)]
    assert all(x.stride(3) == 2 for x in spread)
    torch.testing.assert_close(engine(mask_mod=causal)(*spread), wanted, rtol=1e-6, atol=1e-6)
    backwards = [x.flip(1).contiguous().flip(1) for x in (q, k, v)]
    assert torch.equal(engine(mask_mod=causal)(*backwards), wanted)


def test_expanded_inputs() -> None:
    q, k, v = qkv()
    k, v = (x[:1].expand(2, -1, -1, -1) for x in (k, v))
    torch.testing.assert_close(engine()(q, k, v), engine()(q, k.contiguous(), v.contiguous()))


def test_row_values() -> None:
    q, k, v = qkv()
    _, rows = engine()(q, k, v, return_final_rowscales=True)
    s = q.transpose(1, 2) @ k.transpose(1, 2).repeat_interleave(2, 1).mT * D**-0.5
    assert rows["lse"].dtype is torch.float32
    torch.testing.assert_close(rows["lse"], torch.logsumexp(s, -1))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_results_do_not_depend_on_the_number_of_threads(threads: int) -> None:
    q, k, v = qkv(300, requires_grad=True)
    slopes = torch.rand(4, requires_grad=True)
    built = engine(score_mod=lambda s, b, h, q_idx, kv_idx: s + slopes[h] * (kv_idx - q_idx), mask_mod=causal)
    weights = torch.randn(2, 300, 4, D)
    before = torch.get_num_threads()
    results = []
    try:
        for count in (1, threads):
            torch.set_num_threads(count)
            o = built(q, k, v)
            results.append((o, *torch.autograd.grad(o, (q, k, v, slopes), weights)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# -- custom inputs


def test_custom_inputs_get_gradients() -> None:
    io = CustomIO({"gate": (1,), "bias": ("batch", "heads", "seq_len", "seq_len_kv")})

    def score_mod(score: Any, custom: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return score * custom.input_tensors["gate"] + custom.input_tensors["bias"]

    built = engine(score_mod=score_mod, custom_fwd_inputs=io, scale=0.3)
    q, k, v = qkv(20, 30, requires_grad=True)
    gate, bias = torch.rand(1, requires_grad=True), torch.randn(2, 4, 20, 30, requires_grad=True)
    wanted = softmax_attention(q, k, v, 0.3, lambda s: s * gate + bias)
    assert_same_gradients(built(q, k, v, gate, bias), wanted, [q, k, v, gate, bias])


def test_mask_with_custom_inputs() -> None:
    """Seed: the offset of q is passed by custom_fwd_inputs."""
    io = CustomIO({"offset": (1,)})
    built = engine(
        mask_mod=lambda b, h, q, kv, custom: kv <= q + custom.input_tensors["offset"], custom_fwd_inputs=io
    )
    q, k, v = qkv(10, 30)
    for offset in (0, 20):
        visible = torch.arange(30)[None, :] <= torch.arange(10)[:, None] + offset
        wanted = softmax_attention(q, k, v, D**-0.5, lambda s: s, visible)
        got = built(q, k, v, torch.tensor([offset], dtype=torch.int32))
        torch.testing.assert_close(got, wanted, rtol=2e-5, atol=2e-5)


def test_bool_custom_inputs() -> None:
    io = CustomIO({"keep": ("batch", "seq_len_kv")})
    built = engine(
        mask_mod=lambda b, h, q, kv, custom: custom.input_tensors["keep"][b, kv], custom_fwd_inputs=io
    )
    q, k, v = qkv()
    keep = torch.rand(2, 50) > 0.5
    wanted = softmax_attention(q, k, v, D**-0.5, lambda s: s, keep[:, None, None, :])
    torch.testing.assert_close(built(q, k, v, keep), wanted, rtol=2e-5, atol=2e-5)


# -- normalisers


@pytest.mark.parametrize("rule", [SeedSoftmax, DerivedSoftmax])
def test_user_normalisers(rule: type[OnlineFunc]) -> None:
    q, k, v = qkv(requires_grad=True)
    built = engine(online_func=rule(), mask_mod=causal)
    visible = torch.arange(50)[None, :] <= torch.arange(50)[:, None]
    o, rows = built(q, k, v, return_final_rowscales=True)
    assert_same_gradients(o, softmax_attention(q, k, v, D**-0.5, lambda s: s, visible), [q, k, v])
    assert set(rows) >= {"lse"}


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_a_minimum_that_has_seen_nothing_yet(backend: str) -> None:
    """The first tiles of a row hold no visible key, while other rows of the tile see some of theirs."""
    visible = torch.arange(300)[None, :] >= torch.arange(40)[:, None] % 7 * 40
    for q_len in (1, 40):
        q, k, v = (torch.randn(1, n, 2, D, requires_grad=True) for n in (q_len, 300, 300))
        built = engine(
            online_func=Softmin(),
            mask_mod=lambda b, h, q_idx, kv_idx: kv_idx >= (q_idx + 40 - q_len) % 7 * 40,
            backend=backend,
        )
        wanted = softmax_attention(q, k, v, D**-0.5, lambda s: -s, visible[40 - q_len :])
        assert_same_gradients(built(q, k, v), wanted, [q, k, v])


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_a_minimum_in_rows_without_keys(backend: str) -> None:
    """Such a row keeps its initial +inf, and nothing made from it is NaN."""
    built = engine(
        online_func=Softmin(),
        mask_mod=lambda b, h, q_idx, kv_idx: (q_idx % 3 != 0) & (kv_idx != 5),
        backend=backend,
    )
    for q_len in (1, 40):
        q, k, v = qkv(q_len, 60, requires_grad=True)
        o, rows = built(q, k, v, return_final_rowscales=True)
        assert (o[:, ::3] == 0).all()
        assert (rows["row_min"][..., ::3] == float("inf")).all()
        assert (rows["inverse_sum"][..., ::3] == 0).all()
        gradients = torch.autograd.grad(o, (q, k, v), torch.randn_like(o))
        assert (gradients[0][:, ::3] == 0).all()
        assert not any(x.isnan().any() for x in (o, *rows.values(), *gradients))
        torch.testing.assert_close(o.double(), built.reference(q, k, v), rtol=1e-4, atol=1e-4)

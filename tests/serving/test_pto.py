"""The operator of DeepSeek-V3.2-Exp over 20 tensors: parts and whole against float64 formulas, caches, bad input."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import attn_engine.library as library
from attn_engine.errors import NotATensor, ShapeMismatch, UnknownBackend, UnsupportedOnBackend, WrongArgument
from attn_engine.library import (
    from_nz,
    hadamard,
    indexer_prolog,
    lightning_indexer,
    mla_prolog,
    npu_sparse_attention_pto,
    sparse_attention_pto,
    to_nz,
)
from attn_engine.runtime.cpu_compile import find_compiler
from attn_engine.runtime.paged_checks import CacheNotDifferentiable, WrongPages
from tests.serving.pto_formulas import (
    Operands,
    Sizes,
    attended,
    operands,
    prologs,
    scores,
    seen,
    whole,
    written,
)
from tests.serving.test_prologs import INDEXER, MLA

CACHES = ("kv_cache", "kr_cache", "index_k_cache")
SCALE = 40**-0.5  # (kv_rank + rope)^-0.5
LENGTHS = [37, 0, 70, 3]


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int16 if x.element_size() == 2 else torch.int32)


def chosen_by_parts(given: Operands, after: dict[str, Tensor], topk: int) -> Tensor:
    """What the operator chooses, part by part."""
    t = given.tensors
    c_q = mla_prolog(*(t[n] for n in MLA)).c_q
    found = indexer_prolog(t["x"], c_q, *(t[n] for n in INDEXER))
    return lightning_indexer(
        found.query, after["index_k_cache"], found.weights, actual_seq_lengths_key=t["act_seqs"].clamp_min(0),
        block_table=t["block_table"], sparse_count=topk,
    )  # fmt: skip


@pytest.mark.parametrize("s1", [1, 2, 3, 4])
def test_against_the_formulas(s1: int, seed: int) -> None:
    """Sets by the margin rule, outputs with the sets given, caches to the bit; unused pages hold NaN."""
    torch.manual_seed(seed)
    given, topk = operands(LENGTHS, s1), 12
    call = dict(zip(given.tensors, given.copy(), strict=True))
    out = sparse_attention_pto(*call.values(), topk=topk)
    assert out.shape == (4, s1, 3, 32)
    g = prologs(given)
    caches = written(given, g)
    chosen = chosen_by_parts(given, call, topk)
    for b in range(4):
        for i in range(s1):
            taken = [u for u in chosen[b, i, 0].tolist() if u >= 0]
            count = seen(given, b, i)
            assert len(taken) == len(set(taken)) == min(topk, count)
            if count:
                score = scores(given, g, caches, b, i)
                left = [u for u in range(count) if u not in taken]
                assert not left or float(score[left].max()) <= float(score[taken].min()) + 1e-5
            want = attended(given, g, caches, b, i, taken, SCALE)
            torch.testing.assert_close(out[b, i].double(), want, rtol=1e-6, atol=2e-6)
    new = mla_prolog(*(given.tensors[n] for n in MLA))
    key = indexer_prolog(given.tensors["x"], new.c_q, *(given.tensors[n] for n in INDEXER)).key
    for name, rows in zip(CACHES, (new.latent, new.k_rope, key), strict=True):
        want_cache = given.tensors[name].clone()
        for b, i in (given.tensors["cache_index"] >= 0).nonzero().tolist():
            slot = int(given.tensors["cache_index"][b, i])
            want_cache[slot // 16, slot % 16, 0] = rows[b, i]
        assert torch.equal(bits(call[name]), bits(want_cache))
        assert not torch.equal(bits(call[name]), bits(given.tensors[name]))
    others = [n for n in call if n not in CACHES]
    assert all(torch.equal(call[n], given.tensors[n]) for n in others)


def test_two_tokens_as_two_steps(seed: int) -> None:
    torch.manual_seed(seed)
    given = operands([37, 2, 70], 2)
    both = sparse_attention_pto(*given.copy(), topk=12)
    call = dict(zip(given.tensors, given.copy(), strict=True))
    for i in range(2):
        one = {n: call[n][:, i : i + 1] for n in ("x", "sin", "cos", "cache_index")}
        lengths = given.tensors["act_seqs"] - 1 + i
        found = sparse_attention_pto(*{**call, **one, "act_seqs": lengths}.values(), topk=12)
        torch.testing.assert_close(found, both[:, i : i + 1], rtol=1e-5, atol=1e-6)


def test_pages_lie_anywhere_and_reruns_agree(seed: int) -> None:
    torch.manual_seed(seed)
    given = operands(LENGTHS, 2)
    want = sparse_attention_pto(*given.copy(), topk=12)
    for _ in range(3):
        assert torch.equal(sparse_attention_pto(*given.copy(), topk=12), want)
    call = dict(zip(given.tensors, given.copy(), strict=True))
    order = torch.randperm(len(call["kv_cache"]))
    place = order.argsort()
    table, index = call["block_table"], call["cache_index"].long()
    inside = (table >= 0) & (table < len(order))
    call["block_table"] = torch.where(inside, place[torch.where(inside, table, 0).long()], -5)
    call["cache_index"] = torch.where(index >= 0, place[index.clamp_min(0) // 16] * 16 + index % 16, -9)
    call |= {n: call[n][order] for n in CACHES}
    assert torch.equal(sparse_attention_pto(*call.values(), topk=12), want)


def test_slots_need_not_be_those_of_the_table(seed: int) -> None:
    """New rows go where they are told to, then keys are read by the table: as golden data, drawn at random."""
    torch.manual_seed(seed)
    given = operands([37, 16, 70], 2)
    t = given.tensors
    for n in CACHES:
        t[n] = torch.randn_like(t[n])
    t["cache_index"] = torch.randperm(t["kv_cache"].shape[0] * 16)[:6].view(3, 2)
    out = sparse_attention_pto(*given.copy(), topk=200)
    torch.testing.assert_close(out.double(), whole(given, 200, SCALE), rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(
        sparse_attention_pto(*given.copy(), topk=200, softmax_scale=0.3).double(),
        whole(given, 200, 0.3), rtol=3e-6, atol=3e-6,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["first_halves", "last_interleaved"])
def test_rotations_of_the_indexer(kind: str, seed: int) -> None:
    torch.manual_seed(seed)
    given = operands([60], 1)
    want = whole(given, 8, SCALE, kind)
    out = sparse_attention_pto(*given.copy(), topk=8, indexer_rope=kind)
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-5)
    call = dict(zip(given.tensors, given.copy(), strict=True))
    call["index_k_cache"] = hadamard(call["index_k_cache"])  # as a cache of such keys is
    out = sparse_attention_pto(*call.values(), topk=8, indexer_rope=kind, hadamard=True)
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-5)


def test_what_is_added_below_the_roots(seed: int) -> None:
    """Each of the two eps goes to its own norms."""
    torch.manual_seed(seed)
    given = operands([60, 9], 1)
    for eps, of_layer_norm in ((0.5, 1e-6), (1e-5, 3.0)):
        out = sparse_attention_pto(*given.copy(), topk=8, eps=eps, layer_norm_eps=of_layer_norm)
        want = whole(given, 8, SCALE, eps=eps, ln_eps=of_layer_norm)
        torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-5)


def test_lengths_that_leave_nothing_to_see(seed: int) -> None:
    """A sequence of length 0 or less gives zeros; one shorter than the new tokens gives zeros in the first of them."""
    torch.manual_seed(seed)
    given = operands([0, 1, 5], 3)
    given.tensors["act_seqs"][0] = -4
    out = sparse_attention_pto(*given.copy(), topk=4)
    assert not out[0].any()
    assert not out[1, :2].any()
    assert bool(out[1, 2].any()) and bool(out[2].any())
    empty = operands([], 2)
    assert sparse_attention_pto(*empty.copy(), topk=4).shape == (0, 2, 3, 32)


def test_bfloat16(seed: int) -> None:
    """Rounded where the golden code rounds, but for the weights of softmax; without rounding nearer to the formulas."""
    torch.manual_seed(seed)
    given = operands(LENGTHS, 2, dtype=torch.bfloat16)
    out = sparse_attention_pto(*given.copy(), topk=200)
    assert out.dtype is torch.bfloat16
    want = whole(given, 200, SCALE)
    torch.testing.assert_close(out.double(), want, rtol=0.03, atol=0.03)
    exact = sparse_attention_pto(*given.copy(), topk=200, rounding=False)
    torch.testing.assert_close(exact.double(), want, rtol=0.02, atol=0.02)


def test_the_other_name_and_weights_in_tiles(seed: int) -> None:
    torch.manual_seed(seed)
    given = operands([20], 1, Sizes(h=48, q_rank=32, n1=2, nope=16, rope=16, kv_rank=32, heads=2, dim=16))
    assert npu_sparse_attention_pto is sparse_attention_pto
    want = sparse_attention_pto(*given.copy(), topk=5, quantisation="fp8")
    call = dict(zip(given.tensors, given.copy(), strict=True))
    for name in ("w_dq", "w_uq_qr", "w_dkv_kr", "w_idx_qb", "w_idx_k"):
        call[name] = from_nz(to_nz(call[name]))
    assert torch.equal(sparse_attention_pto(*call.values(), topk=5, quantisation="fp8"), want)


def put(index: tuple[int, ...], value: int) -> Any:
    def change(x: Tensor) -> Tensor:
        x = x.clone()
        x[index] = value
        return x

    return change


def twice(x: Tensor) -> Tensor:
    x = x.clone()
    x[0, 1] = x[0, 0]
    return x


# A size that two tensors share is that of the first: which one is named where another is a column short.
SHORT = {
    "w_dq": "w_uq_qr", "w_uq_qr": "w_uq_qr", "w_dkv_kr": "w_dkv_kr", "gamma_cq": "gamma_cq",
    "gamma_ckv": "gamma_ckv", "sin": "cos", "cos": "cos", "w_uk": "w_dkv_kr", "w_idx_qb": "w_idx_qb",
    "w_idx_k": "w_idx_qb", "w_idx_proj": "w_idx_qb", "in_gamma_k": "in_gamma_k", "in_beta_k": "in_beta_k",
    "kv_cache": "kv_cache", "kr_cache": "kr_cache", "index_k_cache": "index_k_cache",
}  # fmt: skip
WRONG = [
    ("x", lambda x: x[..., :-1], ShapeMismatch, "w_dq"),
    ("x", lambda x: x.tolist(), NotATensor, "x"),
    ("w_idx_qb", lambda x: x[:, :-1], ShapeMismatch, "w_idx_qb"),
    ("w_uk", lambda x: x[:-1], ShapeMismatch, "w_uq_qr"),
    ("kv_cache", lambda x: x[..., :-1], ShapeMismatch, "kv_cache"),
    ("kr_cache", lambda x: x[:-1], ShapeMismatch, "kr_cache"),
    ("index_k_cache", lambda x: x.bfloat16(), WrongArgument, "index_k_cache"),
    ("kv_cache", lambda x: x[:1].expand(len(x), -1, -1, -1), WrongPages, "kv_cache"),
    ("w_dkv_kr", lambda x: x[None], ShapeMismatch, "w_dkv_kr"),
    ("cache_index", put((1, 0), 10**6), WrongPages, "cache_index"),
    ("cache_index", twice, WrongPages, "cache_index"),
    ("cache_index", lambda x: x.float(), WrongPages, "cache_index"),
    ("cache_index", lambda x: x[:, :1], ShapeMismatch, "cache_index"),
    ("block_table", put((0, 1), -1), WrongPages, "block_table"),
    ("block_table", put((0, 2), -1), WrongPages, "block_table"),
    ("block_table", put((0, 0), 10**6), WrongPages, "block_table"),
    ("block_table", lambda x: x[:1], ShapeMismatch, "block_table"),
    ("act_seqs", put((0,), 1000), WrongPages, "act_seqs"),
    ("act_seqs", lambda x: x.bool(), WrongPages, "act_seqs"),
    ("w_dq", lambda x: x.requires_grad_(), CacheNotDifferentiable, "w_dq"),
    *((name, lambda x: x[..., :-1].contiguous(), ShapeMismatch, named) for name, named in SHORT.items()),
    *((name, lambda x: None, NotATensor, name) for name in ("w_dq", "block_table", "kr_cache")),
    *((name, lambda x: x.double(), WrongArgument, name) for name in ("w_idx_proj", "gamma_cq", "kv_cache")),
]


@pytest.mark.parametrize(("name", "change", "error", "argument"), WRONG)
def test_bad_input_writes_nothing(
    name: str, change: Any, error: type[Exception], argument: str, seed: int
) -> None:
    torch.manual_seed(seed)
    given = operands([37, 4], 2)
    call = dict(zip(given.tensors, given.copy(), strict=True))
    call[name] = change(call[name])
    with pytest.raises(error) as found:
        sparse_attention_pto(*call.values(), topk=4)
    assert found.value.details["argument"] == argument  # pyright: ignore[reportAttributeAccessIssue]
    for n in CACHES:
        if n != name:
            assert torch.equal(bits(call[n]), bits(given.tensors[n]))


@pytest.mark.parametrize(
    "options",
    [
        {"topk": 0},
        {"topk": 2.5},
        {"indexer_rope": "all"},
        {"quantisation": "int4"},
        {"softmax_scale": "1"},
        {"eps": -1.0},
        {"layer_norm_eps": None},
    ],
)
def test_bad_options_write_nothing(options: dict[str, Any], seed: int) -> None:
    given = operands([37, 4], 2)
    call = dict(zip(given.tensors, given.copy(), strict=True))
    with pytest.raises(WrongArgument) as found:
        sparse_attention_pto(*call.values(), **options)
    assert found.value.details["argument"] == next(iter(options))
    untouched(call, given)


@pytest.mark.parametrize("backend", ["tilelang", "tpu"])
def test_other_backends_write_nothing(backend: str, seed: int) -> None:
    given = operands([37, 4], 2)
    call = dict(zip(given.tensors, given.copy(), strict=True))
    with pytest.raises((UnsupportedOnBackend, UnknownBackend), match=backend):
        sparse_attention_pto(*call.values(), topk=4, backend=backend)
    untouched(call, given)


@pytest.mark.parametrize("part", ["lightning_indexer", "sparse_flash_attention"])
def test_what_fails_late_leaves_the_caches(part: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler that is missing, say: after new rows were written, which were seen in the caches by then."""
    given = operands([37, 4], 2)
    call = dict(zip(given.tensors, given.copy(), strict=True))

    def fails(*_: Any, **__: Any) -> None:
        assert not torch.equal(bits(call["kv_cache"]), bits(given.tensors["kv_cache"]))
        raise MemoryError

    monkeypatch.setattr(sys.modules[sparse_attention_pto.__module__], part, fails)
    with pytest.raises(MemoryError):
        sparse_attention_pto(*call.values(), topk=4)
    untouched(call, given)


def untouched(call: dict[str, Tensor], given: Operands) -> None:
    assert all(torch.equal(bits(call[n]), bits(given.tensors[n])) for n in CACHES)


@pytest.mark.slow
@pytest.mark.skipif(find_compiler() is None, reason="needs a C++ compiler")
def test_sizes_of_the_model(seed: int) -> None:
    """The seed's dimensions with 16 heads of 128, bfloat16, against float64 in the golden code's own tolerance."""
    torch.manual_seed(seed)
    sizes = Sizes(
        h=7168, q_rank=1536, n1=16, nope=128, rope=64, kv_rank=512, heads=64, dim=128, block_size=128
    )
    given = operands([300, 1000], 2, sizes, torch.bfloat16)
    out = sparse_attention_pto(*given.copy())
    want = whole(given, 2048, 576**-0.5)
    wrong = (out.double() - want).abs() > 1e-2 + 0.03 * want.abs()
    assert float(wrong.double().mean()) < 0.03
    assert not out.isnan().any()


def test_every_part_is_in_the_library() -> None:
    for name in (
        "mla_prolog",
        "indexer_prolog",
        "lightning_indexer",
        "sparse_flash_attention",
        "write_to_slots",
    ):
        assert name in library.__all__

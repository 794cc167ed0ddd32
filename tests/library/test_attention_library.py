"""AttentionLibrary: every attention and every mask by name, against the dense reference and against each other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attn_engine import AttentionEngine, AttentionLibrary, errors, library, meta_tensor
from attn_engine.library import alibi_slopes, causal, t5_bias
from attn_engine.library.catalogue import ATTENTIONS, CALLED, MASKS, Entry
from attn_engine.library.dense.relative_bias import t5_buckets
from attn_engine.library.samples import sample
from tests.part import part_of

HEADS, LENGTH, DIM = 4, 36, 16
LEARNED: dict[str, dict[str, tuple[int, ...]]] = {
    "T5Attention": {"bias": (32, HEADS)},
    "RelativeBiasAttention": {"bias": (HEADS, 31)},
    "PairBiasAttention": {"bias": (LENGTH, LENGTH)},
    "SinkAttention": {"sink": (HEADS,)},
}
SMALL: dict[str, dict[str, Any]] = {
    "AlibiAttention": {"heads": HEADS},
    "RetentionAttention": {"heads": HEADS},
    "SigmoidAttention": {"bias": -2.0},
    "ReluAttention": {"length": LENGTH},
    "SlidingWindow": {"window": 9},
    "Document": {"document_ids": torch.arange(LENGTH, dtype=torch.int32) // 10},
    "SharedPrefix": {"document_ids": torch.arange(LENGTH, dtype=torch.int32) // 10, "length": 5},
    "Chunked": {"chunk": 11},
    "Streaming": {"window": 5, "sinks": 2},
    "Neighbourhood": {"shape": (6, 6), "kernel": 3},
    "SlidingTile": {"shape": (6, 6), "tile": (2, 3), "window": (1, 1)},
    "BlockDiffusion": {"length": LENGTH // 2, "block": 4},
    "VisionCross": {
        "image_of_text": torch.arange(LENGTH, dtype=torch.int32) // 9 - 1,
        "tokens_per_image": 12,
    },
    "Tree": {"parents": [(i - 1) // 2 for i in range(LENGTH)]},
}


def qkv(heads: int = HEADS) -> list[Tensor]:
    return [torch.randn(2, LENGTH, n, DIM, requires_grad=True) for n in (heads, heads // 2, heads // 2)]


def agrees(attention: AttentionLibrary, tensors: list[Tensor], learned: list[Tensor]) -> None:
    """Output and every gradient are those of the reference."""
    out = attention(*tensors)
    want = attention.engine(*tensors).reference(*tensors)
    assert isinstance(want, Tensor)
    torch.testing.assert_close(out, want.float(), atol=2e-5, rtol=2e-5)
    weights = torch.randn_like(out)
    found = torch.autograd.grad(out, [*tensors, *learned], weights)
    wanted = torch.autograd.grad(want, [*tensors, *learned], weights.double())
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other.to(one.dtype), atol=1e-4, rtol=1e-4)


# What is compiled in the fast suite; as a tile program, that has every entry.
COMPILED = (
    "SoftmaxAttention",
    "T5Attention",
    "SinkAttention",
    "ReluAttention",
    "SlidingTile",
    "Document",
    "Tree",
)


def is_fast(name: str, backend: str) -> bool:
    return backend == "torch" or name in COMPILED


@pytest.mark.parametrize(
    ("name", "backend"),
    part_of(is_fast, [n for n, e in ATTENTIONS.items() if e.compose is None], ("torch", "auto")),
)
def test_every_attention(name: str, backend: str) -> None:
    learned = {n: torch.randn(shape, requires_grad=True) for n, shape in LEARNED.get(name, {}).items()}
    attention = AttentionLibrary(name, backend=backend, **SMALL.get(name, {}), **learned)
    agrees(attention, qkv(), [*learned.values()])


@pytest.mark.parametrize(("name", "backend"), part_of(is_fast, MASKS, ("torch", "auto")))
def test_every_mask(name: str, backend: str) -> None:
    agrees(AttentionLibrary(mask_type=name, backend=backend, **SMALL.get(name, {})), qkv(), [])


@pytest.mark.parametrize("entry", [*ATTENTIONS.values(), *MASKS.values()], ids=str)
def test_every_entry_names_its_paper_and_has_samples(entry: Entry) -> None:
    assert entry.summary and "(" in entry.paper, entry
    assert set(sample(entry)) <= set(entry.parameters)
    text = str(AttentionLibrary.list())
    assert str(entry) in text and entry.paper in text


@pytest.mark.parametrize("entry", CALLED.values(), ids=lambda e: e.name)
def test_functions_that_are_called_themselves_are_listed(entry: Entry) -> None:
    text = str(AttentionLibrary.list())
    assert getattr(library, entry.name) is entry.source
    assert entry.summary and "arXiv" in entry.paper and str(entry) in text


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_differential_attention_is_a_difference_of_two(layout: str) -> None:
    attention = AttentionLibrary("differential", layout=layout)
    q, k = torch.randn(2, 2, LENGTH, 4, DIM, requires_grad=True).unbind(0)
    v = torch.randn(2, LENGTH, 2, 2 * DIM, requires_grad=True)
    weight = torch.rand(2, requires_grad=True)
    given = [x if layout == "bshd" else x.transpose(1, 2) for x in (q, k, v)]
    out = attention(*given, weight)
    out = out if layout == "bshd" else out.transpose(1, 2)
    score = torch.einsum("bqhd,bkhd->bhqk", q, k).double() / DIM**0.5
    hidden = torch.ones(LENGTH, LENGTH).triu(1).bool()
    maps = score.masked_fill(hidden, -torch.inf).softmax(-1)
    maps = maps[:, 0::2] - weight[:, None, None] * maps[:, 1::2]
    want = torch.einsum("bhqk,bkhd->bqhd", maps, v.double())
    torch.testing.assert_close(out, want.float())
    leaves = (q, k, v, weight)
    for one, other in zip(
        torch.autograd.grad(out.square().sum(), leaves),
        torch.autograd.grad(want.square().sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    with pytest.raises(errors.WrongArgument, match="twice as many heads"):
        attention(*given[:2], given[0], weight)


@pytest.mark.parametrize("use", ["Prefill", "Decode"])
@pytest.mark.parametrize("rows", [1, 5, LENGTH])
def test_the_last_queries_are_those_of_the_whole_sequence(use: str, rows: int) -> None:
    parts = {"heads": HEADS, "window": 9}
    q, k, v = qkv()
    whole = AttentionLibrary("alibi", "sliding_window", **parts)(q, k, v)
    last = AttentionLibrary("alibi", "sliding_window", use, **parts)(q[:, -rows:], k, v)
    torch.testing.assert_close(last, whole[:, -rows:])


def test_the_seeds_own_call_is_causal_softmax() -> None:
    attention = AttentionLibrary(attn_type="SoftmaxAttention", mask_type="Causal", use_types="Train")
    q, k, v = qkv()
    want = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), is_causal=True, enable_gqa=True
    )
    torch.testing.assert_close(attention(q, k, v), want.transpose(1, 2))


def test_one_description_serves_types_and_takes_a_meta() -> None:
    attention = AttentionLibrary()
    for dtype in (torch.float32, torch.bfloat16):
        assert attention(*(x.to(dtype) for x in qkv())).dtype is dtype
    metas = [meta_tensor(None, None, None, DIM, dtype=torch.float32)] * 3
    made = AttentionLibrary(qkv_meta=metas)
    assert isinstance(made.engine(*qkv()), AttentionEngine)
    with pytest.raises(errors.AttnEngineError):
        made(*(x.double() for x in qkv()))
    assert "kv_idx <= q_idx" in made.source() and "kv_idx <= q_idx" in str(made.explain())


def test_scores_are_scaled_as_the_paper_scales_them() -> None:
    assert AttentionLibrary("T5", bias=torch.zeros(32, HEADS)).engine(*qkv()).scale == 1
    assert AttentionLibrary("SoftCap").engine(*qkv()).scale == DIM**-0.5
    assert AttentionLibrary("SoftCap", scale=0.3).engine(*qkv()).scale == 0.3


@pytest.mark.parametrize("bidirectional", [False, True])
def test_t5_buckets_are_those_of_its_checkpoints(bidirectional: bool) -> None:
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    distance = torch.arange(-128, 129)
    want = t5.T5Attention._relative_position_bucket(distance, bidirectional, 32, 128)
    assert torch.equal(t5_buckets(32, 128, bidirectional), want.int())


def test_slopes_of_heads_that_are_no_power_of_two() -> None:
    assert torch.equal(alibi_slopes(6)[:4], alibi_slopes(4))
    assert torch.allclose(alibi_slopes(6)[4:], alibi_slopes(8)[[0, 2]])


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "attention": ({"attn_type": "Softmx"}, errors.UnknownOption, "SoftmaxAttention"),
    "mask": ({"mask_type": causal()}, errors.UnknownOption, "SlidingWindow"),
    "use": ({"use_types": "Test"}, errors.UnknownOption, "Prefill"),
    "use of a mask": ({"mask_type": "Tree", "use_types": "Decode"}, errors.UseNotSupported, "Tree"),
    "parameter": ({"windw": 3, "mask_type": "SlidingWindow"}, errors.UnknownOption, "window"),
    "missing": ({"mask_type": "Document"}, errors.MissingParameter, "document_ids"),
    "value": ({"mask_type": "SlidingWindow", "window": 1.5}, errors.WrongArgument, "window"),
    "buckets": ({"attn_type": "T5", "bias": torch.zeros(1, 4)}, errors.WrongArgument, "bias"),
    "layout": (
        {"layout": "hsd", "qkv_meta": [meta_tensor(None, None, None, 16, dtype=torch.float32)] * 3},
        errors.UnknownLayout,
        "hsd",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_mistakes_are_typed(name: str) -> None:
    arguments, error, text = WRONG[name]
    with pytest.raises(error, match=text):
        AttentionLibrary(**arguments)


def test_t5_refuses_too_few_buckets_by_name() -> None:
    with pytest.raises(errors.WrongArgument, match="bias"):
        t5_bias(torch.zeros(3, HEADS), bidirectional=True)

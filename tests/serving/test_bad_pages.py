"""Tables, lengths and caches that are wrong: typed errors that name the tensor, before anything runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attn_engine import AttentionEngine, AttnEngineError, errors, meta_tensor
from attn_engine.runtime.paged_checks import CacheNotDifferentiable, WrongPages
from attn_engine.runtime.sequence_checks import WrongSequences

METAS = [meta_tensor(None, None, None, 16, dtype=torch.float32)] * 3
ENGINE = AttentionEngine(METAS, backend="torch")
TABLE = torch.tensor([[2, 0], [1, -1]], dtype=torch.int32)
LENGTHS = torch.tensor([20, 16], dtype=torch.int32)


def call(**changed: Any) -> Tensor:
    cache = torch.zeros(3, 16, 2, 16)
    given: dict[str, Any] = {"q": torch.zeros(2, 1, 4, 16), "k": cache, "v": cache, "block_table": TABLE}
    return ENGINE(**{**given, "len_kv": LENGTHS, **changed})


BAD: list[tuple[dict[str, Any], type[AttnEngineError], str, str]] = [
    ({"len_kv": torch.tensor([33, 1])}, WrongPages, "len_kv", "element 0 is 33, not 32 or less"),
    ({"len_kv": torch.tensor([3, -1])}, WrongPages, "len_kv", "element 1 is -1"),
    ({"len_kv": torch.tensor([3, 17])}, WrongPages, "block_table", "element [1, 1] is -1, not a page"),
    ({"block_table": torch.tensor([[2, 3], [1, -1]])}, WrongPages, "block_table", "element [0, 1] is 3"),
    ({"block_table": torch.tensor([[2, 2**40], [1, -1]])}, WrongPages, "block_table", "element [0, 1]"),
    ({"block_table": TABLE.float()}, WrongPages, "block_table", "torch.float32"),
    ({"block_table": TABLE[0]}, WrongPages, "block_table", "its shape is (2,)"),
    ({"block_table": TABLE[:1]}, WrongPages, "block_table", "its shape is (1, 2)"),
    ({"len_kv": LENGTHS[:1]}, WrongPages, "len_kv", "its shape"),
    ({"len_kv": LENGTHS.float()}, WrongPages, "len_kv", "torch.float32"),
    ({"len_kv": None}, WrongPages, "len_kv", "left out"),
    ({"start_kv": LENGTHS}, WrongPages, "start_kv", "beside block_table"),
    ({"cu_len_kv": torch.tensor([0, 1, 2])}, WrongPages, "cu_len_kv", "beside block_table"),
    ({"len_q": torch.tensor([2, 1])}, WrongSequences, "len_q", "not 1 or less"),
    ({"k": torch.zeros(16, 2, 16)}, WrongPages, "k", "its shape is (16, 2, 16)"),
    ({"v": torch.zeros(2, 16, 2, 16)}, WrongPages, "v", "its number of pages is 2, not 3"),
    ({"v": torch.zeros(3, 8, 2, 16)}, errors.ShapeMismatch, "v", "length"),
    ({"k": torch.zeros(3, 16, 2, 16).double()}, errors.DtypeMismatch, "k", "float64"),
    ({"k": torch.zeros(3, 16, 2, 8)}, errors.HeadDimMismatch, "k", "8"),
    ({"k": torch.zeros(3, 16, 3, 16), "v": torch.zeros(3, 16, 3, 16)}, errors.HeadsNotDivisible, "", "3"),
    ({"k": torch.zeros(0, 16, 2, 16), "v": torch.zeros(0, 16, 2, 16)}, WrongPages, "k", "pages is 0"),
    ({"q": torch.zeros(1, 4, 16)}, errors.WrongRank, "q", "3"),
    ({"k": 3}, errors.NotATensor, "k", "int"),
    ({"q": torch.zeros(2, 1, 4, 16).requires_grad_()}, CacheNotDifferentiable, "q", "requires a gradient"),
    ({"v": torch.zeros(3, 16, 2, 16).requires_grad_()}, CacheNotDifferentiable, "v", "torch.no_grad()"),
]


@pytest.mark.parametrize(("wrong", "kind", "argument", "word"), BAD)
def test_refused(wrong: dict[str, Any], kind: type[AttnEngineError], argument: str, word: str) -> None:
    with pytest.raises(kind) as found:
        call(**wrong)
    assert found.value.details.get("argument", "") == argument
    assert word in " ".join(str(found.value).split())


def test_unused_entries_may_be_anything() -> None:
    """And what is right runs."""
    table = torch.tensor([[2, 0, 2**31 - 1], [1, -5, 77]], dtype=torch.int32)
    assert call(block_table=table).shape == (2, 1, 4, 16)
    with torch.no_grad():
        assert call(q=torch.zeros(2, 1, 4, 16).requires_grad_()).shape == (2, 1, 4, 16)

"""Each mistake in a traced function is a typed error at the user's line, with the next step."""

from __future__ import annotations

import math
import operator
import pickle

import numpy as np
import pytest
import torch

from attn_engine import errors
from attn_engine.errors import AttnEngineError
from attn_engine.frontend import CustomIO, meta_tensor, trace_mask_mod, trace_score_mod

BIAS = torch.zeros(4, 5, 6)
NUMPY = np.ones(4)
COMPLEX = torch.zeros(4, dtype=torch.complex64)
CUSTOM = CustomIO({"table": ("heads", 8)})

SCORES = {
    "if": (lambda s, b, h, q, k: s if s > 0 else 0 * s, errors.ControlFlowOnTraced, "torch.where"),
    "and": (lambda s, b, h, q, k: torch.where(q > k and h > 0, s, 0), errors.ControlFlowOnTraced, "`&`"),
    "not": (lambda s, b, h, q, k: torch.where(not q > k, s, 0), errors.ControlFlowOnTraced, "`~`"),
    "chain": (lambda s, b, h, q, k: torch.where(0 < q < k, s, 0), errors.ControlFlowOnTraced, "chained"),
    "max": (lambda s, b, h, q, k: max(s, 0), errors.ControlFlowOnTraced, "torch.maximum"),
    "float": (lambda s, b, h, q, k: float(s), errors.NumberFromTraced, "x.float()"),
    "int": (lambda s, b, h, q, k: s * int(q), errors.NumberFromTraced, "x.int()"),
    "math": (lambda s, b, h, q, k: math.exp(s), errors.NumberFromTraced, "torch.exp"),
    "range": (lambda s, b, h, q, k: sum(s for _ in range(q)), errors.NumberFromTraced, "plain ints"),
    "list": (lambda s, b, h, q, k: s * [1, 2, 3][h], errors.NumberFromTraced, "torch.tensor"),
    "loop": (lambda s, b, h, q, k: sum(x for x in s), errors.NumberFromTraced, "one number"),
    "item": (lambda s, b, h, q, k: s.item(), errors.NumberFromTraced, "Keep"),
    "bool": (lambda s, b, h, q, k: s > 0, errors.ScoreIsBool, "mask_mod"),
    "number": (lambda s, b, h, q, k: 3.0, errors.ScoreNotTraced, "3.0"),
    "nothing": (lambda s, b, h, q, k: None, errors.ScoreNotTraced, "return"),
    "tensor": (lambda s, b, h, q, k: torch.zeros(2, 3), errors.ReturnsTensor, "(2, 3)"),
    "captured": (lambda s, b, h, q, k: BIAS, errors.ReturnsTensor, "(4, 5, 6)"),
    "unknown": (lambda s, b, h, q, k: torch.special.i0(s), errors.UnknownOperation, "i0"),
    "reduction": (lambda s, b, h, q, k: torch.max(s), errors.UnknownOperation, "torch.maximum"),
    "method": (lambda s, b, h, q, k: s.erfinv(), errors.UnknownMethod, ".erfinv"),
    "in_place": (lambda s, b, h, q, k: s.add_(1), errors.UnknownMethod, ".add_"),
    "bits": (lambda s, b, h, q, k: s * (q & 3), errors.WrongOperands, "% 4"),
    "bit": (lambda s, b, h, q, k: s * (q & 4), errors.WrongOperands, "division"),
    "power": (lambda s, b, h, q, k: s * (q ^ 2), errors.WrongOperands, "`**`"),
    "shift": (lambda s, b, h, q, k: s * (q >> k), errors.WrongOperands, "// 2**n"),
    "shift_float": (lambda s, b, h, q, k: s << 2, errors.WrongOperands, "a float and 2"),
    "numpy_index": (lambda s, b, h, q, k: s * NUMPY[h], errors.IndexedNumpyArray, "torch.from_numpy"),
    "numpy": (lambda s, b, h, q, k: s * NUMPY, errors.WrongOperands, "a ndarray"),
    "random": (lambda s, b, h, q, k: s + torch.rand(()), errors.UnknownOperation, "capture it"),
    "random_like": (
        lambda s, b, h, q, k: s + torch.randn_like(BIAS)[h],
        errors.UnknownOperation,
        "randn_like",
    ),
    "random_fill": (
        lambda s, b, h, q, k: s + torch.empty(()).uniform_(),
        errors.UnknownOperation,
        "uniform_",
    ),
    "rounding": (lambda s, b, h, q, k: round(s), errors.NumberFromTraced, "torch.round"),
    "invert": (lambda s, b, h, q, k: s * ~q, errors.WrongOperands, "bools"),
    "condition": (lambda s, b, h, q, k: torch.where(q, s, 0), errors.WrongOperands, "bool condition"),
    "string": (lambda s, b, h, q, k: s + "1", errors.WrongOperands, "a str"),
    "plain_number": (lambda s, b, h, q, k: torch.maximum(s, 0), errors.WrongOperands, "torch.clamp"),
    "few_indices": (lambda s, b, h, q, k: s + BIAS[h, q], errors.WrongIndexCount, "[h, q_idx, kv_idx]"),
    "many_indices": (lambda s, b, h, q, k: s + BIAS[b, h, q, k], errors.WrongIndexCount, "4 indices"),
    "no_index": (lambda s, b, h, q, k: s + BIAS, errors.WrongIndexCount, "0 indices"),
    "out_of_range": (lambda s, b, h, q, k: s + BIAS[4, q, k], errors.IndexOutOfRange, "size there is 4"),
    "below_range": (lambda s, b, h, q, k: s + BIAS[h, -6, k], errors.IndexOutOfRange, "-6"),
    "float_index": (lambda s, b, h, q, k: s + BIAS[h, q / 2, k], errors.IndexNotInteger, "//"),
    "complex": (lambda s, b, h, q, k: s + COMPLEX[h], errors.UnsupportedDtype, "complex64"),
    "custom_name": (lambda s, c, b, h, q, k: s + c.input_tensors["bias"], errors.UnknownCustomInput, "table"),
    "custom_index": (lambda s, c, b, h, q, k: s + c.input_tensors["table"], errors.WrongIndexCount, "table"),
    "reduce": (lambda s, b, h, q, k: s + s.get_reduce("mean"), errors.UnknownReduction, "abssum"),
}

MASKS = {
    "number": (lambda b, h, q, k: q - k, errors.MaskIsNotBool, "an int"),
    "plain": (lambda b, h, q, k: 1, errors.MaskIsNotBool, "the int 1"),
    "nothing": (lambda b, h, q, k: None, errors.MaskIsNotBool, "return"),
    "tensor": (lambda b, h, q, k: torch.ones(3, dtype=torch.bool), errors.ReturnsTensor, "(3,)"),
    "brackets": (lambda b, h, q, k: q >= k & h > 0, errors.WrongOperands, "brackets"),
}


@pytest.mark.parametrize("name", SCORES)
def test_score_mistake(name):
    function, error, part = SCORES[name]
    with pytest.raises(error) as caught:
        trace_score_mod(function, CUSTOM)
    check_message(caught.value, part)


@pytest.mark.parametrize("name", MASKS)
def test_mask_mistake(name):
    function, error, part = MASKS[name]
    with pytest.raises(error) as caught:
        trace_mask_mod(function)
    check_message(caught.value, part)


def check_message(error, part):
    assert part in " ".join(str(error).split())
    assert error.location is not None and error.location.path == __file__
    assert f"{error.location.line} | " in str(error) and "^" in str(error)
    assert error.location.text.strip() in str(error)


def test_line_inside_a_longer_function():
    def score_mod(score, b, h, q_idx, kv_idx):
        scaled = score * 2
        if scaled > 1:
            return scaled
        return score

    with pytest.raises(errors.ControlFlowOnTraced) as caught:
        trace_score_mod(score_mod)
    assert caught.value.location.text.strip() == "if scaled > 1:"
    assert caught.value.location.function == "score_mod"


@pytest.mark.parametrize(
    "function",
    [lambda s, b, h: s, lambda s, b, h, q, k, c, d: s, lambda s, b, h, q, k, *, window: s, operator.add, 3],
)
def test_wrong_parameters(function):
    with pytest.raises(errors.WrongParameters):
        trace_score_mod(function)
    with pytest.raises(errors.WrongParameters):
        trace_mask_mod(function)


@pytest.mark.parametrize(
    "shape", [(1, 2, 3, 0), (1, 2, 3, None), (1, 2, -3, 4), (0, 2, 3, 4), (1.5, 2, 3, 4), (1, True, 3, 4)]
)
def test_wrong_meta(shape):
    with pytest.raises(errors.WrongMeta, match=r"meta_tensor\(B, H, S, D"):
        meta_tensor(*shape)


def test_meta():
    with pytest.raises(errors.WrongMeta):
        meta_tensor(1, 2, 3, 4, dtype=torch.int32)
    meta = meta_tensor(None, "heads", 0, 4, dtype=torch.float32)
    assert meta.shape == (None, "heads", 0, 4) and meta.dtype is torch.float32 and meta.dim == 4
    assert meta_tensor(1, 2, 3, 4).dtype is torch.float16


@pytest.mark.parametrize(
    "shapes", [{"a": ("head",)}, {"a": "heads"}, {"a": (0,)}, {1: (1,)}, {"a": (True,)}, {"a": (None,)}]
)
def test_wrong_custom_io(shapes):
    with pytest.raises(errors.WrongCustomIO):
        CustomIO(shapes)


@pytest.mark.parametrize("shapes", [["bias"], "bias", 3, []])
def test_custom_io_of_something_else(shapes):
    with pytest.raises(errors.NotACustomIO, match="dictionary of names") as caught:
        CustomIO(shapes)
    assert ("an int" in str(caught.value)) == (shapes == 3)


def _catalogue(base=AttnEngineError):
    for cls in base.__subclasses__():
        yield cls
        yield from _catalogue(cls)


@pytest.mark.parametrize("cls", list(_catalogue()), ids=lambda c: c.__name__)
def test_catalogue(cls):
    error = cls(**dict.fromkeys(cls.keywords(), "x"))
    assert issubclass(cls, AttnEngineError) and len(cls.__mro__) > 4, "inherit the natural built-in error too"
    assert str(error) and error.location.path == __file__
    assert cls.advice, "every message ends with the next step"
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is cls and str(again) == str(error)
    with pytest.raises(AssertionError):
        cls(nonsense=1)

"""Every mistake that a user can make gets its own error: the type, what it names, the user's line, the next step."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from attn_engine import AttentionEngine, CustomIO, OnlineFunc, errors, meta_tensor

D = 16


def meta(*dims: int, dtype: torch.dtype = torch.float32, heads: int | None = None) -> list[Any]:
    return [meta_tensor(None, heads, None, d, dtype=dtype) for d in (dims or (D, D, D))]


def engine(**options: Any) -> AttentionEngine:
    return AttentionEngine(meta(), **options)


def qkv(length: int = 5, heads: int = 2, kv_heads: int = 2, dim: int = D) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.randn(1, length, heads, dim),
        torch.randn(1, length, kv_heads, dim),
        torch.randn(1, length, kv_heads, dim),
    )


def expect(error: type[Exception], *words: str, run: Callable[[], object]) -> Exception:
    """`run` raises `error`, and its message holds every one of `words`."""
    with pytest.raises(error) as caught:
        run()
    message = str(caught.value)
    for word in words:
        assert re.search(word, message), f"{word!r} is not in: {message}"
    return caught.value


# -- q, k, v


def test_not_a_tensor() -> None:
    q, k, v = qkv()
    expect(errors.NotATensor, "v", "list", run=lambda: engine()(q, k, v.tolist()))


def test_wrong_rank() -> None:
    q, k, v = qkv()
    expect(errors.WrongRank, "k", "3 dimensions", run=lambda: engine()(q, k[0], v))


def test_mixed_dtypes() -> None:
    q, k, v = qkv()
    expect(errors.DtypeMismatch, "k is torch.float64", r"\.to\(", run=lambda: engine()(q, k.double(), v))


def test_dtype_other_than_the_meta() -> None:
    q, k, v = (x.half() for x in qkv())
    expect(errors.MetaMismatch, "float16", r"\.to\(torch.float32\)", run=lambda: engine()(q, k, v))


def test_unsupported_dtype() -> None:
    q, k, v = (x.to(torch.int32) for x in qkv())
    expect(errors.UnsupportedDtype, "int32", run=lambda: engine()(q, k, v))


def test_mixed_devices() -> None:
    q, k, v = qkv()
    expect(errors.DeviceMismatch, "k is on meta", run=lambda: engine()(q, k.to("meta"), v))


def test_wrong_head_dimension() -> None:
    q, k, v = qkv(dim=24)
    expect(errors.HeadDimMismatch, "24", "16", run=lambda: engine()(q, k, v))


def test_heads_not_divisible() -> None:
    q, k, v = qkv(length=50, heads=6, kv_heads=4)
    expect(errors.HeadsNotDivisible, "6", "4", run=lambda: engine()(q, k, v))


def test_lengths_of_k_and_v_differ() -> None:
    q, k, v = qkv()
    expect(errors.ShapeMismatch, "v", "length", run=lambda: engine()(q, k, v[:, :-1]))


def test_batches_differ() -> None:
    q, k, v = qkv()
    expect(errors.ShapeMismatch, "k", "batch", run=lambda: engine()(q, k.repeat(2, 1, 1, 1), v))


def test_the_other_layout_is_recognised() -> None:
    metas = [meta_tensor(None, 2, None, D, dtype=torch.float32)] * 3
    q, k, v = (x.transpose(1, 2) for x in qkv(length=7))
    message = str(expect(errors.WrongLayout, '"bshd"', '"bhsd"', run=lambda: AttentionEngine(metas)(q, k, v)))
    assert "layout=" in message


def test_size_fixed_by_the_meta() -> None:
    metas = [meta_tensor(2, None, None, D, dtype=torch.float32)] * 3
    expect(errors.MetaMismatch, "batch", "2", run=lambda: AttentionEngine(metas)(*qkv()))


@pytest.mark.parametrize("arguments", [(-1, 2, 3, 4), (1, 2, 3, None), (1, 2.5, 3, 4)])
def test_meta_tensor(arguments: tuple[Any, ...]) -> None:
    expect(errors.WrongMeta, "meta_tensor", run=lambda: meta_tensor(*arguments))


def test_meta_is_not_three() -> None:
    expect(errors.WrongMeta, "three", run=lambda: AttentionEngine(meta()[:2]))


# -- options


def test_unknown_layout() -> None:
    expect(errors.UnknownLayout, "bsdh", "bshd", run=lambda: engine(layout="bsdh"))


def test_unknown_backend() -> None:
    expect(errors.UnknownBackend, "opencl", "cpu", run=lambda: engine(backend="opencl"))


def test_unknown_option() -> None:
    expect(errors.UnknownOption, "softcap", "layout", run=lambda: engine(softcap=3))


def test_backend_of_another_device() -> None:
    error = errors.BackendDeviceMismatch if torch.cuda.is_available() else errors.NoGpu
    expect(error, "triton", run=lambda: engine(backend="triton")(*qkv()))


@pytest.mark.parametrize("scale", ["a", torch.tensor(0.5), True], ids=["text", "tensor", "bool"])
def test_scale_is_no_number(scale: Any) -> None:
    expect(errors.WrongArgument, "scale", "score_mod", run=lambda: engine(scale=scale))


def test_arguments_of_the_wrong_kind() -> None:
    expect(errors.WrongMeta, "qkv_meta", "three", run=lambda: AttentionEngine(meta()[0]))  # pyright: ignore
    for rule in ("softmax", object()):
        expect(errors.WrongArgument, "online_func", "OnlineFunc", run=lambda: engine(online_func=rule))
    for io in ({}, {"bias": ("heads",)}):
        expect(errors.AttnEngineError, "CustomIO", run=lambda: engine(custom_fwd_inputs=io))
    expect(errors.WrongParameters, "5|int", run=lambda: engine(score_mod=5))
    expect(errors.WrongParameters, "5|int", run=lambda: engine(mask_mod=5))


def test_unread_custom_inputs_are_checked_at_every_call() -> None:
    built = engine(
        score_mod=lambda s, c, b, h, q, kv: s + c.input_tensors["bias"][h],
        custom_fwd_inputs=CustomIO({"bias": ("heads",), "unread": ("seq_len",)}),
    )
    built(*qkv(), torch.zeros(2), torch.zeros(5))
    expect(errors.CustomInputShape, "unread", run=lambda: built(*qkv(), torch.zeros(2), torch.zeros(3)))


def test_checked_calls_are_not_remembered_without_end() -> None:
    from attn_engine.runtime import call_checks

    factor = 0.0
    built = engine(score_mod=lambda s, b, h, q, kv: s * factor)
    q, k, v = qkv()
    for step in range(call_checks.MOST_REMEMBERED + 5):
        factor = step / 7
        built._bind(q, k, v, (), {})
    (passed,) = built._checks._passed.values()
    assert 0 < len(passed.signatures) <= call_checks.MOST_REMEMBERED


def test_only_q_in_the_other_layout() -> None:
    q, k, v = qkv(7)
    expect(errors.WrongLayout, "q has shape", "bhsd", run=lambda: engine()(q.transpose(1, 2), k, v))


def test_unknown_kernel_name() -> None:
    expect(errors.UnknownOption, "backwards", "forward", run=lambda: engine().source(kernel="backwards"))


def test_backend_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "triton" else find(name, *a)
    )
    run = lambda: engine(backend="triton-interpreter")(*qkv())
    expect(errors.BackendNotInstalled, "triton", "pip install", run=run)


# -- custom inputs


def with_custom() -> AttentionEngine:
    io = CustomIO({"slopes": ("heads",)})
    mod = lambda score, custom, b, h, q_idx, kv_idx: score + custom.input_tensors["slopes"][h]
    return engine(score_mod=mod, custom_fwd_inputs=io)


def test_custom_input_missing() -> None:
    expect(errors.MissingCustomInput, "slopes", run=lambda: with_custom()(*qkv()))


def test_custom_input_extra() -> None:
    x = torch.zeros(2)
    expect(errors.ExtraCustomInput, "number 2", run=lambda: with_custom()(*qkv(), x, x))
    expect(errors.ExtraCustomInput, "bias", run=lambda: with_custom()(*qkv(), x, bias=x))
    expect(errors.ExtraCustomInput, "slopes", run=lambda: with_custom()(*qkv(), x, slopes=x))


def test_custom_input_shape() -> None:
    expect(errors.CustomInputShape, "slopes", r"\(3,\)", run=lambda: with_custom()(*qkv(), torch.zeros(3)))


def test_custom_io_declaration() -> None:
    expect(errors.WrongCustomIO, "lengths", run=lambda: CustomIO({"x": ("lengths",)}))


def test_unknown_custom_input() -> None:
    mod = lambda score, custom, b, h, q_idx, kv_idx: score + custom.input_tensors["bias"]
    io = CustomIO({"slopes": ("heads",)})
    expect(
        errors.UnknownCustomInput, "bias", "slopes", run=lambda: engine(score_mod=mod, custom_fwd_inputs=io)
    )


# -- functions


def branches(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    if score > 0:  # this line is in the message
        return score
    return -score


def test_if_on_a_traced_value() -> None:
    error = expect(
        errors.ControlFlowOnTraced, "torch.where", "test_bad_input.py", run=lambda: engine(score_mod=branches)
    )
    assert "if score > 0:" in str(error)


def test_and_on_a_traced_value() -> None:
    mask = lambda b, h, q_idx, kv_idx: q_idx >= kv_idx and kv_idx > 2
    expect(errors.ControlFlowOnTraced, "`&`", run=lambda: engine(mask_mod=mask))


@pytest.mark.parametrize("convert", [float, int, lambda x: range(10)[x], lambda x: x.item()])
def test_number_from_a_traced_value(convert: Callable[[Any], Any]) -> None:
    mod = lambda score, b, h, q_idx, kv_idx: score * convert(q_idx)
    expect(errors.AttnEngineError, "traced", run=lambda: engine(score_mod=mod))


def test_mask_that_returns_a_number() -> None:
    mask = lambda b, h, q_idx, kv_idx: q_idx - kv_idx
    error = expect(errors.MaskIsNotBool, "int", "Compare", run=lambda: engine(mask_mod=mask))
    assert "q_idx - kv_idx" in str(error)


def test_score_that_returns_a_bool() -> None:
    expect(errors.ScoreIsBool, "mask_mod", run=lambda: engine(score_mod=lambda s, b, h, q, kv: s > 0))


def test_score_that_returns_a_tensor() -> None:
    bias = torch.zeros(5, 5)
    expect(
        errors.AttnEngineError,
        r"bias\[|5, 5|index",
        run=lambda: engine(score_mod=lambda s, b, h, q, kv: s + bias),
    )
    expect(
        errors.AttnEngineError,
        "tensor|traced|computed",
        run=lambda: engine(score_mod=lambda s, b, h, q, kv: bias),
    )


def test_score_that_returns_nothing() -> None:
    expect(errors.ScoreNotTraced, "None", run=lambda: engine(score_mod=lambda s, b, h, q, kv: None))


def test_unknown_operation() -> None:
    mod = lambda s, b, h, q, kv: torch.cumsum(s, 0)
    expect(errors.UnknownOperation, "cumsum", run=lambda: engine(score_mod=mod))
    expect(errors.UnknownOperation, "erfinv", run=lambda: engine(score_mod=lambda s, b, h, q, kv: s.erfinv()))


def test_wrong_number_of_parameters() -> None:
    expect(errors.WrongParameters, "score_mod", run=lambda: engine(score_mod=lambda s, q, kv: s))
    expect(errors.WrongParameters, "mask_mod", run=lambda: engine(mask_mod=lambda q, kv: q >= kv))


def test_wrong_number_of_indices() -> None:
    bias = torch.zeros(2, 5, 5)
    mod = lambda s, b, h, q, kv: s + bias[h, q, kv, 0]
    expect(errors.WrongIndexCount, "bias", "3", run=lambda: engine(score_mod=mod))


def test_index_that_is_not_an_int() -> None:
    bias = torch.zeros(5)
    expect(
        errors.IndexNotInteger, "bias", run=lambda: engine(score_mod=lambda s, b, h, q, kv: s + bias[q / 2])
    )


def test_index_out_of_range() -> None:
    slopes = torch.zeros(2)
    built = engine(score_mod=lambda s, b, h, q, kv: s + slopes[h])
    expect(errors.IndexOutOfRange, "slopes", "3", "2", run=lambda: built(*qkv(heads=4, kv_heads=4)))


def test_difference_out_of_range() -> None:
    table = torch.zeros(5)
    built = engine(score_mod=lambda s, b, h, q, kv: s + table[q - kv])
    expect(errors.IndexOutOfRange, "table", "-4", run=lambda: built(*qkv()))


def test_captured_tensor_on_another_device() -> None:
    slopes = torch.zeros(2, device="meta")
    built = engine(score_mod=lambda s, b, h, q, kv: s + slopes[h])
    expect(errors.CapturedOnOtherDevice, "slopes", "meta", run=lambda: built(*qkv()))


def test_int64_values_beyond_32_bits() -> None:
    ids = torch.tensor([0, 1, 2, 2**40, 4])
    built = engine(mask_mod=lambda b, h, q, kv: ids[q] == ids[kv])
    expect(errors.AttnEngineError, "ids", "32", run=lambda: built(*qkv()))


# -- online functions


class NoForward(OnlineFunc):
    """A normaliser whose weights mix two sums: nothing derives its backward pass here."""

    def __init__(self) -> None:
        super().__init__({"a": 0.0}, {"total": 0.0})

    def online_fwd(self, scores: Any, rows: Any, b: Any, h: Any, q_idx: Any) -> Any:
        a = rows["a"] + scores.get_reduce("sum")
        return (scores - a).tanh(), {"a": a}, 1.0

    def online_fwd_epilogue(self, o: Any, rows: Any, b: Any, h: Any, q_idx: Any) -> Any:
        return o, {"total": rows["a"]}


def test_rule_that_cannot_be_derived() -> None:
    expect(errors.RuleNotDerivable, "NoForward", run=lambda: engine(online_func=NoForward()))


class NoEpilogue(OnlineFunc):
    def online_fwd(self, scores: Any, rows: Any, b: Any, h: Any, q_idx: Any) -> Any:
        return scores, {}, 1.0


def test_online_method_missing() -> None:
    expect(errors.OnlineMethodMissing, "online_fwd_epilogue", run=lambda: engine(online_func=NoEpilogue()))


def test_gradient_that_a_gpu_cannot_order() -> None:
    table = torch.zeros(9, requires_grad=True)
    built = engine(score_mod=lambda s, b, h, q, kv: s + table[q - kv + 4], backend="triton-interpreter")
    expect(errors.GradientNotSupported, "table", "cpu", run=lambda: built(*qkv()).sum().backward())


def test_every_error_is_caught_by_the_base_class() -> None:
    for name in dir(errors):
        found = getattr(errors, name)
        if isinstance(found, type) and issubclass(found, Exception) and found.__module__ == errors.__name__:
            assert issubclass(found, errors.AttnEngineError | Warning), name

"""What a call must not do twice, and what it must do every time: its structure, not its duration."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from attn_engine import AttentionEngine, CustomIO, errors, meta_tensor
from attn_engine.frontend import trace as frontend_trace
from attn_engine.runtime import call_checks, compiled, dq_parts, operator

D = 16


def engine(**options: Any) -> AttentionEngine:
    return AttentionEngine([meta_tensor(None, None, None, D, dtype=torch.float32)] * 3, **options)


def qkv(length: int = 9, heads: int = 4, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = torch.randn(3, 1, length, heads, D, **options).unbind(0)
    return q, k, v


def leaves(*shape: int) -> list[Tensor]:
    return [torch.randn(*shape, requires_grad=True) for _ in range(3)]


FIRST_CALL = """
import sys, torch
before = set(sys.modules)
from attn_engine import AttentionEngine, meta_tensor
built = AttentionEngine([meta_tensor(None, None, None, 16, dtype=torch.float32)] * 3, backend="cpu")
built(*torch.randn(3, 1, 9, 2, 16).unbind(0))
print(*sorted({name.split(".")[0] for name in set(sys.modules) - before}))
"""


def test_a_call_on_the_cpu_imports_nothing_heavy() -> None:
    folder = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", FIRST_CALL], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    assert "attn_engine" in loaded
    assert not loaded & {"triton", "tilelang", "sympy", "networkx", "transformers"}


def test_autograd_records_only_where_a_gradient_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    slopes = torch.randn(4)
    built = engine(score_mod=lambda s, b, h, q, kv: s + slopes[h])
    q, k, v = qkv()
    wanted = built(q, k, v)
    recorded = built(q.clone().requires_grad_(), k, v)
    assert recorded.grad_fn is not None
    slopes.requires_grad_()
    assert built(q, k, v).grad_fn is not None
    slopes.requires_grad_(False)

    def refused(*_: Any) -> None:
        pytest.fail("a step of autograd was made")

    monkeypatch.setattr(operator._Function, "apply", refused)
    assert built(q, k, v).grad_fn is None
    with torch.no_grad():
        assert torch.equal(built(q.clone().requires_grad_(), k, v), wanted)
    assert torch.equal(recorded, wanted)


def test_first_derivatives_take_one_step_of_autograd(monkeypatch: pytest.MonkeyPatch) -> None:
    built = engine()
    inputs = leaves(1, 9, 4, D)
    out = built(*inputs)
    monkeypatch.setattr(operator._Gradients, "apply", lambda *_: pytest.fail("a second step was made"))
    assert all(g.is_contiguous() for g in torch.autograd.grad(out.sum(), inputs))


def test_equal_calls_are_checked_and_traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    table = torch.tensor([0, 1, 2, 3])
    bias, factor = torch.randn(4), 2.0
    built = engine(score_mod=lambda s, b, h, q, kv: s * factor + bias[table[h]])
    q, k, v = qkv()
    built(q, k, v)
    monkeypatch.setattr(call_checks, "check_inputs", lambda *_: pytest.fail("checked again"))
    monkeypatch.setattr(call_checks, "check_captured", lambda *_: pytest.fail("checked again"))
    monkeypatch.setattr(frontend_trace.FunctionRun, "trace", lambda *_: pytest.fail("traced again"))
    monkeypatch.setattr(compiled, "lower", lambda *_: pytest.fail("lowered again"))
    repeated = built(q, k, v)
    bias = torch.arange(4.0) * 5 - bias  # another tensor of the same kind: the same checks hold
    torch.testing.assert_close(built(q, k, v), repeated)  # one addend per head: softmax does not see it


GOOD_THEN_BAD: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], Any], type[Exception]]] = {
    "length": (lambda q, k, v: (q, k, v[:, :5]), errors.ShapeMismatch),
    "heads": (lambda q, k, v: (q[:, :, :3], k[:, :, :2], v[:, :, :2]), errors.HeadsNotDivisible),
    "dimension": (lambda q, k, v: (q[..., :8], k[..., :8], v[..., :8]), errors.HeadDimMismatch),
    "dtype": (lambda q, k, v: (q.double(), k.double(), v.double()), errors.MetaDtypeMismatch),
    "mixed": (lambda q, k, v: (q, k.bfloat16(), v), errors.DtypeMismatch),
    "device": (lambda q, k, v: (q, k, v.to("meta")), errors.DeviceMismatch),
    "rank": (lambda q, k, v: (q[0], k[0], v[0]), errors.WrongRank),
    "array": (lambda q, k, v: (q, k.numpy(), v), errors.NotATensor),
    "none": (lambda q, k, v: (None, k, v), errors.NotATensor),
}


@pytest.mark.parametrize("name", GOOD_THEN_BAD)
def test_a_wrong_input_is_refused_after_a_right_one(name: str) -> None:
    change, error = GOOD_THEN_BAD[name]
    built = engine()
    q, k, v = qkv()
    for _ in range(2):
        built(q, k, v)
        with pytest.raises(error):
            built(*change(q, k, v))


def test_changed_contents_of_a_captured_index_are_refused() -> None:
    table = torch.tensor([0, 1, 2, 3])
    bias = torch.randn(4)
    built = engine(score_mod=lambda s, b, h, q, kv: s + bias[table[h]])
    q, k, v = qkv()
    built(q, k, v)
    table[1] = 4  # in place
    with pytest.raises(errors.IndexOutOfRange):
        built(q, k, v)
    table[1] = 1
    built(q, k, v)
    table = torch.tensor([0, 1, -1, 3])  # another tensor of the same kind
    with pytest.raises(errors.IndexNegative):
        built(q, k, v)
    table = torch.tensor([0, 1, 2, 3], dtype=torch.int32)
    built(q, k, v)
    bias = bias[:3]
    with pytest.raises(errors.IndexOutOfRange):
        built(q, k, v)


def test_a_changed_number_is_checked_again() -> None:
    offset = 0
    bias = torch.randn(4)
    built = engine(score_mod=lambda s, b, h, q, kv: s + bias[h + offset])
    q, k, v = qkv()
    built(q, k, v)
    offset = 1
    with pytest.raises(errors.IndexOutOfRange):
        built(q, k, v)


def test_a_captured_tensor_on_another_device_is_refused() -> None:
    bias = torch.randn(4)
    built = engine(score_mod=lambda s, b, h, q, kv: s + bias[h])
    q, k, v = qkv()
    built(q, k, v)
    bias = bias.to("meta")
    with pytest.raises(errors.CapturedOnOtherDevice):
        built(q, k, v)


def test_a_replaced_tensor_is_the_one_that_is_read_and_learned() -> None:
    bias = torch.zeros(4, requires_grad=True)
    built = engine(score_mod=lambda s, b, h, q, kv: s + bias[h] * kv)
    q, k, v = qkv()
    for _ in range(3):
        old = bias
        bias = torch.randn(4, requires_grad=True)
        out = built(q, k, v)
        torch.testing.assert_close(out, built.reference(q, k, v).float(), atol=2e-5, rtol=1e-4)
        out.sum().backward()
        assert old.grad is None or not torch.equal(old.grad, bias.grad)  # pyright: ignore[reportArgumentType]
        (wanted,) = torch.autograd.grad(built.reference(q, k, v).sum(), bias)
        torch.testing.assert_close(bias.grad, wanted, atol=2e-4, rtol=1e-3)


def test_custom_inputs_are_checked_at_every_call() -> None:
    built = engine(
        score_mod=lambda s, c, b, h, q, kv: s + c.input_tensors["bias"][h],
        custom_fwd_inputs=CustomIO({"bias": ("heads",)}),
    )
    q, k, v = qkv()
    built(q, k, v, torch.zeros(4))
    for wrong, error in ((torch.zeros(3), errors.CustomInputShape), ([0.0] * 4, errors.NotATensor)):
        with pytest.raises(error):
            built(q, k, v, wrong)  # pyright: ignore[reportCallIssue, reportArgumentType]
    with pytest.raises(errors.MissingCustomInput):
        built(q, k, v)
    assert built(q, k, v, torch.zeros(4, dtype=torch.float64)).shape == q.shape


def test_several_threads_share_an_engine() -> None:
    """Each thread's shapes and programs alternate with the others', so every memory of the last call is wrong."""
    engines = [engine(), engine(score_mod=lambda s, b, h, q, kv: s + h)]
    problems: list[BaseException] = []

    def work(heads: int) -> None:
        try:
            for step in range(40):
                q, k, v = qkv(5 + step % 3, heads)
                built = engines[step % 2]
                wanted = built.reference(q, k, v).float()
                torch.testing.assert_close(built(q, k, v), wanted, atol=2e-5, rtol=1e-4)
                with pytest.raises(errors.ShapeMismatch):
                    built(q, k, v[:, :4])
        except BaseException as problem:
            problems.append(problem)

    threads = [threading.Thread(target=work, args=(n,)) for n in (2, 4, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems, problems[0]


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 0), (torch.bfloat16, 2)])
def test_the_backward_pass_keeps_no_copy_of_dq(dtype: torch.dtype, limit: int) -> None:
    """limit: memory for the sum of dQ, in units of dQ, where the kernels cannot add to dQ itself."""
    dq = torch.full((1, 8, 40, D), torch.nan, dtype=dtype)
    parts = dq_parts.parts_of(dq, 1, torch.float32)
    own = 0 if parts.data_ptr() == dq.data_ptr() else parts.numel() * parts.element_size()
    assert own == limit * dq.numel() * dq.element_size()
    assert parts.shape == (1, *dq.shape) and not parts.any()
    part = torch.randn(parts.shape)
    parts += part
    dq_parts.sum_parts(dq, parts, 0.5)
    torch.testing.assert_close(dq, (part[0] * 0.5).to(dtype))

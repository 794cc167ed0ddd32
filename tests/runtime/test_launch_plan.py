"""Equal calls share a plan: what it may keep, and what every call must read anew."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from attn_engine import AttentionEngine, meta_tensor
from attn_engine.runtime import make_plan
from attn_engine.runtime.launch_plan import CallKind, Layout

D = 16


def engine(dtype: torch.dtype = torch.float32, **options: Any) -> AttentionEngine:
    meta = [meta_tensor(None, None, None, D, dtype=dtype)] * 3
    return AttentionEngine(meta, backend="cpu", **{"layout": "bhsd", **options})


def qkv(q_len: int = 9, kv_len: int = 9, heads: int = 4, kv_heads: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    k, v = torch.randn(2, 2, kv_heads, kv_len, D).unbind(0)
    return torch.randn(2, heads, q_len, D), k, v


def kinds_of(built: AttentionEngine) -> list[CallKind]:
    return [kind for passed in built._checks._passed.values() for kind in passed.kinds.values()]


def assert_right(built: AttentionEngine, *tensors: Tensor) -> None:
    """Three calls (the third has its plan) against the definition, with fresh contents each time."""
    for _ in range(3):
        for x in tensors:
            x.copy_(torch.randn(x.shape))
        wanted, rows = built.reference(*tensors, return_final_rowscales=True)
        out, found = built(*tensors, return_final_rowscales=True)
        torch.testing.assert_close(out.float(), wanted.float(), atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(found["lse"].float(), rows["lse"].float(), atol=2e-5, rtol=1e-4)
    assert any(kind.calls == 2 for kind in kinds_of(built))


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize(
    ("q_len", "kv_len", "kv_heads"),
    [(9, 9, 4), (1, 37, 4), (1, 37, 2), (3, 37, 2), (40, 40, 1), (1, 70_000, 2), (0, 9, 4)],
    ids=["whole", "few rows", "packed", "copied", "groups", "split", "nothing"],
)
def test_planned_calls_are_right(layout: str, q_len: int, kv_len: int, kv_heads: int) -> None:
    built = engine(layout=layout)
    tensors = qkv(q_len, kv_len, 4, kv_heads)
    assert_right(built, *(x if layout == "bhsd" else x.transpose(1, 2) for x in tensors))
    (kind,) = kinds_of(built)
    assert (kind.forward is None) == (q_len == 3), "only copies of packed heads are not planned"


def test_a_plan_is_made_once_and_only_for_calls_that_come_again(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    make = make_plan.forward_plan
    monkeypatch.setattr(make_plan, "forward_plan", lambda *a: made.append(a) or make(*a))
    built = engine()
    for length in range(5, 9):  # as a decoding loop does
        built(*qkv(1, length))
    assert not made
    for _ in range(3):
        built(*qkv(1, 5))
    assert len(made) == 1


def test_other_strides_have_another_plan() -> None:
    built = engine()
    q, k, v = qkv()
    for _ in range(2):
        for tensors in (
            (q, k, v),
            (q.mT.contiguous().mT, k, v),
            (q, k, v.transpose(1, 2).contiguous().transpose(1, 2)),
        ):
            assert_right(built, *tensors)
    assert len(kinds_of(built)) == 3
    assert len({id(kind.forward) for kind in kinds_of(built)}) == 3


def test_captured_numbers_and_tensors_are_read_at_every_call() -> None:
    factor, count, bias = 0.5, 3, torch.randn(4)
    built = engine(
        score_mod=lambda s, b, h, q, kv: s * factor + bias[h] * kv,
        mask_mod=lambda b, h, q, kv: kv <= q + count,
    )
    q, k, v = qkv()
    for step in range(4):
        factor, count = factor * 1.5, count - 1
        bias = torch.randn(4) if step % 2 else bias.mul_(-2)
        wanted = built.reference(q, k, v).float()
        torch.testing.assert_close(built(q, k, v), wanted, atol=2e-5, rtol=1e-4)
    (kind,) = kinds_of(built)
    assert kind.forward is not None, "another number is no other kind of call"
    wide = torch.randn(4, 2)
    bias = wide[:, 0]  # of the same shape, with another stride
    torch.testing.assert_close(built(q, k, v), built.reference(q, k, v).float(), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_planned_gradients(dtype: torch.dtype, layout: str) -> None:
    """Of a dense gradient and of an expanded one; several shares of the keys with bfloat16 and few heads."""
    built = engine(dtype, layout=layout, mask_mod=lambda b, h, q, kv: kv <= q)
    shape = (1, 2, 150, D) if layout == "bhsd" else (1, 150, 2, D)
    close = {"atol": 2e-2, "rtol": 2e-2} if dtype is torch.bfloat16 else {"atol": 2e-5, "rtol": 1e-4}
    for step in range(6):
        inputs = [torch.randn(shape).to(dtype).requires_grad_() for _ in range(3)]
        d_out = torch.randn(shape).to(dtype) if step % 2 else torch.ones((), dtype=dtype).expand(shape)
        found = torch.autograd.grad(built(*inputs), inputs, d_out)
        wanted = torch.autograd.grad(built.reference(*inputs), inputs, d_out.double())
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, **close)
    (kind,) = kinds_of(built)
    assert len(kind.backward) == 2 and None not in kind.backward.values()


def test_stored_tensors_that_a_hook_has_laid_out_otherwise() -> None:
    built = engine()
    inputs = [x.requires_grad_() for x in qkv()]
    d_out = torch.randn_like(inputs[0])
    for _ in range(3):
        wanted = torch.autograd.grad(built(*inputs), inputs, d_out)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x.mT.contiguous().mT):
        found = torch.autograd.grad(built(*inputs), inputs, d_out)
    assert all(map(torch.equal, found, wanted))


def test_threads_share_a_plan() -> None:
    factor = 2.0
    built = engine(score_mod=lambda s, b, h, q, kv: s * factor)
    work = [qkv(40, 40) for _ in range(3)]
    wanted = [built(*x) for x in work]
    problems: list[BaseException] = []

    def run(i: int) -> None:
        try:
            for _ in range(200):
                assert torch.equal(built(*work[i]), wanted[i])
        except BaseException as problem:
            problems.append(problem)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems, problems[0]
    (kind,) = kinds_of(built)
    assert kind.forward is not None


def test_layouts() -> None:
    for shape in ((2, 3, 4), (1, 0, 5), ()):
        assert Layout.contiguous(shape) == Layout.of(torch.empty(shape))

"""flex_attention: functions made anew at every call share programs and kernels, and none sees another's captures."""

from __future__ import annotations

import functools
import gc
import threading
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from attn_engine import create_block_mask, flex_attention
from attn_engine.conformance.gold import dense_attention
from attn_engine.flex import programs
from attn_engine.flex.functions import Composition, StandIns
from attn_engine.frontend import trace as frontend_trace
from attn_engine.runtime import compiled
from tests.flex.inputs import LONG, S, close, qkv


def refuse_work(monkeypatch: pytest.MonkeyPatch, traces: bool = False) -> None:
    if not traces:
        monkeypatch.setattr(frontend_trace._Run, "trace", lambda *_: pytest.fail("traced again"))
    monkeypatch.setattr(compiled, "lower", lambda *_: pytest.fail("lowered again"))


def test_functions_made_anew_are_neither_traced_nor_lowered_again(monkeypatch: pytest.MonkeyPatch):
    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, factor: float, window: int) -> Tensor:
        def shifted(score: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
            return score * factor + bias[h] * (i - j)

        mask = create_block_mask(
            lambda b, h, i, j: (i - j).abs() < window, None, None, *(q.shape[2],) * 2, "cpu"
        )
        mod = functools.partial(lambda extra, s, b, h, i, j: shifted(s, b, h, i, j) + extra * j, factor)
        return flex_attention(q, k, v, mod, mask)

    def want(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, factor: float, window: int) -> Tensor:
        def mod(s: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
            return s * factor + bias[h] * (i - j) + factor * j

        return dense_attention(q, k, v, mod, lambda b, h, i, j: (i - j).abs() < window, None)[0]

    first = (*qkv(length=LONG), torch.randn(2), 0.5, 7)
    close(attend(*first), want(*first))
    refuse_work(monkeypatch, traces=True)  # create_block_mask traces what it is given
    for step, length in enumerate((40, 63, 47, 40)):
        given = (*qkv(length=length), torch.randn(2), 0.1 * step, 3 + step)
        close(attend(*given), want(*given))


def test_a_lambda_made_anew_is_not_traced_again(monkeypatch: pytest.MonkeyPatch):
    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, factor: float) -> Tensor:
        return flex_attention(q, k, v, lambda s, b, h, i, j: s * factor + bias[h] * (i - j))

    def want(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, factor: float) -> Tensor:
        return dense_attention(q, k, v, lambda s, b, h, i, j: s * factor + bias[h] * (i - j), None, None)[0]

    first = (*qkv(length=LONG), torch.randn(2), 0.5)
    close(attend(*first), want(*first))
    refuse_work(monkeypatch)
    for step in range(12):
        given = (*qkv(length=LONG + step), torch.randn(2), 0.3 * step)
        close(attend(*given), want(*given))


def test_a_number_that_decided_a_branch_is_never_stale():
    q, k, v = qkv()
    for twice in (True, False, True):
        number = 2 if twice else 1

        def mod(s: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
            return s * 2 if number == 2 else s - j

        close(flex_attention(q, k, v, mod), dense_attention(q, k, v, mod, None, None)[0])


def test_captured_kinds_may_change():
    q, k, v = qkv()
    for x in (torch.randn(S), torch.randn(S).double(), torch.arange(S), torch.randn(S).bfloat16()):
        mod = lambda s, b, h, i, j: s + x[j] * 0.5
        close(
            flex_attention(q, k, v, mod), dense_attention(q, k, v, mod, None, None)[0], rtol=1e-4, atol=1e-4
        )


def test_objects_and_methods():
    class Slopes(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.slopes = torch.nn.Parameter(torch.randn(2))

        def forward(self, s: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
            return s + self.slopes[h] * (i - j)

    q, k, v = qkv()
    module = Slopes()
    for mod in (module, module.forward, Slopes()):
        want = dense_attention(q, k, v, mod, None, None)[0]
        close(flex_attention(q, k, v, mod), want)
    flex_attention(q, k, v, module).sum().backward()
    assert module.slopes.grad is not None
    with torch.no_grad():
        module.slopes += 1.0
    close(flex_attention(q, k, v, module), dense_attention(q, k, v, module, None, None)[0])


def test_nothing_that_was_captured_is_kept_alive():
    q, k, v = qkv()
    bias: Any = torch.randn(S)
    seen = weakref.ref(bias)
    flex_attention(q, k, v, lambda s, b, h, i, j: s + bias[j])
    flex_attention(q, k, v, functools.partial(lambda x, s, b, h, i, j: s + x[j], bias))
    flex_attention(q, k, v, lambda s, b, h, i, j, x=bias: s + x[j])
    bias = None
    gc.collect()
    assert seen() is None


def test_shared_cells_are_told_from_equal_ones():
    def functions(x: Any, y: Any) -> tuple[Any, Any]:
        return (lambda s, b, h, i, j: s + x), (lambda b, h, i, j: y > j)

    def shared(x: Any) -> tuple[Any, Any]:
        return (lambda s, b, h, i, j: s + x), (lambda b, h, i, j: x > j)

    assert Composition.of(functions(1, 2)).key == Composition.of(functions(3, 4)).key
    assert Composition.of(functions(1, 2)).key != Composition.of(functions(1.0, 2)).key
    assert Composition.of(shared(1)).key == Composition.of(shared(2)).key


def test_stand_ins_take_values_in_the_order_of_the_composition():
    def outer(x: Any, y: Any, z: Any) -> Any:
        def inner(a: Any, w: Any = x) -> Any:
            return (a, y, z, w)

        return lambda a: (inner(a), x, y)

    given = outer(1, 2, 3)
    stand_ins = StandIns((given, functools.partial(given)))
    other = outer(10, 20, 30)
    made = Composition.of((other, functools.partial(other)))
    assert made.key == Composition.of((given, functools.partial(given))).key
    stand_ins.put(made.values)
    for fn in stand_ins.functions:
        assert fn is not None and fn(0) == other(0)
    assert given(0) == outer(1, 2, 3)(0)  # the user's own cells are as they were


def test_threads_do_not_see_each_others_captures():
    q, k, v = qkv()
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(30):
            bias = torch.full((S,), float(number)) * torch.arange(S)
            got = flex_attention(q, k, v, lambda s, b, h, i, j: s + bias[j])
            want = dense_attention(q, k, v, lambda s, b, h, i, j: s + bias[j], None, None)[0]
            if not torch.allclose(got, want, atol=1e-4):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_programs_are_forgotten_but_not_their_kernels(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(programs, "MOST_PROGRAMS", 3)
    monkeypatch.setattr(programs, "_programs", type(programs._programs)())
    q, k, v = qkv()
    before = programs.kernels_made()
    for _ in range(6):

        class Twice:
            def __call__(self, s: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
                return s * 2

        flex_attention(q, k, v, Twice())
    assert len(programs._programs) == 3
    assert programs.kernels_made() <= before + 1

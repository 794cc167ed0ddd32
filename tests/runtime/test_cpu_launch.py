"""Threads: the same bits for any number of them, from several callers at once, and after a fork."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from attn_engine.runtime import cpu_launch
from attn_engine.runtime.compiled import CompiledAttention
from attn_engine.runtime.cpu_compile import find_compiler
from tests.runtime.cpu_attention import Shapes, compiled, inputs, measured
from tests.runtime.rules import program

pytestmark = pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler")


@pytest.fixture
def attention() -> CompiledAttention:
    return compiled(program(dim_qk=16, dim_v=16))


@pytest.fixture
def tensors(generator: torch.Generator) -> list[Tensor]:
    return inputs(program(dim_qk=16, dim_v=16), Shapes(2, 4, 2, 130, 150), generator)


@pytest.fixture(autouse=True)
def threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(cpu_launch, "SMALL_WORK", 0)  # every call is worth a thread
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run(attention: CompiledAttention, tensors: list[Tensor]) -> list[Tensor]:
    return measured(attention, tensors, {}, (), {"scale": 0.25})


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b))


def test_results_do_not_depend_on_the_number_of_threads(attention: CompiledAttention, tensors: list[Tensor]):
    torch.set_num_threads(1)
    alone = run(attention, tensors)
    for count in (2, 3, 5):
        torch.set_num_threads(count)
        assert same(run(attention, tensors), alone)


def test_without_openmp_python_threads_do_it(
    attention: CompiledAttention, tensors: list[Tensor], monkeypatch
):
    torch.set_num_threads(3)
    expected = run(attention, tensors)
    monkeypatch.setattr(cpu_launch, "openmp_parallel", lambda: None)
    started: list[threading.Thread] = []
    start = threading.Thread.start
    monkeypatch.setattr(threading.Thread, "start", lambda self: (started.append(self), start(self)))
    assert same(run(attention, tensors), expected)
    assert started


def test_torchs_own_pool_is_found():
    if not torch.backends.openmp.is_available():
        pytest.skip("torch without OpenMP")
    assert cpu_launch.openmp_parallel() is not None


def test_several_callers_at_once(attention: CompiledAttention, tensors: list[Tensor]):
    torch.set_num_threads(2)
    expected = run(attention, tensors)
    results: list[list[Tensor]] = []
    callers = [threading.Thread(target=lambda: results.append(run(attention, tensors))) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(results) == 4
    assert all(same(r, expected) for r in results)


def _in_child(attention: CompiledAttention, tensors: list[Tensor], queue) -> None:
    # Only our kernels: torch's own parallel operations hang in a forked child.
    q, k, v, _ = tensors
    out = torch.empty(*q.shape[:3], v.shape[3])
    attention.forward(q, k, v, {}, {"scale": 0.25}, out)
    queue.put(out.numpy().tobytes())


def test_a_forked_child_computes_too(attention: CompiledAttention, tensors: list[Tensor]):
    torch.set_num_threads(2)
    expected = run(attention, tensors)[0]
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_child, args=(attention, tensors, queue))
    child.start()
    assert queue.get(timeout=30) == expected.numpy().tobytes()
    child.join(10)


def test_small_work_stays_on_one_thread(attention: CompiledAttention, tensors: list[Tensor], monkeypatch):
    monkeypatch.setattr(cpu_launch, "SMALL_WORK", 10**12)
    monkeypatch.setattr(cpu_launch, "openmp_parallel", lambda: pytest.fail("a thread was started"))
    torch.set_num_threads(2)
    run(attention, tensors)

"""Every address that a generated Triton kernel computes, at strides beyond 32 bits, by arithmetic: nothing is read.

The engine calls with tensors that have no memory; its launches are carried out by the interpreter, whose integers wrap
as a GPU's do, with pointers that are numbers. What a load or a store is given must be the address of an element.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from attn_engine.gpu_check import checks
from attn_engine.gpu_check.cases import Case, Sizes
from attn_engine.gpu_check.given import Given, draw
from attn_engine.runtime import triton_launch
from attn_engine.runtime.source_module import load_source

tl = pytest.importorskip("triton.language")
interpreter = pytest.importorskip("triton.runtime.interpreter")
APART = 2**45  # elements between the beginnings of two tensors
SIZES = Sizes(1, 3, 3, 300, 330, 16, 16)
CASES = (
    Case(SIZES, dtype="float16", score="soft-cap alibi", mask="causal"),
    Case(SIZES, dtype="float16", score="pair bias", normaliser="retention"),
)
# Strides of (batch, head, row, dimension).
FAR = {
    "batches and heads": (2**38, 2**30 + 2**29, 16, 1),
    "rows": (2**40, 2**36, 2**23, 1),  # row by row below 2^31, within a head beyond
    "everything": (2**41, 2**37, 2**22 + 8, 2**21),
}
SLOW = pytest.mark.slow
QUICK: dict[str, Any] = {"rows": []}


@dataclass(frozen=True)
class Pointer:
    """A tensor's place: what a kernel gets instead of its memory."""

    base: int
    type: str
    name: str
    valid: np.ndarray  # offsets of its elements


def elements(x: Tensor) -> np.ndarray:
    offsets = np.zeros((1,), dtype=np.int64)
    for size, stride in zip(x.shape, x.stride(), strict=True):
        offsets = (offsets[:, None] + np.arange(size, dtype=np.int64) * stride).ravel()
    return np.unique(offsets)


class Watch:
    """Replaces launches and memory; `wrong` says what was addressed that is no element."""

    def __init__(self) -> None:
        self.pointers: list[Pointer] = []
        self.wrong: list[str] = []
        self.furthest = 0
        self.kernels: set[str] = set()
        self.kernel = ""

    def launch(self, kernel: Any, grid: tuple[int, ...], args: list[Any]) -> None:
        from attn_engine.runtime.triton_interpreter import interpret

        self.kernel = kernel.name
        self.kernels.add(kernel.name)
        self.pointers = []
        replaced = [self.pointer(x) if isinstance(x, Tensor) else x for x in args]
        interpret(kernel._function, grid, *replaced)

    def pointer(self, x: Tensor) -> Pointer:
        mangled = interpreter.triton.runtime.jit.mangle_type(x)
        number = len(self.pointers) + 1
        self.pointers.append(Pointer(number * APART * 16, mangled, f"argument {number}", elements(x)))
        return self.pointers[-1]

    def seen(self, ptrs: Any, mask: Any) -> None:
        width = ptrs.get_element_ty().primitive_bitwidth // 8
        shown = np.broadcast_to(mask.data.astype(bool), ptrs.data.shape)
        addresses = ptrs.data[shown].astype(np.int64)
        for p in self.pointers:
            offsets = addresses[np.abs(addresses - p.base) < APART * 8] - p.base
            if offsets.size and not np.isin(offsets // width, p.valid).all():
                self.wrong.append(f"{self.kernel}: {p.name}: {offsets // width}")
            self.furthest = max(self.furthest, int(offsets.max(initial=0)) // width)


def with_typed_ranges(patch: Any) -> Any:
    """The interpreter counts loops in Python's integers; compiled, a loop's variable is as wide as its bounds."""

    def typed_range(begin: Any, end: Any, step: Any = 1, **hints: Any) -> Iterator[Any]:
        wide = any(isinstance(x, tl.tensor) and x.dtype == tl.int64 for x in (begin, end))
        kind, numbers = (tl.int64, np.int64) if wide else (tl.int32, np.int32)
        for i in range(int(begin), int(end), int(step)):
            yield tl.tensor(interpreter.TensorHandle(np.array([i], dtype=numbers), kind), kind)

    def patched(language: Any, *scope: Any) -> None:
        patch(language, *scope)
        (scope[0].set_attr if scope else setattr)(language, "range", typed_range)

    return patched


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    watching = Watch()
    convert = interpreter._implicit_cvt
    engine_of = checks.engine_of

    def with_pointers(x: Any) -> Any:
        if not isinstance(x, Pointer):
            return convert(x)
        kind = tl.str_to_ty(x.type, None)
        return tl.tensor(interpreter.TensorHandle(np.array([x.base], dtype=np.uint64), kind), kind)

    def load(builder: Any, ptrs: Any, mask: Any, other: Any, *rest: Any) -> Any:
        watching.seen(ptrs, mask)
        kind = ptrs.get_element_ty()
        zeros = np.zeros(ptrs.data.shape, dtype=interpreter._get_np_dtype(kind))
        return interpreter.TensorHandle(zeros, kind)

    def store(builder: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> None:
        watching.seen(ptrs, mask)

    def on_any_device(case: Case, tensors: Any, backend: str) -> Any:
        engine = engine_of(case, tensors, backend)
        engine._checks.device = None
        return engine

    monkeypatch.setattr(interpreter, "_implicit_cvt", with_pointers)
    monkeypatch.setattr(interpreter, "_patch_lang_core", with_typed_ranges(interpreter._patch_lang_core))
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_load", load)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_store", store)
    monkeypatch.setattr(checks, "engine_of", on_any_device)
    # Descriptors hold 64-bit strides themselves: what computes addresses is the text with pointers.
    monkeypatch.setattr(triton_launch, "fits_descriptor", lambda x: False, raising=False)
    monkeypatch.setattr(triton_launch.TritonKernel, "_run", lambda *call: watching.launch(*call))
    return watching


def far(case: Case, strides: tuple[int, ...]) -> Given:
    """The case's tensors at these strides, without memory."""
    given = draw(case, "meta")

    def apart(x: Tensor) -> Tensor:
        return torch.empty(0, dtype=x.dtype, device="meta").as_strided(x.shape, strides)

    return Given(apart(given.q), apart(given.k), apart(given.v), apart(given.d_out), given.tensors)


@pytest.mark.parametrize("strides", [pytest.param(x, marks=QUICK.get(n, SLOW), id=n) for n, x in FAR.items()])
@pytest.mark.parametrize("case", [CASES[0], pytest.param(CASES[1], marks=SLOW)], ids=str)
def test_every_address_is_that_of_an_element(case: Case, strides: tuple[int, ...], watch: Watch) -> None:
    checks.attend(case, far(case, strides), "triton")
    assert {"forward", "dq", "dkdv"} <= watch.kernels
    assert not watch.wrong, watch.wrong
    assert watch.furthest > 2**31


@pytest.mark.parametrize(
    ("wide", "narrow", "strides"),
    [
        (".to(tl.int64)", "", "batches and heads"),
        pytest.param("tl.cast(kv_start, tl.int64)", "kv_start", "rows", marks=SLOW),
    ],
)
def test_offsets_of_32_bits_are_seen(
    wide: str, narrow: str, strides: str, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    def narrowed(text: str, name: str) -> Any:
        assert name != "forward" or wide in text
        return load_source(text.replace(wide, narrow), name)

    monkeypatch.setattr(triton_launch, "load_source", narrowed)
    checks.attend(CASES[0], far(CASES[0], FAR[strides]), "triton")
    assert watch.wrong

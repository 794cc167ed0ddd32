"""The same kernels for every instruction set of x86-64, by both compilers, and for ARM under an emulator."""

from __future__ import annotations

import itertools
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from attn_engine.ir.expr import call
from attn_engine.ir.ops import DType, Op, Storage
from attn_engine.ir.program import BATCH, HEAD, KV_IDX, Q_IDX, SCORE
from attn_engine.runtime.cpu_compile import find_compiler
from tests.runtime.cpu_attention import CpuOn
from tests.runtime.emulated import CpuEmulated
from tests.runtime.test_cpu_kernels import CAUSAL, Case, causal_mod, check, read

pytestmark = pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler")


def capped(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor, slopes: Tensor) -> Tensor:
    return 5 * torch.tanh((s + slopes[h] * (j - i)) / 5)


def same_document(b: Tensor, h: Tensor, i: Tensor, j: Tensor, doc: Tensor) -> Tensor:
    return doc[b, i] == doc[b, j]


def soft_cap_alibi_causal(dims: tuple[int, int]) -> Case:
    return Case(
        call(Op.TANH, (SCORE + read("slopes", HEAD) * (KV_IDX - Q_IDX)) / 5.0) * 5.0,
        capped,
        CAUSAL,
        causal_mod,
        {"slopes": ((4,), Storage.FLOAT32)},
        dims=dims,
    )


def retention_documents(dims: tuple[int, int]) -> Case:
    row, column = (read("doc", BATCH, i, kind=DType.INT) for i in (Q_IDX, KV_IDX))
    return Case(
        mask=row.equals(column),
        mask_mod=same_document,
        captured={"doc": ((2, 90), Storage.INT64)},
        dims=dims,
    )


PROCESSORS = ("x86-64", "x86-64-v2", "x86-64-v3", "x86-64-v4", "native")
TARGETS = list(itertools.product(PROCESSORS, ("g++", "clang++")))
ELEMENTS = (Storage.FLOAT32, Storage.BFLOAT16, Storage.FLOAT16, Storage.FLOAT64)
DIMS = ((33, 64), (64, 33))
RULES = ("softmax", "retention")


def combinations() -> Iterator[object]:
    """All of them. A quick run keeps one of each target, so that it meets every element, width and rule."""
    for t, (processor, compiler) in enumerate(TARGETS):
        for element, dims, rule in itertools.product(ELEMENTS, DIMS, RULES):
            chosen = (ELEMENTS[(t + t // 4) % 4], DIMS[t // 2 % 2], RULES[t % 2])
            marks = () if (element, dims, rule) == chosen else (pytest.mark.slow,)
            name = f"{processor}-{compiler}-{rule}-{element.value}-{dims[0]}x{dims[1]}"
            yield pytest.param(processor, compiler, rule, element, dims, marks=marks, id=name)


def case_of(rule: str, dims: tuple[int, int]) -> Case:
    return soft_cap_alibi_causal(dims) if rule == "softmax" else retention_documents(dims)


@pytest.mark.parametrize(("processor", "compiler", "rule", "element", "dims"), combinations())
def test_every_processor(
    processor: str,
    compiler: str,
    rule: str,
    element: Storage,
    dims: tuple[int, int],
    generator: torch.Generator,
):
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("not an x86-64 machine")
    check(case_of(rule, dims), generator, rule, element, CpuOn(processor, compiler))


NEON = [("softmax", e, d) for e, d in zip(ELEMENTS, DIMS * 2)] + [("retention", Storage.FLOAT32, (64, 33))]


@pytest.mark.parametrize(("rule", "element", "dims"), NEON)
def test_neon(rule: str, element: Storage, dims: tuple[int, int], generator: torch.Generator, tmp_path: Path):
    emulator = shutil.which("qemu-aarch64")
    if emulator is None:
        pytest.skip("qemu-aarch64 is not installed: apt-get install qemu-user g++-aarch64-linux-gnu")
    backend = CpuEmulated("armv8-a", "aarch64-linux-gnu-g++", folder=tmp_path, emulator=emulator)
    check(case_of(rule, dims), generator, rule, element, backend)

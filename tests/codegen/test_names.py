"""A user's own names in generated kernels: whatever local variables are called, a kernel computes the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from attn_engine import AttentionEngine, meta_tensor
from attn_engine.codegen.backends.cpu_names import FIXED, header_names
from attn_engine.ir.kernel_words import KERNEL_WORDS
from attn_engine.runtime import cpu_compile, few_rows
from attn_engine.runtime.cpu_compile import find_compiler

GRID = ("split", "batch", "head", "kv_head", "q_start", "kv_start", "row", "column", "q_rows")
ARRAYS = (
    "score_packed", "query_packed", "key_spare", "value_rows", "probs_tile", "d_probs_tile", "score_tile", "out_tile",
    "masked_score_tile", "query_pairs", "even_probs", "probs_pairs", "O_matrix", "saved_lse_matrix",
)  # fmt: skip
DIM = 16


@pytest.fixture(scope="module", autouse=True)
def unoptimised() -> Iterator[None]:
    """What a name means is settled before the compiler optimises, which takes ten times as long for such functions."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_compile, "FLAGS", tuple("-O0" if f == "-O2" else f for f in cpu_compile.FLAGS))
        cpu_compile._find.cache_clear()
        yield
    cpu_compile._find.cache_clear()


def function_with_locals(names: tuple[str, ...]) -> Callable[..., Any]:
    """A score_mod with these local variables, each made from the one before and read again by the result."""
    lines = ["def score_mod(score, b, h, q_idx, kv_idx):"]
    for name, previous in zip(names, ("score", *names), strict=False):
        lines.append(f"    {name} = {previous} * 0.5 - score * score * 0.125")
    lines.append(f"    return ({' + '.join(names)}) * {1 / len(names)}")
    scope: dict[str, Any] = {}
    exec("\n".join(lines), scope)
    return scope["score_mod"]


def inputs_of(q_len: int, kv_len: int, dtype: torch.dtype) -> list[Tensor]:
    shapes = ((1, q_len, 4, DIM), (1, kv_len, 2, DIM), (1, kv_len, 2, DIM))
    return [torch.randn(s, dtype=dtype).mul_(0.5).requires_grad_() for s in shapes]


def engine_with_locals(names: tuple[str, ...], dtype: torch.dtype) -> AttentionEngine:
    return AttentionEngine(
        [meta_tensor(None, None, None, DIM, dtype=dtype)] * 3,
        score_mod=function_with_locals(names),
        mask_mod=lambda b, h, q_idx, kv_idx: (q_idx + kv_idx) % 7 != 3,
        backend="cpu",
    )


@pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler")
def test_local_variables_named_like_the_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    """One query over 300 keys: the kernels for few rows, in splits."""
    monkeypatch.setattr(few_rows, "LEAST_NUMBERS_PER_SPLIT", 2**10)
    engine = engine_with_locals(GRID, torch.float32)
    q, k, v = inputs_of(1, 300, torch.float32)
    torch.testing.assert_close(engine(q, k, v).double(), engine.reference(q, k, v), rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler")
def test_local_variables_named_like_arrays() -> None:
    """bfloat16: the kernels with the most arrays; their backward pass too."""
    engine = engine_with_locals(ARRAYS, torch.bfloat16)
    q, k, v = inputs_of(70, 150, torch.bfloat16)
    o, wanted = engine(q, k, v), engine.reference(q, k, v)
    torch.testing.assert_close(o.double(), wanted, rtol=3e-2, atol=3e-2)
    weights = torch.randn_like(o)
    got = torch.autograd.grad(o, (q, k, v), weights)
    want = torch.autograd.grad(wanted, (q, k, v), weights.double())
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g.double(), w.double(), rtol=3e-2, atol=3e-2 * w.abs().max().item())


def test_headers_leave_the_names_that_kernels_spell_by_themselves() -> None:
    assert not FIXED & header_names(), (
        "a kernel's parameter hides this function of a header: rename the function"
    )


def capturing_numbers(names: list[str]) -> Callable[..., Any]:
    """A score_mod that captures a number under each of these names."""
    lines = [f"def make({', '.join(names)}):", "    def score_mod(score, b, h, q_idx, kv_idx):"]
    lines += ["        return score * (" + " + ".join(names) + ")", "    return score_mod"]
    scope: dict[str, Any] = {}
    exec("\n".join(lines), scope)
    return scope["make"](*(0.01 * i for i in range(len(names))))


@pytest.mark.parametrize(
    "backend", ["cpu", "torch", "triton-interpreter", pytest.param("tilelang-cpu", marks=pytest.mark.slow)]
)
def test_captured_numbers_named_like_anything_in_a_kernel(backend: str) -> None:
    """Grouped heads and two batches, so that every index that a name could hide matters."""
    if backend == "tilelang-cpu":
        pytest.importorskip("tilelang")
    if backend == "cpu" and find_compiler() is None:
        pytest.skip("no C++ compiler")
    others = (
        "kv_rows task sums Scratch step lane BLOCK_KV DIM_V safe_row_max saved_lse inverse_sum result_tile"
    )
    names = sorted(KERNEL_WORDS | set(GRID) | set(others.split()))
    metas = [meta_tensor(None, None, None, DIM, dtype=torch.float32)] * 3
    engine = AttentionEngine(
        metas, capturing_numbers(names), mask_mod=lambda b, h, q, k: k <= q, backend=backend, scale=0.02
    )
    tensors = [torch.randn(2, 45, n, DIM, requires_grad=True) for n in (4, 2, 2)]
    out, want = engine(*tensors), engine.reference(*tensors)
    torch.testing.assert_close(out.double(), want, rtol=1e-4, atol=1e-4)
    weights = torch.randn_like(out)
    found = torch.autograd.grad(out, tensors, weights)
    for g, w in zip(found, torch.autograd.grad(want, tensors, weights.double()), strict=True):
        torch.testing.assert_close(g.double(), w.double(), rtol=1e-3, atol=1e-3)

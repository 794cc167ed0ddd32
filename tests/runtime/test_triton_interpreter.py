"""The interpreter runs a kernel of a process that also compiles, and leaves no trace."""

from __future__ import annotations

import inspect
import threading
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder

from attn_engine.codegen.backends.triton_functions import helper_lines
from attn_engine.ir.ops import Storage
from attn_engine.runtime.source_module import load_source
from attn_engine.runtime.triton_interpreter import interpret

ELEMENTWISE = """
@triton.jit
def kernel(x, y, out, n, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    a = tl.load(x + index, mask=index < n, other=0)
    b = tl.load(y + index, mask=index < n, other=0)
    tl.store(out + index, {expression}, mask=index < n)
"""
PRODUCT = """
@triton.jit
def kernel(x, y, out, steps, BLOCK: tl.constexpr):
    row = tl.arange(0, BLOCK)
    total = tl.full([BLOCK, BLOCK], 0.0, tl.float32)
    for step in tl.range(0, steps):
        a = tl.load(x + step * BLOCK * BLOCK + row[:, None] * BLOCK + row[None, :])
        b = tl.load(y + step * BLOCK * BLOCK + row[:, None] * BLOCK + row[None, :])
        total = total + tl.dot(a, b)
    tl.store(out + row[:, None] * BLOCK + row[None, :], total)
"""


def function(text: str, name: str = "kernel") -> Any:
    helpers = "\n".join(helper_lines({"floor_divide", "floor_modulo", "tanh"}, Storage.FLOAT32))
    header = f"import triton\nimport triton.language as tl\n\n{helpers}\n"
    return getattr(load_source(header + text, name), name)


def elementwise(expression: str, x: torch.Tensor, y: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    out = torch.full((x.numel(),), 99, dtype=dtype)
    interpret(function(ELEMENTWISE.format(expression=expression)), (1,), x, y, out, x.numel(), BLOCK=256)
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_products_in_a_loop_of_run_time_length(dtype: torch.dtype, generator: torch.Generator) -> None:
    x, y = (torch.randn(3, 16, 16, generator=generator).to(dtype) for _ in range(2))
    out = torch.full((16, 16), float("nan"))
    interpret(function(PRODUCT), (1,), x, y, out, 3, BLOCK=16)
    torch.testing.assert_close(out, (x.float() @ y.float()).sum(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "expression", ["a + b", "a * b", "-a", "tl.where(a < b, a, b)", "tl.exp2(a.to(tl.float32)) + b"]
)
def test_brain_floats_round_as_torch_rounds_them(expression: str, generator: torch.Generator) -> None:
    x, y = (torch.randn(200, generator=generator).to(torch.bfloat16) for _ in range(2))
    want = {
        "a + b": x + y, "a * b": x * y, "-a": -x, "tl.where(a < b, a, b)": torch.minimum(x, y),
        "tl.exp2(a.to(tl.float32)) + b": (torch.exp2(x.float()) + y.float()).to(torch.bfloat16),
    }[expression]  # fmt: skip
    assert torch.equal(elementwise(expression, x, y, torch.bfloat16), want)


def test_helpers_floor_as_python_does() -> None:
    pairs = [(a, b) for a in range(-7, 8) for b in (-3, -2, -1, 1, 2, 3, 5)]
    x, y = torch.tensor(pairs, dtype=torch.int32).T.contiguous()
    assert elementwise("floor_divide(a, b)", x, y, torch.int32).tolist() == [a // b for a, b in pairs]
    assert elementwise("floor_modulo(a, b)", x, y, torch.int32).tolist() == [a % b for a, b in pairs]


def test_tanh_is_accurate_near_zero() -> None:
    x = torch.cat([torch.logspace(-12, 1.3, 100), -torch.logspace(-12, 1.3, 100)])
    got = elementwise("tanh(a)", x, x, torch.float32).double()
    want = torch.tanh(x.double())
    assert ((got - want) / want).abs().max() < 3e-7


def language() -> dict[str, object]:
    owners = {"tl": tl, "core": tl.core, "standard": tl.standard, "math": tl.math, "tensor": tl.tensor,
              "builder": InterpreterBuilder, "function": InterpretedFunction}  # fmt: skip
    return {
        f"{o}.{n}": v for o, owner in owners.items() for n, v in vars(owner).items() if not n.startswith("__")
    }


def compile_it(kernel: Any) -> None:
    signature = {"x": "*fp32", "y": "*fp32", "out": "*fp32", "n": "i32", "BLOCK": "constexpr"}
    triton.compile(
        ASTSource(fn=kernel, signature=signature, constexprs={(4,): 256}), target=GPUTarget("cuda", 80, 32)
    )


def test_everything_is_put_back(generator: torch.Generator) -> None:
    before = language()
    kernel = function(ELEMENTWISE.format(expression="tanh(a) + tl.sigmoid(b)"))
    x, out = torch.randn(256, generator=generator), torch.empty(256)
    interpret(kernel, (1,), x, x, out, 256, BLOCK=256)
    assert language() == before
    compile_it(kernel)
    interpret(kernel, (1,), x, x, out, 256, BLOCK=256)
    torch.testing.assert_close(out, torch.tanh(x) + torch.sigmoid(x))


def test_everything_is_put_back_after_an_error() -> None:
    before = language()
    kernel = function(ELEMENTWISE.format(expression="tl.dot(a, b)"))
    x = torch.zeros(256)
    with pytest.raises(Exception, match=r"2D|dot|rank|dimension"):
        interpret(kernel, (1,), x, x, x, 256, BLOCK=256)
    assert language() == before
    compile_it(function(ELEMENTWISE.format(expression="a + b")))


def test_threads_take_turns(generator: torch.Generator) -> None:
    x, y = (torch.randn(200, generator=generator) for _ in range(2))
    found: dict[int, torch.Tensor] = {}

    def work(i: int) -> None:
        found[i] = elementwise(f"tanh(a) * {i}.0 + tl.sigmoid(b)", x, y, torch.float32)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for i in range(4):
        torch.testing.assert_close(found[i], torch.tanh(x) * i + torch.sigmoid(y))


def test_a_traceback_shows_the_generated_line() -> None:
    kernel = function(ELEMENTWISE.format(expression="a + b"))
    assert "tl.store(out + index, a + b, mask=index < n)" in inspect.getsource(kernel.fn)

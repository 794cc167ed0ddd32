"""The arithmetic of the C++ headers, function by function, in each lane and for plain numbers."""

from __future__ import annotations

import ctypes
import math
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

from attn_engine.codegen.backends.cpu_names import INCLUDE
from attn_engine.runtime.cpu_compile import find_compiler
from tests.runtime.cpu_attention import compiler_for

pytestmark = pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler")

FUNCTIONS = ("exp", "exp2", "log", "log2", "tanh", "sigmoid", "sqrt", "rsqrt", "sin", "cos", "floor", "abs")
# In the last place; 1 where not named.
UNITS = {"exp": 2, "exp2": 2, "log": 2, "log2": 2, "tanh": 6, "sigmoid": 4, "rsqrt": 2}
BODY = """
#include "kernel.h"
using namespace attention;
#define LANES_OF(F) extern "C" void lanes_##F(const Real* x, Real* y, long n) { \\
  for (long i = 0; i < n; i += LANES) store(y + i, attention::F(load(x + i))); } \\
  extern "C" void number_##F(const Real* x, Real* y, long n) { for (long i = 0; i < n; ++i) y[i] = attention::F(x[i]); }
"""
INTEGERS = """
extern "C" void integers(const int* a, const int* b, int* y, long n) {
  for (long i = 0; i < n; i += LANES) {
    Ints x, d;
    for (int k = 0; k < LANES; ++k) x.part[k / WIDTH][k % WIDTH] = a[i + k], d.part[k / WIDTH][k % WIDTH] = b[i + k];
    const Ints quotient = floor_div(x, d), rest = floor_mod(x, d);
    for (int k = 0; k < LANES; ++k) {
      y[i + k] = quotient.part[k / WIDTH][k % WIDTH], y[n + i + k] = rest.part[k / WIDTH][k % WIDTH];
      y[2 * n + i + k] = floor_div(a[i + k], b[i + k]), y[3 * n + i + k] = floor_mod(a[i + k], b[i + k]);
    }
  }
}
#define CONVERT(T, NAME) extern "C" void to_##NAME(const float* x, uint16_t* y, long n) { \\
  for (long i = 0; i < n; ++i) y[i] = element_of<T>(x[i]).bits; } \\
  extern "C" void from_##NAME(const uint16_t* x, float* y, long n) { \\
  for (long i = 0; i < n; ++i) y[i] = value_of(T{x[i]}); } \\
  extern "C" void vector_from_##NAME(const uint16_t* x, Real* y, long n) { \\
  for (long i = 0; i < n; i += WIDTH) *(FloatVector*)(y + i) = load_vector((const T*)x + i); } \\
  extern "C" void vector_to_##NAME(const Real* x, uint16_t* y, long n) { \\
  for (long i = 0; i < n; i += WIDTH) store_vector((T*)y + i, *(const FloatVector*)(x + i), n - i); }
CONVERT(Half, float16) CONVERT(BFloat16, bfloat16)
"""
TARGETS = ["native", "x86-64-v3", "x86-64-v2", "x86-64", "native clang++", "native double"]


@cache
def library(target: str, folder: Path) -> ctypes.CDLL:
    compiler = compiler_for(target.split()[0], "clang++" if "clang++" in target else "")
    source = folder / f"{target.replace(' ', '_')}.cpp"
    source.write_text(BODY + " ".join(f"LANES_OF({f})" for f in FUNCTIONS) + INTEGERS)
    double = ["-DCOMPUTE_IN_DOUBLE=1"] if "double" in target else []
    made = source.with_suffix(".so")
    subprocess.run(
        [*compiler.command, *compiler.flags, *double, f"-I{INCLUDE}", source, "-o", made], check=True
    )
    return ctypes.CDLL(str(made))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("functions")


def apply(function: Callable[..., None], x: torch.Tensor, result: torch.dtype, size: int = 1) -> torch.Tensor:
    y = torch.empty(x.numel() * size, dtype=result)
    function(ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(y.data_ptr()), ctypes.c_long(x.numel()))
    return y


def arguments(name: str, dtype: torch.dtype) -> torch.Tensor:
    small, large = torch.linspace(-1.5, 1.5, 4096), torch.linspace(-200, 200, 4096)
    tiny = torch.logspace(-30, 0, 2048)
    x = torch.cat([small, large, tiny, -tiny]).to(dtype)
    if name in ("log", "log2", "sqrt", "rsqrt"):
        return x.abs() + torch.finfo(dtype).tiny
    return (
        x.clamp(-80, 80) if name in ("exp", "exp2", "sigmoid") else x
    )  # far ends are looked at by themselves


@pytest.mark.parametrize("target", TARGETS)
def test_functions_are_accurate(target: str, folder: Path):
    dtype = torch.float64 if "double" in target else torch.float32
    for name in FUNCTIONS:
        x = arguments(name, dtype)
        want = getattr(torch, name)(x.double())
        size = want.to(dtype).abs()
        spacing = (torch.nextafter(size, torch.tensor(math.inf, dtype=dtype)) - size).double()
        for kind in ("lanes", "number"):
            got = apply(library(target, folder)[f"{kind}_{name}"], x, dtype).double()
            worst = ((got - want).abs() / spacing).max().item()
            assert worst <= UNITS.get(name, 1) + (4 if dtype is torch.float64 else 0), (
                f"{kind} {name}: {worst} units"
            )


@pytest.mark.parametrize("target", TARGETS)
def test_functions_at_the_ends(target: str, folder: Path):
    dtype = torch.float64 if "double" in target else torch.float32
    inf, nan = math.inf, math.nan
    ends = torch.tensor([-inf, inf, nan, 0.0, -1000.0, 1000.0, *[1.0] * 58], dtype=dtype)
    expected = {
        "exp2": [0, inf, nan, 1, 0, inf],
        "exp": [0, inf, nan, 1, 0, inf],
        "tanh": [-1, 1, nan, 0, -1, 1],
        "sigmoid": [0, 1, nan, 0.5, 0, 1],
    }
    for name, values in expected.items():
        got = apply(library(target, folder)[f"lanes_{name}"], ends, dtype)[:6]
        want = torch.tensor(values, dtype=dtype)
        if dtype is torch.float64 and name.startswith("exp"):
            want[4:] = got[4:]  # in range or not, by the library
        torch.testing.assert_close(
            got, want, rtol=0, atol=0, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )


def every_exponent() -> torch.Tensor:
    """Float32 numbers of both signs: subnormals and every exponent, 64 fractions each, and the ends of ranges."""
    fractions = (torch.arange(64) * 131101 + 7) % (1 << 23)  # an odd stride meets all the leading bits
    patterns = (torch.arange(255)[:, None] << 23) + fractions
    edges = torch.tensor(
        [1e-45, 2.0**-126, 1.0, 88.0, 88.72283, 88.7229, 87.33655, 103.0, 127.99999, 128.0, 9.0]
    )
    near = torch.cat([torch.nextafter(edges, torch.tensor(end)) for end in (0.0, math.inf)])
    x = torch.cat([patterns.flatten().int().view(torch.float32), edges, near])
    ends = torch.tensor([math.inf, -math.inf, math.nan, 0.0])
    x = torch.cat([x, -x, ends])
    return torch.cat([x, torch.ones(-len(x) % 64)])


@pytest.mark.parametrize("target", [t for t in TARGETS if "double" not in t])
def test_functions_over_every_exponent(target: str, folder: Path):
    """Ends, infinities and NaN exactly; results below 2^-126 may be zero instead."""
    x = every_exponent()
    spacing_below = 2.0**-126
    for name in FUNCTIONS:
        want = getattr(torch, name)(x.double())
        rounded = want.float()
        got = apply(library(target, folder)[f"lanes_{name}"], x, torch.float32)
        ends = ~rounded.isfinite()
        torch.testing.assert_close(
            got[ends], rounded[ends], rtol=0, atol=0, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )
        size = rounded[~ends].abs().clamp(min=spacing_below)
        spacing = (size - torch.nextafter(size, torch.zeros(()))).double()  # that of the numbers below
        error = (got[~ends].double() - want[~ends]).abs()
        error = torch.where(want[~ends].abs() < spacing_below, (error - spacing_below).clamp(min=0), error)
        worst, where = (error / spacing).max(0)
        assert worst.item() <= UNITS.get(name, 1), f"{name}({x[~ends][where].item()}): {worst.item()} units"


def test_division_of_integers_rounds_down(folder: Path):
    a = torch.arange(-64, 64, dtype=torch.int32).repeat(8)
    b = torch.tensor([-7, -3, -1, 1, 2, 3, 5, 64], dtype=torch.int32).repeat_interleave(128)
    y = torch.empty(4 * a.numel(), dtype=torch.int32)
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (a, b, y)]
    library("native", folder).integers(*pointers, ctypes.c_long(a.numel()))
    quotient, rest = torch.div(a, b, rounding_mode="floor"), torch.remainder(a, b)
    assert torch.equal(y.view(4, -1), torch.stack([quotient, rest, quotient, rest]))


@pytest.mark.parametrize("target", [t for t in TARGETS if "double" not in t])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_convert_as_torch_does(target: str, dtype: torch.dtype, folder: Path):
    name = str(dtype).removeprefix("torch.")
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16)
    exact = every.view(dtype).float()
    for kind in ("from", "vector_from"):
        torch.testing.assert_close(
            apply(library(target, folder)[f"{kind}_{name}"], every, torch.float32),
            exact,
            rtol=0,
            atol=0,
            equal_nan=True,
        )
    finite = exact[exact.isfinite()]
    ends = torch.tensor(
        [math.inf, -math.inf, math.nan, -math.nan, 1e38, 3.4e38, 65519.0, 65520.0, 1e-45, 2e-8]
    )
    odd = (
        torch.tensor([0x7FFFFFFF, 0x7F800001, -1, -0x7FFFFF]).int().view(torch.float32)
    )  # NaN, one bit off the edge
    x = torch.cat([ends, odd, *(finite * (1 + 2.0**-k) for k in (8, 9, 11, 12, 13))])
    x = torch.cat([x, torch.zeros(-len(x) % 64)])
    for kind in ("to", "vector_to"):
        got = apply(library(target, folder)[f"{kind}_{name}"], x, torch.uint16).view(dtype)
        torch.testing.assert_close(got, x.to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("target", [t for t in TARGETS if "double" not in t])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_part_of_a_vector_is_stored(target: str, dtype: torch.dtype, folder: Path):
    name = str(dtype).removeprefix("torch.")
    for count in range(1, 17):
        x, y = torch.randn(64), torch.full((64,), 7, dtype=torch.uint16)
        function = library(target, folder)[f"vector_to_{name}"]
        function(ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(y.data_ptr()), ctypes.c_long(count))
        assert torch.equal(y[:count].view(dtype), x[:count].to(dtype))
        assert (y[count:] == 7).all()

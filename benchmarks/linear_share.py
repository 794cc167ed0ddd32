"""The matrix parts of a chunk alone, against the micro-kernel alone: the part of its rate that they reach.

A generated kernel's own text is compiled with two functions behind it. One carries out a chunk's products, Gram
matrices, solves and state steps again and again, with all that packs and transposes for them; the other is the
micro-kernel with its operands in the first cache: one block of rows, the head's dimension deep.
"""

from __future__ import annotations

import ctypes
import re
from dataclasses import dataclass
from pathlib import Path

from attn_engine import LinearAttentionEngine
from attn_engine.linear_text import multiplications
from attn_engine.runtime.cpu_compile import compile_library
from attn_engine.runtime.linear_cpu import CpuChunks

MATRIX_PARTS = ("gram<", "gram_gradient<", "product<", "solve_", "state_step<", "transpose_rows(")
STEPS = {"forward": "scan", "backward": "gradient"}
WANTED = ("q", "k", "v", "decay", "beta")
SECONDS = 0.01  # of one run of either function, about

MICRO_KERNEL = """
extern "C" int64_t micro_kernel_operations() { return int64_t(2) * ROWS * LANES * D; }

extern "C" void micro_kernel(int64_t repeats, float* out) {
  alignas(64) static Real numbers[ROWS][D], lanes[D][LANES];
  for (int k = 0; k < D; ++k)
    for (int i = 0; i < LANES; ++i) lanes[k][i] = numbers[i % ROWS][k] = Real(0.01);
  Floats sums[ROWS];
  for (int r = 0; r < ROWS; ++r) sums[r] = fill(0);
  for (; repeats > 0; --repeats) {
    asm volatile("" ::: "memory");  // so that the operands are read again
#if defined(PAIRED_PRODUCTS)
    multiply_add(sums, D, (const Pair*)numbers[0], D / 2, 1, (const Pair*)lanes[0], LANES);
#else
    multiply_add(sums, D, numbers[0], D, 1, lanes[0], LANES);
#endif
  }
  for (int r = 0; r < ROWS; ++r) out[r] = total_of(sums[r]);
}
"""


@dataclass(frozen=True, slots=True)
class Parts:
    """Both functions, loaded, with the floating-point operations of a call that repeats once."""

    library: ctypes.CDLL
    operations: float

    @property
    def micro_operations(self) -> float:
        function = self.library.micro_kernel_operations
        function.restype = ctypes.c_int64
        return float(function())

    def matrices(self) -> float:
        """Carry out chunks for about SECONDS; returns their operations."""
        repeats = int(SECONDS * 1e11 / self.operations)
        function = self.library.matrix_parts
        function.argtypes = [ctypes.c_int64]
        function(repeats)
        return repeats * self.operations

    def micro_kernel(self) -> float:
        """Carry out the micro-kernel as long; returns its operations."""
        repeats = int(SECONDS * 2e11 / self.micro_operations)
        function = self.library.micro_kernel
        function.argtypes = [ctypes.c_int64, ctypes.c_void_p]
        function(repeats, (ctypes.c_float * 64)())
        return repeats * self.micro_operations


def parts(engine: LinearAttentionEngine, direction: str = "forward") -> Parts:
    """Of an engine's kernel of "forward" or "backward"; the backward's without the states that it finds again."""
    chunks = CpuChunks(engine.program, engine.chunk)
    wanted = WANTED if direction == "backward" else ()
    source = chunks.source(direction, wanted)
    kernel, tokens = chunks.kernel(direction, wanted), chunks.tokens(direction)
    body = kernel.gradient if direction == "backward" else kernel.scan
    operations = 2.0 * tokens * multiplications(body, engine.program, tokens)
    text = with_functions(source, STEPS[direction])
    return compile_library("linear_share", text, lambda path: Parts(_loaded(path), operations))


def all_operations(engine: LinearAttentionEngine, tokens: int, heads: int, *, backward: bool) -> float:
    """Of a forward call, or of one with its backward pass, which finds states again."""
    chunks, program = CpuChunks(engine.program, engine.chunk), engine.program
    found = multiplications(chunks.kernel("forward").scan, program, chunks.tokens("forward"))
    if backward:
        kernel = chunks.kernel("backward", WANTED)
        found += multiplications((*kernel.scan, *kernel.gradient), program, chunks.tokens("backward"))
    return 2.0 * found * tokens * heads


def with_functions(source: str, step: str) -> str:
    """A kernel's text with both functions behind it, which only benchmarks call."""
    body = source.split(f"const auto {step} = [&](int chunk_start)", 1)[1].split("\n  };\n", 1)[0]
    statements = [x for line in body.split("\n") if (x := line.strip()).startswith(MATRIX_PARTS)]
    words = set(re.findall(r"\w+", "\n".join(statements)))
    tiles = [n for n in re.findall(r"auto& (\w+) = scratch\.\w+;", source) if n in words]
    lines = [
        "",
        "namespace attention {",
        'extern "C" void matrix_parts(int64_t repeats) {',
        "  Scratch& scratch = *(Scratch*)aligned_alloc(64, (sizeof(Scratch) + 63) / 64 * 64);",
        "  for (size_t i = 0; i < sizeof(Scratch) / sizeof(Real); ++i) ((Real*)&scratch)[i] = Real(0.01);",
        *(f"  auto& {name} = scratch.{name};" for name in tiles),
        "  const int rows = CHUNK;",
        "  for (; repeats > 0; --repeats) {",
        *(f"    {line}" for line in statements),
        "  }",
        "  free(&scratch);",
        "}",
        MICRO_KERNEL,
        "}  // namespace attention",
    ]
    return source + "\n".join(lines) + "\n"


def _loaded(path: Path) -> ctypes.CDLL:
    return ctypes.CDLL(str(path))

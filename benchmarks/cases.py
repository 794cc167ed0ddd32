"""What is measured: the parts of the benchmark and the cases of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product

from benchmarks.patterns import NAMES, visible_pairs
from benchmarks.variants import VARIANTS

DTYPES = ("float32", "bfloat16")
DIRECTIONS = ("forward", "backward", "forward+backward")
# Products of matrices per pair: two forward; five backward, where the scores are computed once more.
FLOPS_PER_PAIR = {"forward": 4.0, "backward": 10.0, "forward+backward": 14.0}


@dataclass(frozen=True, slots=True)
class Case:
    """One measurement. pattern: a name of `patterns`, or of `variants` in the part of that name; threads 0: all."""

    part: str
    pattern: str
    dtype: str
    direction: str
    queries: int
    keys: int
    dim: int = 64
    heads: int = 8
    kv_heads: int = 8
    threads: int = 0

    def __str__(self) -> str:
        square = self.queries == self.keys
        sizes = f"S={self.keys}" if square else f"Sq={self.queries} Skv={self.keys}"
        heads = "" if self.heads == self.kv_heads == 8 else f" H={self.heads}/{self.kv_heads}"
        threads = f" threads={self.threads}" if self.threads else ""
        return f"{self.pattern} {self.dtype} {sizes} D={self.dim}{heads}{threads} {self.direction}"

    @property
    def flops(self) -> float:
        """Arithmetic of the pairs that the mask lets through, in operations."""
        mask = "causal" if self.pattern in VARIANTS else self.pattern
        pairs = visible_pairs(mask, self.queries, self.keys)
        return FLOPS_PER_PAIR[self.direction] * self.heads * pairs * self.dim


@dataclass(frozen=True, slots=True)
class Part:
    """A part of the benchmark. minutes: how long it takes on two cores, about."""

    cases: Callable[[], Iterator[Case]]
    minutes: float
    about: str


def table(lengths: tuple[int, ...], dtypes: tuple[str, ...]) -> Callable[[], Iterator[Case]]:
    def cases() -> Iterator[Case]:
        for name, dtype, length, dim, direction in product(NAMES, dtypes, lengths, (64, 128), DIRECTIONS):
            yield Case("table", name, dtype, direction, length, length, dim)

    return cases


def share() -> Iterator[Case]:
    for dtype, direction, length, dim, threads in product(
        DTYPES, DIRECTIONS[:2], (1024, 4096), (64, 128), (1, 0)
    ):
        yield Case("share", "full", dtype, direction, length, length, dim, threads=threads)


def decode() -> Iterator[Case]:
    head_counts = ((8, 8), (32, 8), (32, 4))
    for queries, dtype, dim, (heads, kv_heads), keys in product(
        (1, 4, 16), DTYPES, (64, 128, 256), head_counts, (512, 4096, 16384, 65536)
    ):
        yield Case("decode", "full", dtype, "forward", queries, keys, dim, heads, kv_heads)


def mods() -> Iterator[Case]:
    for name, dtype, length, direction in product(VARIANTS, DTYPES, (1024, 4096), DIRECTIONS[:2]):
        yield Case("mods", name, dtype, direction, length, length)


def small() -> Iterator[Case]:
    for name, dtype, direction in product(("full", "causal"), DTYPES, DIRECTIONS):
        yield Case("small", name, dtype, direction, 64, 64, heads=4, kv_heads=4)


def threads() -> Iterator[Case]:
    for name, dtype, length, direction in product(("full", "causal"), DTYPES, (1024, 4096), DIRECTIONS[:2]):
        yield Case("threads", name, dtype, direction, length, length)


def memory() -> Iterator[Case]:
    for name, dtype in product(("full", "causal"), DTYPES):
        yield Case("memory", name, dtype, "forward+backward", 16384, 16384)


def sweep(direction: str, longest: int) -> Callable[[], Iterator[Case]]:
    def cases() -> Iterator[Case]:
        for name, dtype in product(NAMES, DTYPES):
            length = 256
            while length <= longest and name != "causal documents":
                yield Case("sweep", name, dtype, direction, length, length)
                length *= 2

    return cases


PARTS = {
    "table-1024": Part(table((1024,), DTYPES), 6, "against SDPA, flex_attention and eager, length 1024"),
    "table-4096-float32": Part(table((4096,), DTYPES[:1]), 8, "the same, length 4096 in float32"),
    "table-4096-bfloat16": Part(table((4096,), DTYPES[1:]), 8, "the same, length 4096 in bfloat16"),
    "share": Part(share, 1, "share of the machine's peak"),
    "decode": Part(decode, 7, "few queries, many keys"),
    "mods": Part(mods, 3, "normalisers, score functions and learned biases against plain softmax"),
    "small": Part(small, 0.3, "length 64"),
    "threads": Part(threads, 1, "all threads against one"),
    "memory": Part(memory, 1.5, "peak memory of a training step, length 16384"),
    "sweep-forward": Part(sweep("forward", 16384), 9, "speed against length, for the plots"),
    "sweep-backward": Part(sweep("backward", 8192), 6, "the same, backward"),
}


def is_quick(case: Case) -> bool:
    """Whether the case is in the small selection: about two minutes altogether."""
    if case.part in ("memory", "sweep"):
        return False
    if case.part == "decode":
        return case.queries == 1 and case.keys == 4096 and case.dim == 64
    return case.queries <= 1024 and case.dim == 64 and (case.part, case.dtype) != ("mods", "bfloat16")

"""Every check in the order of its importance: where the time runs out, the rest is listed as not run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from attn_engine.gpu_check.cases import Case, Sizes

USUAL = Sizes(2, 8, 8, 2048, 2048)
WIDE = replace(USUAL, dim=128, dim_v=128)
GROUPED = replace(WIDE, heads=16, kv_heads=2)
RAGGED = Sizes(2, 4, 2, 1000, 1931)
LONG = Sizes(1, 2, 1, 32768, 32768, 128, 128)


@dataclass(frozen=True, slots=True)
class Check:
    """kind: a name of `checks.KINDS`."""

    kind: str
    case: Case
    about: str = ""

    @property
    def name(self) -> str:
        return f"{self.about}: {self.case}" if self.about else str(self.case)

    @property
    def heavy(self) -> bool:
        """Whether it takes so much memory that it runs beside no other such check."""
        return self.case.sampled or self.case.layout in ("batches apart", "rows apart")


def _numbers(sizes: Sizes, **case: Any) -> Check:
    return Check("numbers", Case(sizes, **case))


FIRST = (
    _numbers(WIDE, mask="causal"),
    _numbers(WIDE),
    _numbers(USUAL, score="soft-cap alibi", mask="window 1024"),
    _numbers(GROUPED, mask="causal documents"),
    Check("repeated", Case(GROUPED, score="soft-cap alibi", mask="causal"), "the same bits again"),
    _numbers(RAGGED, mask="empty rows", layout="surrounded"),
    _numbers(RAGGED, dtype="float16", mask="causal", layout="odd"),
    _numbers(RAGGED, dtype="float32", score="alibi", mask="causal", layout="surrounded"),
)
VARIANTS = (
    _numbers(USUAL, normaliser="sigmoid", mask="causal"),
    _numbers(USUAL, normaliser="relu", mask="causal"),
    _numbers(USUAL, normaliser="retention", mask="causal"),
    _numbers(USUAL, normaliser="softmax of normalised", mask="causal"),
    _numbers(USUAL, score="soft-cap"),
    _numbers(USUAL, mask="documents"),
    _numbers(USUAL, mask="prefix", dtype="float16"),
    _numbers(USUAL, mask="causal", listed=True),
    _numbers(USUAL, mask="documents", listed=True, score="alibi"),
    _numbers(replace(RAGGED, q_len=700, kv_len=700), score="query and key bias", mask="causal"),
    _numbers(Sizes(2, 4, 4, 512, 512), score="pair bias"),
)
LENGTHS = (1000, 1, 0, 555, 64, 492)
PACKED = replace(GROUPED, batches=1, q_len=sum(LENGTHS), kv_len=sum(LENGTHS))
SPARSE = (
    _numbers(PACKED, mask="causal", lengths=LENGTHS),
    _numbers(PACKED, mask="causal", blocks="2D", lengths=LENGTHS),
    _numbers(GROUPED, mask="causal", blocks="2D"),
    _numbers(GROUPED, mask="causal", blocks="per token"),
    _numbers(USUAL, mask="hash"),
    _numbers(USUAL, mask="qk"),
    _numbers(GROUPED, mask="local-stride"),
    _numbers(PACKED, score="soft-cap alibi", mask="window 1024", lengths=LENGTHS, dtype="float16"),
    _numbers(replace(PACKED, heads=4), mask="causal", blocks="per token", lengths=LENGTHS),
)
SHAPES = (
    _numbers(replace(USUAL, dim=192, dim_v=128), mask="causal"),
    _numbers(replace(USUAL, heads=4, kv_heads=4, dim=256, dim_v=256), mask="causal"),
    _numbers(LONG, mask="causal"),
    _numbers(Sizes(2, 8, 2, 1, 4096, 128, 128), gradients=False),
    _numbers(Sizes(2, 16, 2, 5, 5000, 128, 128), score="soft-cap", gradients=False),
    _numbers(Sizes(1, 3, 1, 77, 33, 64, 64), mask="causal", layout="every other"),
    _numbers(Sizes(2, 4, 2, 333, 1000, 96, 80), mask="documents", layout="heads inside"),
    _numbers(Sizes(2, 2, 1, 64, 64, 40, 24), dtype="float32"),
)
FAR_APART = (
    Check("numbers", Case(Sizes(2, 2, 2, 300, 300), mask="causal", layout="batches apart"), "64-bit offsets"),
    Check("numbers", Case(Sizes(1, 2, 1, 300, 300), mask="causal", layout="rows apart"), "64-bit offsets"),
    Check("numbers", Case(Sizes(1, 64, 8, 2**18 + 9, 24, 128, 128), sampled=True), "more than 2^31 elements"),
)
REST = (
    Check("refused", Case(RAGGED, mask="causal"), "devices"),
    Check("repeated", Case(WIDE, normaliser="retention", mask="causal documents"), "the same bits again"),
    Check("repeated", Case(LONG, mask="causal"), "the same bits again"),
    _numbers(replace(LONG, heads=4, kv_heads=1), mask="causal documents"),
    _numbers(GROUPED, dtype="float16", score="alibi", mask="window 1024"),
    _numbers(WIDE, dtype="float32", normaliser="retention", mask="causal"),
    _numbers(replace(USUAL, dim=64, dim_v=256, heads=4, kv_heads=4), mask="causal"),
    _numbers(Sizes(2, 4, 4, 1500, 1500, 128, 128), normaliser="softmax of normalised", dtype="float16"),
    _numbers(Sizes(1, 6, 2, 2000, 100, 128, 64), normaliser="sigmoid", score="alibi", dtype="float16"),
)
CHECKS: tuple[Check, ...] = (*FIRST, *VARIANTS, *SPARSE, *SHAPES, *FAR_APART, *REST)

"""Names of captured values in a kernel: the user's own where possible, valid and unique everywhere."""

from __future__ import annotations

import builtins
import keyword
import re
from collections.abc import Hashable

from attn_engine.ir.kernel_words import KERNEL_WORDS

_OTHER_WORDS = """
    q k v o do dq dk dv keys values output scores logits d_scores weights dim_qk dim_v block_q block_kv mask torch np
    math forward backward program inf nan true false stride size
"""
_CPP_WORDS = """
    alignas alignof and_eq asm auto bitand bitor bool case catch char class compl const constexpr const_cast
    decltype default delete do double dynamic_cast else enum explicit export extern false float for friend
    goto if inline int long mutable namespace new noexcept not_eq nullptr operator or_eq private protected
    public register reinterpret_cast restrict return short signed sizeof static static_assert static_cast
    struct switch template this thread_local throw true try typedef typeid typename union unsigned using
    virtual void volatile wchar_t while xor xor_eq std main int8_t int16_t int32_t int64_t uint8_t size_t
    exp exp2 log log2 tanh sqrt sin cos abs fabs floor min max pow round
"""
RESERVED = frozenset(
    [*KERNEL_WORDS, *_OTHER_WORDS.split(), *_CPP_WORDS.split(), *keyword.kwlist, *dir(builtins)]
)
# Names that row values may have, and captured values may not.
_ROW_WORDS = frozenset(
    "lse row_max row_sum safe_row_max inverse_sum saved_lse saved_row_max saved_inverse_sum result_tile".split()
)
_PREFIXES = ("block_", "tile_", "stride_", "grid_", "attn_", "part_", "partial_", "BLOCK_")


def type_name(value: object) -> str:
    """How a message calls a value's type: "an int", "a list"."""
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeioAEIO' else 'a'} {name}"


class KernelNames:
    """Hands out names; the same captured thing (a closure cell, a global, a custom input) always gets the same one.

    One instance serves all functions of one engine, so that no two different tensors share a name.
    """

    def __init__(self, words: frozenset[str] = frozenset()) -> None:
        """words: names that the kernels of this engine have beside those of every kernel."""
        self._words = words
        self._by_key: dict[Hashable, str] = {}
        self._taken: set[str] = set()
        self._alive: list[object] = []

    def assign(self, key: Hashable, wanted: str | None, owner: object = None, row: bool = False) -> str:
        """The name of `key`, built from `wanted` the first time. `owner` is kept alive where the key holds its id."""
        if key not in self._by_key:
            self._alive.append(owner)
            self._by_key[key] = self._free(wanted, row)
        return self._by_key[key]

    @property
    def taken(self) -> frozenset[str]:
        """Every name that has been handed out."""
        return frozenset(self._taken)

    def _free(self, wanted: str | None, row: bool) -> str:
        base = re.sub(r"\W", "_", wanted or "", flags=re.ASCII).strip("_")
        if base and base[0].isdigit():
            base = f"n{base}"
        candidates = [base] if base and not self._unfit(base) and (row or base not in _ROW_WORDS) else []
        stem = base or "captured"
        count = 0 if not base else 1
        while not candidates or candidates[-1] in self._taken:
            candidates.append(f"{stem}_{count}")
            count += 1
        self._taken.add(candidates[-1])
        return candidates[-1]

    def _unfit(self, name: str) -> bool:
        return (
            name in RESERVED
            or name in self._words
            or name.startswith(_PREFIXES)
            or re.search(r"_(size|stride)(_\d+)?$", name) is not None
        )

"""Query heads that share a kv head as neighbouring rows: tensors of a call whose program is packed (`pack_heads`).

Row = query * group + head in group. One copy each way, which autograd takes back.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class PackedRows:
    """layout: "bshd" or "bhsd", with a batch or without. group: query heads of a kv head."""

    layout: str
    group: int

    def pack(self, q: Tensor) -> Tensor:
        """(..., rows, heads, dim) as (..., rows * group, kv heads, dim), or the same with heads before rows."""
        if self.group == 1:
            return q
        if self.layout == "bshd":
            return q.unflatten(-2, (-1, self.group)).transpose(-3, -2).flatten(-4, -3)
        return q.unflatten(-3, (-1, self.group)).transpose(-3, -2).flatten(-3, -2)

    def unpack(self, o: Tensor) -> Tensor:
        """The other way."""
        if self.group == 1:
            return o
        if self.layout == "bshd":
            return o.unflatten(-3, (-1, self.group)).transpose(-3, -2).flatten(-3, -2)
        return o.unflatten(-2, (-1, self.group)).transpose(-3, -2).flatten(-4, -3)

    def unpack_rows(self, x: Tensor) -> Tensor:
        """Row values (..., kv heads, rows * group) as (..., heads, rows)."""
        if self.group == 1:
            return x
        return x.unflatten(-1, (-1, self.group)).transpose(-2, -1).flatten(-3, -2)


# By identity, weakly, as `sequences.tables_in` keeps what follows from spans.
_kept: dict[tuple[int, int], tuple[weakref.ref[Tensor], Tensor]] = {}


def packed_spans(spans: Tensor, group: int) -> Tensor:
    """Where the packed rows of each sequence lie; the same tensor again for the same spans, which nobody changes."""
    if group == 1:
        return spans
    key = (id(spans), group)
    found = _kept.get(key)
    if found is not None and found[0]() is spans:
        return found[1]
    made = spans * group
    _kept[key] = weakref.ref(spans, lambda _: _kept.pop(key, None)), made
    return made

"""Where a tile of a tile program lies in a tensor."""

from __future__ import annotations


class Span:
    """Where a tile lies along one dimension of a tensor; axis is "" for a single position."""

    __slots__ = ("axis", "inside", "length", "overlap", "positions")

    def __init__(self, axis: str, start: int, length: int, size: int) -> None:
        self.axis, self.length = axis, length
        self.overlap = max(0, min(start + length, size) - start) if start >= 0 else 0
        self.inside = self.overlap == length
        self.positions = slice(start, start + self.overlap) if axis else start

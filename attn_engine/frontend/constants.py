"""Numbers that a function captures and that are compiled in."""

from __future__ import annotations


class Constant(int):
    """An int whose value the compiler may use: the bounds of loops follow a division by it, where those of a number
    that is read at every call do not. Another value is another kernel.

    >>> stride = Constant(16)
    >>> stride + 1
    17
    """

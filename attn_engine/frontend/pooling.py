"""Pooled weights: what a row gives to every block of keys, as a further output of a normaliser."""

from __future__ import annotations

from attn_engine.errors import UnknownOption
from attn_engine.frontend.online import OnlineFunc
from attn_engine.ir.program import Pooled

_LEAST = 16


class WithPooled(OnlineFunc):
    """A normaliser and what is pooled of its weights: made by `with_pooled`."""

    def __init__(self, inner: OnlineFunc | type[OnlineFunc], pooled: tuple[Pooled, ...]) -> None:
        super().__init__()
        self.inner, self.pooled = inner, pooled


def with_pooled(online_func: OnlineFunc | type[OnlineFunc], *, max: int = 0, sum: int = 0) -> WithPooled:
    """The same normaliser, of which a call also hands out the largest weight, or the sum, of every block of keys.

    max, sum: keys of a block, a power of two from 16 on; 0: not wanted. With return_final_rowscales=True, a call's row
    values then have "pooled_max", "pooled_sum": (B, H, Sq, ceil(Skv / block)), float32 (float64 for float64 inputs), 0
    in blocks of which the row sees no key. Sums have gradients; a loss that uses a maximum is refused
    (PooledMaximumNotDifferentiable). Raises UnknownOption.

    >>> with_pooled(OnlineFunc, max=64).pooled
    (Pooled(kind='max', block=64),)
    """
    wanted = {"max": max, "sum": sum}
    for kind, block in wanted.items():
        if block and (block < _LEAST or block & (block - 1)):
            known = f"0 or a power of two from {_LEAST} on"
            raise UnknownOption(option=kind, value=block, where="with_pooled", known=known)
    inner, before = without_pooled(online_func)
    for p in before:
        if wanted[p.kind]:
            known = f"{p.block}, which it has already: a normaliser pools each kind once"
            raise UnknownOption(option=p.kind, value=wanted[p.kind], where="with_pooled", known=known)
    return WithPooled(inner, (*before, *(Pooled(kind, block) for kind, block in wanted.items() if block)))


def without_pooled(
    online_func: OnlineFunc | type[OnlineFunc],
) -> tuple[OnlineFunc | type[OnlineFunc], tuple[Pooled, ...]]:
    """The normaliser itself, and what is pooled."""
    if isinstance(online_func, WithPooled):
        return online_func.inner, online_func.pooled
    return online_func, ()

"""Kernels over keys and values in a narrow type, with scales: any forward kernel, its K and V with a companion each.

Nothing of a kernel changes but its parameters: K lies in bytes, and K_scale, which follows it, has a number for every
row or for every 128 columns of a row. Rows become numbers of the compute type, byte times scale, where a tile of them
is read. Whatever names a row of K (a sequence, a page, a head) names it in K_scale too.
"""

from __future__ import annotations

from dataclasses import replace

from attn_engine.ir.expr import Cast, Expr, transform
from attn_engine.ir.ops import Storage
from attn_engine.ir.tile import Kernel, Param, map_expressions

SCALED = ("K", "V")


def scale_param(tensor: str) -> str:
    """The scales of a tensor: float32, its shape but for the last dimension: 1, or a number for every 128 columns."""
    return f"{tensor}_scale"


SCALES = tuple(scale_param(tensor) for tensor in SCALED)


def with_scales(kernel: Kernel, cache: Storage) -> Kernel:
    """The kernel whose K and V lie as `cache` says, beside their scales."""
    params: list[Param] = []
    for p in kernel.params:
        if p.name not in SCALED:
            params.append(p)
            continue
        scale = scale_param(p.name)
        params += [replace(p, storage=cache), Param(scale, Storage.FLOAT32, (*p.shape[:-1], f"{scale}s"))]
    body = map_expressions(kernel.body, lambda e: transform(e, _unrounded))
    return replace(kernel, params=tuple(params), body=body)


def _unrounded(e: Expr) -> Expr | None:
    """What a product reads beside such a tensor stays wide."""
    return e.x if isinstance(e, Cast) and e.like in SCALED else None


def is_scaled(kernel: Kernel) -> bool:
    """Whether it is one of those."""
    return any(p.name in SCALES for p in kernel.params)

"""Kernels over keys and values in a narrow type, with scales: any forward kernel, its K and V with a companion each.

Nothing of a kernel changes but its parameters: K lies in bytes, and K_scale, which follows it, has a number for every
row or for every 128 columns of a row. Rows become numbers of the compute type, byte times scale, where a tile of them
is read. Whatever names a row of K (a sequence, a page, a head) names it in K_scale too.
"""

from __future__ import annotations

from dataclasses import replace

from attn_engine.ir.expr import Cast, Const, Expr, Load, transform
from attn_engine.ir.ops import DType, Storage
from attn_engine.ir.tile import If, Kernel, Let, Loop, Narrow, Param, Stmt, map_expressions

SCALED = ("K", "V")
COLUMNS_OF_SCALE = 128  # where a row has several; backends/include/scaled.h has the same


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
    body = map_expressions(kernel.body, lambda e: transform(e, _rounded_as_queries))
    return replace(kernel, params=tuple(params), body=body)


def _rounded_as_queries(e: Expr) -> Expr | None:
    """What a product reads beside such a tensor, for its numbers are of the queries' type."""
    return Cast(e.x, "Q") if isinstance(e, Cast) and e.like in SCALED else None


def is_scaled(kernel: Kernel) -> bool:
    """Whether it is one of those."""
    return any(p.name in SCALES for p in kernel.params)


def multiplied(kernel: Kernel) -> Kernel:
    """The same kernel with bytes and scales loaded and multiplied by statements, for backends that spell those.

        key = K[batch, kv_head, kv_idx, d_idx] * K_scale[batch, kv_head, kv_idx, 0], in the type of Q

    Pieces of columns (`columns.py`) have one scale for each row here. Where rows have one for all columns, its last
    stride is 0.
    """
    return replace(kernel, body=_multiplied(kernel, kernel.body)) if is_scaled(kernel) else kernel


def _multiplied(kernel: Kernel, body: tuple[Stmt, ...]) -> tuple[Stmt, ...]:
    done: list[Stmt] = []
    for s in body:
        match s:
            case Loop() | If():
                done.append(replace(s, body=_multiplied(kernel, s.body)))
            case Narrow(tensor) if tensor in SCALED:
                done += [s, replace(s, tensor=scale_param(tensor))]
            case Let(_, Load(tensor, _, indices)) if tensor in SCALED:
                done.append(replace(s, value=_numbers(kernel, tensor, indices)))
            case _:
                done.append(s)
    return tuple(done)


def _numbers(kernel: Kernel, tensor: str, indices: tuple[Expr, ...]) -> Expr:
    *row, columns = indices
    block = kernel.first_column(*columns.axes) // COLUMNS_OF_SCALE
    scale = Load(scale_param(tensor), DType.FLOAT, (*row, Const(block)))
    return Cast(Load(tensor, DType.FLOAT, indices) * scale, "Q")

"""Kernels over keys that lie in pages: any kernel over sequences, its tiles of K and V found through a table.

A tile of keys lies within one page, for tiles divide pages. So nothing of a kernel changes but where a tile is loaded:

    kv_page = block_table[batch, kv_start // 64]
    page_start = kv_start // 64 * 64
    K = the rows of that page of K, the first of which is position page_start
    key = K[0, kv_head, kv_idx, d_idx]

K and V are (pages, kv_heads, rows of a page, dimension), with any strides.
"""

from __future__ import annotations

from dataclasses import replace

from attn_engine.codegen.lower.values import INT, KV_LEN, scalar
from attn_engine.ir.expr import Const, Expr, Load, call, loads, transform
from attn_engine.ir.ops import Op, Storage
from attn_engine.ir.program import BATCH
from attn_engine.ir.tile import If, Kernel, Let, Loop, Narrow, Param, Stmt, expressions

PAGED = ("K", "V")
BLOCK_TABLE = "block_table"
PAGE, PAGE_START, KV_START = scalar("kv_page"), scalar("page_start"), scalar("kv_start")


def over_pages(kernel: Kernel, page: int) -> Kernel:
    """The kernel whose K and V lie in pages of so many rows, which a table names: int32 (batches, pages of one)."""
    if not any(p.name in PAGED for p in kernel.params):
        return kernel
    assert page % kernel.block("kv") == 0, "a tile of keys lies within one page"
    table = Param(BLOCK_TABLE, Storage.INT32, ("batches", "table_pages"))
    params = [replace(p, shape=("pages", *p.shape[1:])) if p.name in PAGED else p for p in kernel.params]
    inputs, outputs = ([p for p in params if p.output is output] for output in (False, True))
    return replace(kernel, params=(*inputs, table, *outputs), body=_paged(kernel.body, page))


def _paged(body: tuple[Stmt, ...], page: int) -> tuple[Stmt, ...]:
    """The statements, with the page found before the first of a block that loads from it."""
    read = [name for name in PAGED if any(name == x.tensor for s in body for x in _loads(s))]
    done: list[Stmt] = []
    for s in body:
        if isinstance(s, Loop | If):
            s = replace(s, body=_paged(s.body, page))
        elif isinstance(s, Let) and (found := _loads(s)) and {x.tensor for x in found} & set(read):
            done += _found_page(read, page)
            read = []
        done.append(_of_page(s) if isinstance(s, Let) else s)
    return tuple(done)


def _found_page(tensors: list[str], page: int) -> list[Stmt]:
    number = KV_START // page
    length = call(Op.MIN, KV_LEN, PAGE_START + page)
    return [
        Let(PAGE.name, Load(BLOCK_TABLE, INT, (BATCH, number))),
        Let(PAGE_START.name, number * page),
        *(Narrow(name, "kv", -PAGE_START, length, PAGE) for name in tensors),
    ]


def _of_page(s: Let) -> Let:
    """A load from the page that was found: it is the only one that there is."""

    def change(e: Expr) -> Expr | None:
        match e:
            case Load(tensor, kind, (_, *rest)) if tensor in PAGED:
                return Load(tensor, kind, (Const(0), *rest))
            case _:
                return None

    return replace(s, value=transform(s.value, change))


def _loads(s: Stmt) -> list[Load]:
    """What a statement itself loads from K and V."""
    return [x for e in expressions(s) for x in loads(e) if x.tensor in PAGED]

"""Kernels over keys that lie in pages: any kernel over sequences, its tiles of K and V found through a table.

Nothing of a kernel changes but where a tile is loaded. Where tiles divide pages, a tile lies in one page:

    kv_page = block_table[batch, kv_start // 128]
    page_start = kv_start // 128 * 128
    K = the rows of page kv_page of K, position page_start first
    key = K[0, kv_head, kv_idx, d_idx]

Where they do not, every position of the tile is looked up:

    kv_pages = block_table[batch, kv_idx // 16]
    K = the rows of pages kv_pages of K, positions kv_idx // 16 * 16 first

K and V are (pages, kv_heads, rows of a page, dimension), with any strides.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from attn_engine.codegen.lower.values import INT, KV_LEN, scalar
from attn_engine.ir.expr import Call, Const, Expr, Load, Var, call, loads, transform
from attn_engine.ir.ops import Op, Storage
from attn_engine.ir.passes.unread import without_unread
from attn_engine.ir.program import BATCH, KV_IDX
from attn_engine.ir.tile import If, Kernel, Let, Loop, Narrow, Param, Stmt, expressions, walk

PAGED = ("K", "V")
BLOCK_TABLE = "block_table"
PAGES_OF_TILE = "kv_pages"
PAGE, PAGE_START, KV_START = scalar("kv_page"), scalar("page_start"), scalar("kv_start")


def over_pages(kernel: Kernel, page: int) -> Kernel:
    """The kernel whose K and V lie in pages of so many rows, which a table names: int32 (batches, pages of one)."""
    if not any(p.name in PAGED for p in kernel.params):
        return kernel
    # With sizes of its own, as captured tensors: positions behind the last key may lie behind the table.
    sizes = (f"{BLOCK_TABLE}_size_0", f"{BLOCK_TABLE}_size_1")
    table = Param(BLOCK_TABLE, Storage.INT32, sizes)
    params = [replace(p, shape=("pages", *p.shape[1:])) if p.name in PAGED else p for p in kernel.params]
    inputs, outputs = ([p for p in params if p.output is output] for output in (False, True))
    found = _one_page if page % kernel.block("kv") == 0 else _pages_of_positions
    return replace(kernel, params=(*inputs, table, *outputs), body=_paged(kernel.body, page, found))


def _paged(body: tuple[Stmt, ...], page: int, found: _Found) -> tuple[Stmt, ...]:
    """The statements, with the page found before the first of a block that loads from it."""
    read = [name for name in PAGED if any(name == x.tensor for s in body for x in _loads(s))]
    done: list[Stmt] = []
    for s in body:
        if isinstance(s, Loop | If):
            s = replace(s, body=_paged(s.body, page, found))
        elif read and _loads(s):
            done += found(read, page)
            read = []
        done.append(_of_page(s) if isinstance(s, Let) else s)
    return tuple(done)


_Found = Callable[[list[str], int], list[Stmt]]


def _one_page(tensors: list[str], page: int) -> list[Stmt]:
    """The page that a tile lies in."""
    number = KV_START // page
    length = call(Op.MIN, KV_LEN, PAGE_START + page)
    return [
        Let(PAGE.name, Load(BLOCK_TABLE, INT, (BATCH, number))),
        Let(PAGE_START.name, number * page),
        *(Narrow(name, "kv", -PAGE_START, length, PAGE) for name in tensors),
    ]


def _pages_of_positions(tensors: list[str], page: int) -> list[Stmt]:
    """The page of every position."""
    found = Let(PAGES_OF_TILE, Load(BLOCK_TABLE, INT, (BATCH, KV_IDX // page)))
    return [found, *(Narrow(name, "kv", -(KV_IDX // page * page), KV_LEN, found.var) for name in tensors)]


def with_tables_at_hand(kernel: Kernel, *, within_tiles: bool = False) -> Kernel:
    """The kernel whose Narrows say by themselves in which table pages are found, for backends that do so row by row.

    within_tiles: only those whose pages differ from position to position.
    """
    names = (PAGES_OF_TILE,) if within_tiles else (PAGE.name, PAGES_OF_TILE)
    made = (s for s in walk(kernel.body) if isinstance(s, Let) and s.name in names)
    pages = {s.var: s.value for s in made}
    if not pages:
        return kernel
    return without_unread(replace(kernel, body=_inlined(kernel.body, pages)))


def _inlined(body: tuple[Stmt, ...], pages: dict[Var, Expr]) -> tuple[Stmt, ...]:
    done: list[Stmt] = []
    for s in body:
        if isinstance(s, Loop | If):
            s = replace(s, body=_inlined(s.body, pages))
        elif isinstance(s, Narrow) and isinstance(s.page, Var) and s.page in pages:
            s = replace(s, page=pages[s.page])
        done.append(s)
    return tuple(done)


def table_of_pages(s: Narrow) -> tuple[Load, int]:
    """The load from the table, and the rows of a page, of a Narrow after `with_tables_at_hand`."""
    assert isinstance(s.page, Load)
    index = s.page.indices[1]
    assert isinstance(index, Call)
    rows = index.args[1]
    assert isinstance(rows, Const)
    return s.page, int(rows.value)


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

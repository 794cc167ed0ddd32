"""Loops over listed blocks: which tiles a program meets is read from lists that were made before the launch.

A loop over the entries of a list stands around the loop over the tiles of one block:

    for entry from partial_begin to partial_end:
        kv_block = kv_partial_blocks[entry]
        for kv_start from kv_block * 64 to kv_block * 64 + 64 by tiles of kv: ...
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from attn_engine.codegen.lower.score import ENDS, Masked
from attn_engine.codegen.lower.values import INT, KV_HEAD, SPLIT, SPLITS, scalar
from attn_engine.codegen.schedule import Edges
from attn_engine.ir.expr import Const, Expr, Load, Var, call, loads
from attn_engine.ir.ops import DType, Op, Storage
from attn_engine.ir.passes.mask_range import OTHER
from attn_engine.ir.program import BATCH, HEAD, Attention, ListedBlocks
from attn_engine.ir.tile import If, Let, Loop, Param, Stmt, expressions, walk

KINDS = ("partial", "full")
ENTRY = scalar("entry")
WHOLE = Var("tile_is_whole", DType.BOOL)


def starts_param(loop: str, kind: str) -> str:
    """Where the list of each block begins: (batches, heads, blocks + 1), offsets into the blocks."""
    return f"{loop}_{kind}_starts"


def blocks_param(loop: str, kind: str) -> str:
    """The blocks of `loop` that are listed, one list after the other."""
    return f"{loop}_{kind}_blocks"


def seen_param(loop: str) -> str:
    """Which parts of a block in the partial list are visible: words of 32 bits, as many as an entry needs."""
    return f"{loop}_partial_seen"


def list_params(program: Attention, body: tuple[Stmt, ...]) -> tuple[Param, ...]:
    """The lists that a kernel reads."""
    listed = program.listed
    if listed is None:
        return ()
    read = {x.tensor for s in walk(body) for e in expressions(s) for x in loads(e)}
    params: list[Param] = []
    for loop, axis in OTHER.items():
        for kind in listed.kinds:
            shape = ("batches", listed.heads, f"{axis}_bounds")
            params.append(Param(starts_param(loop, kind), Storage.INT32, shape))
            params.append(Param(blocks_param(loop, kind), Storage.INT32, (f"{kind}_listed",)))
        params.append(Param(seen_param(loop), Storage.INT32, ("partial_words",)))
    return tuple(p for p in params if p.name in read)


@dataclass(frozen=True, slots=True)
class ListedRun:
    """The tiles of the blocks in entries begin to end of a list.

    block, tile: positions of each. end_of_axis: where tiles end; None where one tile is a block. masked: how each tile
    is; whole: tiles for which this holds need no mask, and None where there are none. clamped: tiles end with the axis.
    """

    title: str
    step: str
    blocks: str
    begin: Expr
    end: Expr
    block: int
    tile: int
    masked: Masked
    whole: Expr | None
    clamped: bool

    def loop(self, axis: str, step: Callable[[Masked], list[Stmt]]) -> Loop:
        """The loop over the entries; `step` makes what is done to a tile."""
        block = Var(f"{axis}_block", INT)
        first = block * self.block
        stop = first + self.block
        if self.clamped:
            stop = call(Op.MIN, stop, scalar(f"{axis}_end"))
        body = tuple(self._tested(self.whole, step) if self.whole is not None else step(self.masked))
        tiles = Loop(f"{axis}_start", first, stop, axis, body, self.step)
        read = Let(block.name, Load(self.blocks, INT, (ENTRY,)))
        return Loop(ENTRY.name, self.begin, self.end, None, (read, tiles))

    def _tested(self, whole: Expr, step: Callable[[Masked], list[Stmt]]) -> list[Stmt]:
        return [
            Let(WHOLE.name, whole),
            If(WHOLE, tuple(step(False)), "full_step"),
            If(~WHOLE, tuple(step(self.masked)), "edge_step"),
        ]


def listed_runs(
    program: Attention,
    listed: ListedBlocks,
    loop: str,
    tiles: dict[str, int],
    edges: Edges,
    *,
    own_rows_count: bool,
    one_split: bool,
) -> tuple[list[Stmt], tuple[ListedRun, ...]]:
    """Bounds as Lets, then the runs over the entries: partial blocks, then full ones. Parameters as in `phases`."""
    axis, n, length = OTHER[loop], tiles[loop], scalar(f"{loop}_len")
    bounds, ends = list_bounds(program, listed, loop, one_split=one_split)
    clamped = listed.block(loop) > n or program.sequences is not None  # some sequences end before a block
    if clamped:
        bounds.insert(1, Let(f"{loop}_end", (length + (n - 1)) // n * n))
    whole = _inside(loop, n) & _inside(axis, tiles[axis]) if own_rows_count else _inside(loop, n)

    def run(kind: str, title: str) -> ListedRun:
        by_mask = kind == "partial" and program.mask is not None
        ragged = kind == "partial" or listed.ragged
        return ListedRun(
            title,
            "partial_step" if by_mask else "full_step",
            blocks_param(loop, kind),
            *ends[kind],
            listed.block(loop),
            n,
            masked=True if by_mask else ENDS if ragged else False,
            whole=whole if ragged and not by_mask and edges is Edges.SPLIT else None,
            clamped=clamped,
        )

    return bounds, (
        run("partial", f"listed {loop} blocks seen in part"),
        run("full", f"listed {loop} blocks seen in full"),
    )


def list_bounds(
    program: Attention, listed: ListedBlocks, loop: str, *, one_split: bool
) -> tuple[list[Stmt], Mapping[str, tuple[Expr, Expr]]]:
    """Where the lists of a program's own block begin and end, as Lets; the ends by kind, with one_split of a share."""
    axis = OTHER[loop]
    own, size = scalar(f"{axis}_block"), listed.block(axis)
    bounds: list[Stmt] = [Let(own.name, scalar(f"{axis}_start") // size if size else Const(0))]
    places = (BATCH, KV_HEAD if listed.heads == "kv_heads" else HEAD)
    for kind in listed.kinds:
        starts = starts_param(loop, kind)
        bounds.append(Let(f"{kind}_begin", Load(starts, INT, (*places, own))))
        bounds.append(Let(f"{kind}_end", Load(starts, INT, (*places, own + 1))))
    if not one_split:
        return bounds, {kind: (scalar(f"{kind}_begin"), scalar(f"{kind}_end")) for kind in listed.kinds}
    shares = {kind: (scalar(f"{kind}_first"), scalar(f"{kind}_stop")) for kind in listed.kinds}
    return [*bounds, *_shares(listed.kinds)], shares


def _inside(axis: str, tile: int) -> Expr:
    """Whether a tile of `axis` ends before the axis does."""
    return scalar(f"{axis}_start") + tile <= scalar(f"{axis}_len")


def _shares(kinds: tuple[str, ...]) -> list[Stmt]:
    """A contiguous share of the two lists of blocks, one after the other, for each split; or of the only one."""
    if kinds == ("full",):
        full, share = scalar("full_begin"), scalar("blocks_per_split")
        return [
            Let("blocks_per_split", (scalar("full_end") - full + SPLITS - 1) // SPLITS),
            Let("full_first", full + SPLIT * share),
            Let("full_stop", call(Op.MIN, scalar("full_first") + share, scalar("full_end"))),
        ]
    count, share = scalar("partial_count"), scalar("blocks_per_split")
    first, stop = scalar("split_begin"), scalar("split_end")
    partial, full = scalar("partial_begin"), scalar("full_begin")
    listed = scalar("listed_blocks")
    return [
        Let("partial_count", scalar("partial_end") - partial),
        Let("listed_blocks", count + scalar("full_end") - full),
        Let("blocks_per_split", (listed + SPLITS - 1) // SPLITS),
        Let("split_begin", SPLIT * share),
        Let("split_end", call(Op.MIN, first + share, listed)),
        Let("partial_first", partial + call(Op.MIN, first, count)),
        Let("partial_stop", partial + call(Op.MIN, stop, count)),
        Let("full_first", full + call(Op.MAX, first - count, 0)),
        Let("full_stop", full + call(Op.MAX, stop - count, 0)),
    ]

"""Tiles told apart while the loop runs: where a mask's extremes over a tile are kept, and the tests that read them."""

from __future__ import annotations

from dataclasses import dataclass

from attn_engine.codegen.lower.emit import Names
from attn_engine.codegen.lower.values import INT, compute_storage, scalar
from attn_engine.ir.expr import Const, Expr, Load, Reduce, Var, call, loads, substitute, variables
from attn_engine.ir.ops import DType, Op, Storage
from attn_engine.ir.passes.mask_range import OTHER
from attn_engine.ir.passes.mask_tiles import classify_tiles
from attn_engine.ir.passes.simplify import simplify
from attn_engine.ir.program import BATCH, HEAD, Attention
from attn_engine.ir.tile import Let, Param, Stmt, TileTable


@dataclass(frozen=True, slots=True)
class TileTests:
    """What a loop asks of each tile: nothing where it may not hold a visible pair, no mask where `whole`.

    own: Lets before the loop, about the program's own tile. inner: Lets at the top of the loop's body.
    """

    own: tuple[Stmt, ...]
    inner: tuple[Stmt, ...]
    may_hold: Expr
    whole: Expr
    tables: tuple[TileTable, ...]
    params: tuple[Param, ...]


def tile_tests(
    program: Attention, names: Names, loop: str, tiles: dict[str, int], *, own_rows_count: bool = False
) -> TileTests | None:
    """The tests of a loop over `loop`; None where its bounds already say everything that is known.

    own_rows_count: see `phases`. A ragged tile of the loop is never whole.
    """
    if program.listed is not None and not program.listed.tested:
        return None  # the lists have said it
    found = classify_tiles(program.mask.result if program.mask else None, loop)
    if found is None:
        return None
    tables = _Tables(program, names, tiles)
    in_order = sorted(found.reductions, key=lambda r: r.kind, reverse=True)  # smallest first
    ends: dict[Expr, Expr] = {node: tables.end(node) for node in in_order}
    may, must = (substitute(e, ends) for e in (found.may_hold, found.must_hold))
    for axis in (loop, OTHER[loop]) if own_rows_count else (loop,):
        inside = scalar(f"{axis}_start") + tiles[axis] <= scalar(f"{axis}_len")
        must = must if must is Const(False) else simplify(must & inside)
    lets: dict[str, list[Stmt]] = {"q": [], "kv": []}
    read = {v.name for v in variables(may) + variables(must)}
    for axis, into in lets.items():
        if f"{axis}_last" in read:
            into.append(Let(f"{axis}_last", last_row(axis, tiles)))
        into += tables.lets[axis]
    return TileTests(
        tuple(lets[OTHER[loop]]), tuple(lets[loop]), may, must, tuple(tables.tables), tuple(tables.params)
    )


def last_row(axis: str, tiles: dict[str, int]) -> Expr:
    """The position of a tile's last row that exists."""
    return call(Op.MIN, scalar(f"{axis}_start") + (tiles[axis] - 1), scalar(f"{axis}_len") - 1)


class _Tables:
    """One table for each value whose extremes are read, and the Lets that read them."""

    def __init__(self, program: Attention, names: Names, tiles: dict[str, int]) -> None:
        self.program, self.names, self.tiles = program, names, tiles
        self.tables: list[TileTable] = []
        self.params: list[Param] = []
        self.lets: dict[str, list[Stmt]] = {"q": [], "kv": []}
        self._called: dict[Expr, tuple[str, str]] = {}

    def end(self, node: Reduce) -> Var:
        """The variable that holds the extreme, read from its table in a Let."""
        value, axis = node.x, node.axis
        if value not in self._called:
            self._called[value] = self.names_for(value, axis)
        table, name = self._called[value]
        places = {BATCH: "batches", HEAD: "heads"}
        varies = [v for v in places if v in variables(value)]
        if all(t.name != table for t in self.tables):
            shape = (*(places[v] for v in varies), f"{axis}_blocks", "ends")
            self.tables.append(TileTable(table, value, self.tiles[axis]))
            self.params.append(Param(table, self.storage(value), shape))
        tile = Var(f"{axis}_start", INT) // self.tiles[axis]
        load = Load(table, node.dtype, (*varies, tile, Const(0 if node.kind == "min" else 1)))
        let = Let(self.names.fresh(f"{name}_{node.kind}"), load)
        self.lets[axis].append(let)
        return let.var

    def names_for(self, value: Expr, axis: str) -> tuple[str, str]:
        """Names of the table and of the values in it: the user's own where there is one, else the tensor's."""
        assert self.program.mask is not None
        tensors = [x.tensor for x in loads(value) if axis in x.axes]
        base = self.program.mask.names.get(value) or (tensors[0] if tensors else "position")
        return self.names.fresh(f"{axis}_{base}_range"), f"{axis}_{base}"

    def storage(self, value: Expr) -> Storage:
        match value.dtype:
            case DType.BOOL:
                return Storage.BOOL
            case DType.INT:
                return Storage.INT64
            case DType.FLOAT | DType.ELEMENT:
                return compute_storage(self.program)

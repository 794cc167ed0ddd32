"""The values of expressions over blocks and over single positions, for one moment of a mask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from attn_engine.ir.expr import Expr, Reduce, Var, postorder, substitute, variables
from attn_engine.ir.ops import Number
from attn_engine.ir.tile import TileTable
from attn_engine.masks.program import Moment
from attn_engine.runtime.dense import evaluate_all
from attn_engine.runtime.tile_tables import tile_tables


@dataclass(eq=False)
class Blocks:
    """The grid of blocks of one mask: how many there are, where they lie, and the extremes of captured values in each.

    size: positions per block along "q" and "kv".
    """

    moment: Moment
    size: Mapping[str, int]
    _tables: dict[tuple[Expr, str], Tensor] = field(default_factory=dict[tuple[Expr, str], Tensor])

    def __post_init__(self) -> None:
        sizes = self.moment.sizes
        self.batch, self.heads = sizes["batches"], sizes["heads"]
        self.length = {axis: sizes[f"{axis}_len"] for axis in ("q", "kv")}
        self.count = {axis: -(-n // self.size[axis]) for axis, n in self.length.items()}

    def ragged(self, axis: str) -> bool:
        """Whether the last block sticks out beyond the end."""
        return self.length[axis] % self.size[axis] != 0

    def starts(self, axis: str) -> Tensor:
        """The first position of each block."""
        return torch.arange(0, self.length[axis], self.size[axis], device=self.moment.device)

    def lasts(self, axis: str) -> Tensor:
        """The last position of each block that exists."""
        return (self.starts(axis) + (self.size[axis] - 1)).clamp_(max=self.length[axis] - 1)

    def evaluate(self, roots: Sequence[Expr]) -> list[Tensor]:
        """Each root for all blocks at once: (batch, head, q blocks, kv blocks), 1 along what it does not depend on."""
        places = {"batch": self._range(self.batch, 0), "head": self._range(self.heads, 1)}
        for dimension, axis in ((2, "q"), (3, "kv")):
            places[f"{axis}_start"] = _along(self.starts(axis), dimension)
            places[f"{axis}_last"] = _along(self.lasts(axis), dimension)
        extremes = _asked(tuple(roots)).extremes.values()
        ends = {node: _ends_along(self.extreme(node), 2 if node.axis == "q" else 3) for node in extremes}
        found = self.evaluate_with(roots, places, ends)
        return [x.reshape((1,) * (4 - x.ndim) + x.shape) for x in found]

    def evaluate_with(
        self, roots: Sequence[Expr], places: Mapping[str, Tensor | Number], ends: Mapping[Reduce, Tensor]
    ) -> tuple[Tensor, ...]:
        """Roots where the variables `places` and the extremes `ends` are given, in shapes that broadcast."""
        asked = _asked(tuple(roots))
        numbers = {**self.moment.sizes, **self.moment.scalars, **places}
        numbers |= {name: ends[node] for name, node in asked.extremes.items()}
        environment = {v: numbers[v.name] for v in asked.variables}
        return evaluate_all(asked.roots, environment, self.moment.tensors, self.moment.compute)

    def extreme(self, node: Reduce) -> Tensor:
        """A value's smallest or largest element in each block: (batch or 1, heads or 1, blocks)."""
        return self._table(node.x, node.axis)[..., 0 if node.kind == "min" else 1]

    def _table(self, value: Expr, axis: str) -> Tensor:
        if (value, axis) not in self._tables:
            moment, table = self.moment, TileTable("table", value, self.size[axis])
            made = tile_tables((table,), moment.tensors, moment.scalars, moment.sizes, moment.compute)[
                "table"
            ]
            read = {v.name for v in variables(value)}
            shape = (self.batch if "batch" in read else 1, self.heads if "head" in read else 1)
            self._tables[value, axis] = made.reshape(*shape, self.count[axis], 2)
        return self._tables[value, axis]

    def _range(self, n: int, dimension: int) -> Tensor:
        return _along(torch.arange(n, device=self.moment.device), dimension)


@dataclass(frozen=True, slots=True)
class _Asked:
    """Expressions in which every extreme is a variable: `extremes` says which one."""

    roots: tuple[Expr, ...]
    extremes: dict[str, Reduce]
    variables: tuple[Var, ...]


@lru_cache(maxsize=1024)
def _asked(roots: tuple[Expr, ...]) -> _Asked:
    extremes = {f"extreme {i}": node for i, node in enumerate(reductions(roots))}
    replacements: dict[Expr, Expr] = {node: Var(name, node.dtype) for name, node in extremes.items()}
    replaced = tuple(substitute(root, replacements) for root in roots)
    read = tuple(dict.fromkeys(v for root in replaced for v in variables(root)))
    return _Asked(replaced, extremes, read)


def reductions(roots: Sequence[Expr]) -> list[Reduce]:
    """The extremes that the roots read."""
    return [node for node in postorder(*roots) if isinstance(node, Reduce)]


def _along(x: Tensor, dimension: int) -> Tensor:
    return x.reshape([-1 if d == dimension else 1 for d in range(4)])


def _ends_along(x: Tensor, dimension: int) -> Tensor:
    """(batch, head, blocks) with its blocks along dimension 2 (q) or 3 (kv) of four."""
    return x.unsqueeze(3 if dimension == 2 else 2)

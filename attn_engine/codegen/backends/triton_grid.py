"""What a program instance of generated Triton works on: its indices in the launch's grid, its tile's positions."""

from __future__ import annotations

import re
from collections.abc import Mapping

from attn_engine.codegen.backends.triton_address import BLOCKS, GRID_SIZES, wide_axes
from attn_engine.ir.ops import Number
from attn_engine.ir.tile import Kernel

SECTION_NUMBERS = 2**23  # 16 MiB of 16-bit elements: a third of the L2 cache of an H100

_PLACE = (
    "# heads come in sections that share a cache; in each of them the heavy tiles come first",
    "place = tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)",
)


def positions(kernel: Kernel, body: str) -> list[str]:
    """What this program instance is: its grid indices and its tile's positions, as far as the body reads them."""
    tiles: list[str] = []
    for axis, _ in kernel.tile:
        name = f"{axis}_tile" if axis in ("q", "kv") else f"{axis}_idx"
        if axis in kernel.grid or re.search(rf"\b{name}\b", body):
            first = kernel.first_column(axis)
            tiles.append(f"{name} = {f'{first} + ' if first else ''}tl.arange(0, {BLOCKS[axis]})")
    lines: list[str] = list(_PLACE) if kernel.sections else []
    for axis, program in zip(kernel.grid, program_ids(kernel), strict=True):
        if axis in ("q", "kv"):
            lines += [f"{axis}_start = {program} * {BLOCKS[axis]}", *tile_positions(axis)]
        elif re.search(rf"\b{axis}\b", body):
            lines.append(f"{axis} = {program}{'.to(tl.int64)' if axis in wide_axes(kernel) else ''}")
    return [f"    {line}" for line in [*tiles, *lines]]


def tile_positions(axis: str) -> list[str]:
    """The positions of a tile that begins at <axis>_start; its first row in 64 bits, for addresses."""
    return [f"{axis}_row = tl.cast({axis}_start, tl.int64)", f"{axis}_idx = {axis}_start + {axis}_tile"]


def unread(line: str, body: list[str]) -> bool:
    """Whether a line defines a tile's positions or its first row for nobody."""
    found = re.match(r"\s*((?:q|kv)_(?:row|idx)) = ", line)
    return found is not None and sum(len(re.findall(rf"\b{found[1]}\b", other)) > 0 for other in body) == sum(
        bool(re.match(rf"\s*{found[1]} = ", other)) for other in body
    )


def program_ids(kernel: Kernel) -> list[str]:
    """What a program instance is along each axis of the grid. A launch has three dimensions: further axes share the
    third."""
    grid, tiles = kernel.grid, 1 if kernel.sections else 0
    first = f"tl.program_id({tiles})"
    if kernel.heavy_last:
        first = f"(tl.num_programs({tiles}) - 1 - {first})"
    if kernel.sections:
        heads = GRID_SIZES[grid[1]]
        return [first, f"(place % {heads})", f"(place // {heads})"]
    if len(grid) <= 3:
        return [first, *(f"tl.program_id({i})" for i in range(1, len(grid)))][: len(grid)]
    shared, divisor, ids = grid[2:], "", [first, "tl.program_id(1)"]
    for axis in shared:
        quotient = f"(tl.program_id(2){divisor})" if divisor else "tl.program_id(2)"
        ids.append(f"({quotient} % {GRID_SIZES[axis]})" if axis != shared[-1] else quotient)
        divisor += f" // {GRID_SIZES[axis]}"
    return ids


def section_size(kernel: Kernel, sizes: Mapping[str, Number]) -> int:
    """Heads of a section: as many as divide their number and read no more than a part of the L2 cache.

    The programs of a query head read its keys and values, which its group shares; those of a kv head the queries and
    gradients of its group, one head after the other. From shapes alone, so that equal calls run in the same order.
    """
    count = max(1, int(sizes[GRID_SIZES[kernel.grid[1]]]) * int(sizes["batches"]))
    group = int(sizes["heads"]) // max(1, int(sizes["kv_heads"]))
    rows = int(sizes["kv_len"]) if kernel.grid[0] == "q" else int(sizes["q_len"])
    numbers = rows * (kernel.block("d") + kernel.block("dv"))
    together = (group if kernel.grid[0] == "q" else 1) * max(1, SECTION_NUMBERS // max(1, numbers))
    return max(n for n in range(1, count + 1) if count % n == 0 and n <= together)

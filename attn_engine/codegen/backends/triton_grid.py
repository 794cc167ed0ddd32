"""What a program instance of generated Triton works on: its indices in the launch's grid, its tile's positions."""

from __future__ import annotations

import re

from attn_engine.codegen.backends.triton_address import GRID_SIZES


def tile_positions(axis: str) -> list[str]:
    """The positions of a tile that begins at <axis>_start; its first row in 64 bits, for addresses."""
    return [f"{axis}_row = tl.cast({axis}_start, tl.int64)", f"{axis}_idx = {axis}_start + {axis}_tile"]


def unread(line: str, body: list[str]) -> bool:
    """Whether a line defines a tile's positions or its first row for nobody."""
    found = re.match(r"\s*((?:q|kv)_(?:row|idx)) = ", line)
    return found is not None and sum(len(re.findall(rf"\b{found[1]}\b", other)) > 0 for other in body) == sum(
        bool(re.match(rf"\s*{found[1]} = ", other)) for other in body
    )


def program_ids(grid: tuple[str, ...]) -> list[str]:
    """The program id of each grid axis. A launch has three dimensions: further axes share the third."""
    if len(grid) <= 3:
        return [f"tl.program_id({i})" for i in range(len(grid))]
    shared, divisor, ids = grid[2:], "", ["tl.program_id(0)", "tl.program_id(1)"]
    for axis in shared:
        quotient = f"(tl.program_id(2){divisor})" if divisor else "tl.program_id(2)"
        ids.append(f"({quotient} % {GRID_SIZES[axis]})" if axis != shared[-1] else quotient)
        divisor += f" // {GRID_SIZES[axis]}"
    return ids

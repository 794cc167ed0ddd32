"""Masks as characters."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING

from attn_engine.masks.picture import EMPTY, FULL, Picture, picture

if TYPE_CHECKING:
    from attn_engine.masks.block_mask import BlockMask

ALL_CELLS = 2**31


def torch_text(mask: BlockMask, grid_size: int | tuple[int, int], limit: int) -> str:
    """See BlockMask.to_string: torch's view."""
    most = (grid_size, grid_size) if isinstance(grid_size, int) else grid_size
    most = (ALL_CELLS, ALL_CELLS) if most == (-1, -1) else most
    drawn: list[str] = []
    for i, (batch, head) in enumerate(product(range(mask.shape[0]), range(mask.shape[1]))):
        if i == limit:
            drawn.append("...\nTo print out more, set BlockMask.to_string(limit=N)")
            drawn.append("You can also index (BlockMask[batch, head]) to choose a specific batch or head")
            break
        shares = picture(mask, batch, head, most).listed
        lines = ["".join(2 * ("█" if x == 1 else "░" if x else " ") for x in row) for row in shares]
        drawn.append(f"({batch}, {head})\n" + "".join(line + "\n" for line in lines))
    return "\n".join(drawn)


def text(shown: Picture) -> str:
    """Classes as characters, work per row behind them, the counts below."""
    signs = {EMPTY: "·", FULL: "█"}
    lines = [f"{shown.title}    · empty  ▒ partial  █ full"]
    for row, work in zip(shown.cells, shown.work, strict=True):
        lines.append("".join(2 * signs.get(c, "▒") for c in row) + f"  {work:4.0%}")
    return "\n".join([*lines, shown.caption])

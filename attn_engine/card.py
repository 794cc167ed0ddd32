"""An engine in a notebook: its program and its mask on a card."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from attn_engine.errors import AttnEngineError
from attn_engine.frontend.trace import MaskMod
from attn_engine.ir.expr import loads
from attn_engine.ir.printer import format_program
from attn_engine.ir.program import KV_IDX, Q_IDX, Attention
from attn_engine.masks import create_block_mask
from attn_engine.masks.program import mask_program

DRAWN_LENGTH = 2048  # where neither the engine nor the mask's tensors say how long the sequences are


def card(
    title: str, program: Attention, mask_mod: MaskMod | None, sizes: Sequence[Sequence[int | None]]
) -> str:
    """HTML: the title, the traced program, and the mask in blocks with what is skipped.

    sizes: (batch, heads, length) of q and k; None: any.
    """
    if mask_mod is None:
        drawn = "<p>No mask: every query sees every key.</p>"
    else:
        drawn = _mask(mask_mod, sizes[0][2], sizes[1][2])
    text = f"<pre>{escape(format_program(program))}</pre>"
    return f'<div style="max-width:720px"><b>{escape(title)}</b>{text}{drawn}</div>'


def _mask(mask_mod: MaskMod, q_len: int | None, kv_len: int | None) -> str:
    """The first batch and head of the mask; in words why, where it cannot be drawn without a call's tensors."""
    try:
        lengths = (q_len or _longest(mask_mod, 0), kv_len or _longest(mask_mod, 1))
        return create_block_mask(mask_mod, None, None, *lengths).draw("html")
    except AttnEngineError as error:
        return f"<p>The mask is not drawn: {escape(error.message)}</p>"


def _longest(mask_mod: MaskMod, axis: int) -> int:
    """For how many positions the tensors have an element that the mask reads by the position itself."""
    trace = mask_program(mask_mod).trace
    shapes = {t.name: t.accessor().shape for t in trace.tensors}
    position = (Q_IDX, KV_IDX)[axis]
    sizes = [
        size
        for load in loads(trace.fn.result)
        for index, size in zip(load.indices, shapes[load.tensor], strict=True)
        if index is position
    ]
    return min(sizes, default=DRAWN_LENGTH)

"""The three attentions: over compressed blocks, over selected blocks, and over a window (equations 5 to 12)."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from attn_engine.engine import AttentionEngine
from attn_engine.frontend import Constant, CustomIO, MaskMod, meta_tensor
from attn_engine.library.dense.causal import causal
from attn_engine.library.dense.sliding_window import sliding_window
from attn_engine.library.nsa.sequences import Sequences
from attn_engine.library.nsa.sizes import Compression

Pair = tuple[Tensor, Tensor]
OFFSET = "q_offset"


def complete_blocks(compression_block: int, compression_stride: int) -> MaskMod:
    """Block i is seen from its last token on, i d + l - 1 <= t, said so that loops have bounds."""
    block, stride = Constant(compression_block), Constant(compression_stride)

    def complete_block(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return kv_idx <= (q_idx + 1 - block) // stride

    return complete_block


def over_blocks(
    q: Tensor, kv: Pair, sequences: Sequences, compression: Compression, scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    """O_cmp like q, and lse (batch, heads, TQ) or (heads, rows); 0 and -inf where no block is complete yet.

    kv: compressed rows (batch, blocks, kv heads, D), or packed.
    """
    numbers = compression.block, compression.stride
    engine = _engine("blocks", numbers, *_kind(q, kv, sequences), scale, backend)
    named: dict[str, Any] = sequences.of_blocks(compression) | _offset(sequences)
    out, rows = engine(q, *kv, return_final_rowscales=True, **named)
    return out, rows["lse"]


def over_selected(
    q: Tensor,
    kv: Pair,
    indices: Tensor,
    sequences: Sequences,
    selection_block: int,
    scale: float,
    backend: str,
    counts: Tensor | None = None,
) -> Tensor:
    """O_slc like q, over the tokens up to the query's in the blocks `indices`, (batch, TQ, kv heads, n) or packed.

    counts: of the leading ones that count, of the shape of indices without n; all where None.
    """
    engine = _engine("past", (), *_kind(q, kv, sequences), scale, backend)
    given: dict[str, Any] = {
        "block_sparse_indices": sequences.by_sequence(indices),
        "block_size": (1, selection_block),
    }
    if counts is not None:
        given["block_num"] = sequences.by_sequence(counts[..., None])[..., 0]
    return engine(q, *kv, **sequences.of_tokens(), **_offset(sequences), **given)


def over_window(q: Tensor, kv: Pair, sequences: Sequences, window: int, scale: float, backend: str) -> Tensor:
    """O_win like q, over the last `window` tokens, the query's own among them."""
    engine = _engine("window", (window,), *_kind(q, kv, sequences), scale, backend)
    return engine(q, *kv, **sequences.of_tokens(), **_offset(sequences))


def _kind(q: Tensor, kv: Pair, sequences: Sequences) -> tuple[torch.dtype, int, int, bool]:
    return q.dtype, q.shape[-1], kv[1].shape[-1], sequences.offset is not None


def _offset(sequences: Sequences) -> dict[str, Any]:
    return {} if sequences.offset is None else {OFFSET: sequences.offset}


def _moved(mask: MaskMod) -> MaskMod:
    """The mask at the positions that queries have in their sequences."""

    def at_offset(b: Any, h: Any, q_idx: Any, kv_idx: Any, custom_fwd_inputs: Any) -> Any:
        return mask(b, h, q_idx + custom_fwd_inputs.input_tensors[OFFSET][b], kv_idx)

    return at_offset


@lru_cache(maxsize=128)
def _engine(
    what: str,
    numbers: tuple[int, ...],
    dtype: torch.dtype,
    dim: int,
    dim_v: int,
    moves: bool,
    scale: float,
    backend: str,
) -> AttentionEngine:
    mask = causal()
    if what == "blocks":
        mask = complete_blocks(*numbers)
    elif what == "window":
        mask = sliding_window(numbers[0] - 1)
    metas = [meta_tensor(None, None, None, d, dtype=dtype) for d in (dim, dim, dim_v)]
    if moves:
        custom = CustomIO({OFFSET: ("batch",)})
        return AttentionEngine(
            metas, mask_mod=_moved(mask), custom_fwd_inputs=custom, scale=scale, backend=backend
        )
    return AttentionEngine(metas, mask_mod=mask, scale=scale, backend=backend)

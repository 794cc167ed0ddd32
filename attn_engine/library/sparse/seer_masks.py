"""From a gate's scores to the blocks that attention visits (SeerAttention, arXiv:2410.13276), and heads repeated.

Scores are (..., rows, blocks): rows are blocks of queries (2D, as many as blocks) or queries (1D).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from attn_engine.errors import WrongArgument
from attn_engine.library.arguments import at_least
from attn_engine.library.sparse.seer_arguments import blocks, shaped


def repeat_kv(hidden_states: Tensor, n_rep: int) -> Tensor:
    """Each head n_rep times in succession: (batch, heads, ., .) to (batch, heads * n_rep, ., .)."""
    at_least("n_rep", n_rep, 1)
    return hidden_states if n_rep == 1 else hidden_states.repeat_interleave(n_rep, 1)


def repeat_kv_varlen(hidden_states: Tensor, n_rep: int) -> Tensor:
    """Each head n_rep times in succession: packed (T, heads, D) to (T, heads * n_rep, D)."""
    shaped("hidden_states", hidden_states, ("T", "heads", "D"), "packed rows")
    return repeat_kv(hidden_states, n_rep)


def get_sparse_attn_mask_from_threshold(
    x: Tensor, threshold: float, block_mask: Tensor | None = None, use_dense_for_last_block: bool = False
) -> Tensor:
    """Scores above the threshold, bool like x, of which no more is seen than the blocks of `block_mask`.

    block_mask None: where there are as many rows as blocks, the blocks up to the own one. use_dense_for_last_block:
    every score of the last row counts as above.
    """
    kept = x > threshold
    if use_dense_for_last_block:
        kept[..., -1:, :] = True
    return _past(kept) if block_mask is None else kept & block_mask


def get_sparse_attn_mask_from_threshold_grouped(
    x: Sequence[Tensor], threshold: float, max_seqlen: int, block_size: int
) -> Tensor:
    """Scores above the threshold of sequences of their own lengths, False beyond them.

    x: of each sequence (heads, length, ceil(length / block_size)), or with a leading 1, as 1D pooled weights are.
    Returns bool (sequences, heads, max_seqlen, ceil(max_seqlen / block_size)).
    """
    items = [one[0] if one.ndim == 4 else one for one in x]
    if not items:
        raise WrongArgument(
            argument="x", got=x, expected="one tensor or more", instead="Give a list of them."
        )
    n = blocks(max_seqlen, block_size)
    kept = items[0].new_zeros((len(items), items[0].shape[0], max_seqlen, n), dtype=torch.bool)
    for b, one in enumerate(items):
        rows = one.shape[1] if one.ndim == 3 else 0
        expected = (items[0].shape[0], min(rows, max_seqlen), blocks(rows, block_size))
        shaped(f"x[{b}]", one, expected, "(heads, length, blocks), no longer than max_seqlen")
        kept[b, :, :rows, : one.shape[2]] = one > threshold
    return kept


def get_sparse_attn_mask_from_nz_ratio(x: Tensor, nz_ratio: float) -> Tensor:
    """Of each row the largest scores, as many as make about `nz_ratio` of the causal blocks: bool like x.

    1 - sqrt(1 - nz_ratio) of the blocks of a row, one at least; of those, the blocks up to the own one.
    """
    if not 0 <= nz_ratio <= 1:
        instead = "Give the share of the blocks that is to be visited."
        raise WrongArgument(argument="nz_ratio", got=nz_ratio, expected="from 0 to 1", instead=instead)
    return _past(_largest(x, max(1, int((1 - math.sqrt(1 - nz_ratio)) * x.shape[-1]))))


def get_sparse_attn_mask_from_token_budget(x: Tensor, token_budget: int, block_size: int = 64) -> Tensor:
    """Of each row the largest scores, as many as blocks hold `token_budget` keys, and the last block: bool like x."""
    at_least("token_budget", token_budget, 1)
    at_least("block_size", block_size, 1)
    kept = _largest(x, max(1, token_budget // block_size))
    kept[..., -1:] = True
    return kept


def _largest(x: Tensor, count: int) -> Tensor:
    kept = torch.zeros_like(x, dtype=torch.bool)
    return kept.scatter_(-1, x.topk(min(count, x.shape[-1]), dim=-1).indices, True)


def _past(kept: Tensor) -> Tensor:
    """The blocks up to the own one, where rows are blocks."""
    return kept.tril() if kept.shape[-2] == kept.shape[-1] else kept

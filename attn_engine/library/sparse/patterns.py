"""Attention over a pattern of blocks (S2-Attention, arXiv:2407.17678, sections 3 and 4), with dkernel's names.

The pattern belongs to the positions of a sequence: query t of a sequence with more keys than queries stands at
t + len(keys) - len(queries), in training, chunked prefill and decoding alike, and padding does not move it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from attn_engine.engine import AttentionEngine
from attn_engine.errors import UnknownOption, WrongArgument
from attn_engine.frontend import CustomIO, MaskMod, meta_tensor
from attn_engine.library.arguments import at_least

HINTS = ("d_splits", "inference")  # of dkernel's kernels; ours choose for themselves


class BlockPatternAttention(nn.Module):
    """What both modules share: calls, and an engine for each type of tensors. Without parameters and state."""

    def __init__(
        self, block_size: int, max_seqlen: int, causal: bool, seq_dim: int | None, hints: dict[str, Any]
    ) -> None:
        super().__init__()
        _power_of_two("block_size", block_size)
        if seq_dim not in (None, 1, 2):
            instead = "1: (batch, length, heads, dim); 2: (batch, heads, length, dim)."
            raise WrongArgument(argument="seq_dim", got=seq_dim, expected="1, 2 or None", instead=instead)
        for name in hints:
            if name not in HINTS:
                known = ", ".join(("block_m", "block_n", *HINTS))
                raise UnknownOption(option=name, value=hints[name], where=type(self).__name__, known=known)
        self.block_size, self.max_seqlen, self.causal = block_size, max_seqlen, causal
        self.seq_dim = seq_dim or 1
        self._engines: dict[tuple[object, ...], AttentionEngine] = {}

    def forward(
        self,
        q: Tensor,
        k: Tensor | None = None,
        v: Tensor | None = None,
        sm_scale: float | None = None,
        *,
        cu_seqlen_k: Tensor | None = None,
        cu_seqlen_q: Tensor | None = None,
        left_paddings: Tensor | None = None,
        seqlens: Tensor | None = None,
        return_lse: bool = False,
        split_qkv: Callable[[Tensor], tuple[Tensor, ...]] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attention like q, with v's head dimension; with return_lse also (batch, heads, rows of q), natural logarithm.

        q, k, v: (batch, length, heads, dim) where seq_dim is 1, (batch, heads, length, dim) where it is 2; heads of q
            are a multiple of those of k. k or v left out: made by `split_qkv` from what is given.
        sm_scale: 1/sqrt(D) when None.
        left_paddings, seqlens: (batch,) integers. Valid keys are left_paddings to left_paddings + seqlens - 1; queries
            are the same rows where there are as many as keys, and else the last of them. Other rows give 0.
        cu_seqlen_k, cu_seqlen_q: cumulative lengths of packed (rows, heads, dim) tensors. cu_seqlen_q left out: one
            query a sequence where q has as many rows as there are sequences, else the same as of keys.

        Differentiable on every path. Raises WrongArgument and the engine's typed errors.
        """
        q, k, v = _three(q, k, v, split_qkv)
        places: dict[str, Any]
        if q.ndim == 3:
            places, offset = self._packed(q, k, cu_seqlen_q, cu_seqlen_k)
        else:
            places, offset = self._in_batch(q, k, left_paddings, seqlens)
        moved = () if offset is None else (offset,)
        engine = self._engine(q, k, v, sm_scale, bool(moved))
        if not return_lse:
            return engine(q, k, v, *moved, **places)
        o, rows = engine(q, k, v, *moved, return_final_rowscales=True, **places)
        return o, rows["lse"]

    def mask(self, heads: int, kv_heads: int, moved: bool = True) -> MaskMod:
        """The mask_mod of the pattern; moved: the custom input "offset" says where each sequence's first query stands,
        which is at the first key otherwise.

        Raises WrongArgument where the pattern is not for that many heads of q and k.
        """
        raise NotImplementedError

    def _engine(
        self, q: Tensor, k: Tensor, v: Tensor, sm_scale: float | None, moved: bool
    ) -> AttentionEngine:
        scale = 1.0 / math.sqrt(q.shape[-1]) if sm_scale is None else sm_scale
        axis = q.ndim - 1 - self.seq_dim if q.ndim == 4 else 2 - self.seq_dim
        heads = q.shape[axis], k.shape[axis]
        key = (q.dtype, q.shape[-1], v.shape[-1], scale, heads, moved)
        if key not in self._engines:
            metas = [meta_tensor(None, None, None, x.shape[-1], dtype=x.dtype) for x in (q, q, v)]
            offset = CustomIO({"offset": ("batch",)}) if moved else None
            layout = "bshd" if self.seq_dim == 1 else "bhsd"
            mask = self.mask(*heads, moved)
            self._engines[key] = AttentionEngine(metas, None, offset, None, mask, layout=layout, scale=scale)
        return self._engines[key]

    def _packed(
        self, q: Tensor, k: Tensor, of_q: Tensor | None, of_k: Tensor | None
    ) -> tuple[dict[str, Tensor], Tensor]:
        if of_k is None:
            instead = "Give the cumulative lengths of keys, or 4-dimensional tensors."
            raise WrongArgument(
                argument="cu_seqlen_k", got=None, expected="given for packed tensors", instead=instead
            )
        rows, sequences = (0 if self.seq_dim == 1 else 1), of_k.numel() - 1
        if of_q is None:
            if q.shape[rows] == sequences:
                of_q = torch.arange(sequences + 1, dtype=of_k.dtype, device=of_k.device)
            elif q.shape[rows] == k.shape[rows]:
                of_q = of_k
            else:
                expected = f"given where q has neither one row a sequence ({sequences}) nor as many as k"
                raise WrongArgument(argument="cu_seqlen_q", got=None, expected=expected, instead="Give it.")
        lengths = of_k.diff()
        self._check_length(int(lengths.max()) if sequences else 0)
        return {"cu_len_q": of_q, "cu_len_kv": of_k}, (lengths - of_q.diff()).int()

    def _in_batch(
        self, q: Tensor, k: Tensor, left: Tensor | None, lengths: Tensor | None
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        axis = self.seq_dim
        rows, keys, batch = q.shape[axis], k.shape[axis], q.shape[0]
        if left is None and lengths is None:
            self._check_length(keys)
            if rows == keys:
                return {}, None
            return {}, torch.full((batch,), keys - rows, dtype=torch.int32, device=q.device)
        left = torch.zeros(batch, dtype=torch.int32, device=q.device) if left is None else left
        lengths = keys - left if lengths is None else lengths
        self._check_length(int(lengths.max()) if batch else 0)
        places = {"start_kv": left, "len_kv": lengths}
        if rows == keys:
            return {**places, "start_q": left, "len_q": lengths}, None
        return places, (lengths - rows).int()

    def _check_length(self, keys: int) -> None:
        if keys > self.max_seqlen:
            expected = f"at most max_seqlen, {self.max_seqlen}"
            instead = "Make the module for longer sequences."
            raise WrongArgument(argument="length of k", got=keys, expected=expected, instead=instead)


class SparseAttention(BlockPatternAttention):
    """Attention over any pattern of blocks.

    block_size: positions of a block, a power of two. sparse_pattern: (blocks of q, blocks of k), or with heads before
        them: 1, those of q or those of k; non-zero where queries of a block see keys of a block.
    causal: hides later keys, within blocks too. seq_dim: which dimension of q, k, v is the length, 1 (default) or 2.
    block_m, block_n, d_splits, inference: hints for dkernel's kernels, not needed here.
    """

    sparse_pattern: Tensor

    def __init__(
        self,
        block_size: int,
        sparse_pattern: Tensor,
        *,
        causal: bool = True,
        seq_dim: int | None = None,
        block_m: int | None = None,
        block_n: int | None = None,
        **hints: Any,
    ) -> None:
        pattern = sparse_pattern
        if not isinstance(pattern, Tensor) or pattern.ndim not in (2, 3):  # pyright: ignore[reportUnnecessaryIsInstance]
            got = tuple(pattern.shape) if isinstance(pattern, Tensor) else pattern  # pyright: ignore[reportUnnecessaryIsInstance]
            expected = "(blocks of q, blocks of k), or with heads before them"
            raise WrongArgument(
                argument="sparse_pattern", got=got, expected=expected, instead="Give a tensor of 0 and 1."
            )
        super().__init__(block_size, max(pattern.shape[-2:]) * block_size, causal, seq_dim, hints)
        blocks = (pattern if pattern.ndim == 3 else pattern[None]) != 0
        self.register_buffer("sparse_pattern", blocks.contiguous(), persistent=False)

    def mask(self, heads: int, kv_heads: int, moved: bool = True) -> MaskMod:
        found = self.sparse_pattern.shape[0]
        if found not in (1, heads, kv_heads):
            expected = f"one head, {heads} (of q) or {kv_heads} (of k)"
            instead = "Give the pattern for one of these."
            raise WrongArgument(
                argument="heads of sparse_pattern", got=found, expected=expected, instead=instead
            )
        size, causal, group, alike = self.block_size, self.causal, heads // found, found == 1
        position = _moved if moved else _in_place

        def in_pattern(b: Any, h: Any, q_idx: Any, kv_idx: Any, custom: Any) -> Any:
            at = position(b, q_idx, custom)
            kept = self.sparse_pattern[0 if alike else h // group, at // size, kv_idx // size] & (at >= 0)
            return kept & (kv_idx <= at) if causal else kept

        return in_pattern


class LocalStrideSparseAttention(BlockPatternAttention):
    """The last blocks and every `vert_stride`-th one, which ones depending on the head (Phi-3-small).

    A query of block a sees block c where c <= a and (a - c < local_blocks, or (c + u step + head_sliding_offset) is a
    multiple of vert_stride, or its kv head u is one of the last num_dense_heads); step = max(1, vert_stride //
    num_heads). Without causal: where the distance |a - c| beyond the local blocks is a multiple of vert_stride.

    num_heads: of q. homo_head: every head as the first one. num_kv_heads: of k, num_heads when None. active_head_range:
        the (first, last + 1) of num_heads that calls bring. Others as of SparseAttention.
    """

    def __init__(
        self,
        num_heads: int,
        max_seq_len: int,
        block_size: int,
        local_blocks: int,
        vert_stride: int,
        *,
        homo_head: bool = False,
        num_dense_heads: int = 0,
        num_kv_heads: int | None = None,
        active_head_range: tuple[int, int] | None = None,
        head_sliding_offset: int = 0,
        block_m: int | None = None,
        block_n: int | None = None,
        causal: bool = True,
        seq_dim: int | None = None,
        **hints: Any,
    ) -> None:
        at_least("max_seq_len", max_seq_len, 1)
        at_least("vert_stride", vert_stride, 1)
        at_least("local_blocks", local_blocks, 0 if vert_stride == 1 else 1)
        longest = max(block_size, block_m or 0, block_n or 0, 64)
        super().__init__(block_size, -(-max_seq_len // longest) * longest, causal, seq_dim, hints)
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads or num_heads
        at_least("num_kv_heads", self.num_kv_heads, 1)
        if num_heads % self.num_kv_heads:
            expected = f"a divisor of num_heads, {num_heads}"
            raise WrongArgument(
                argument="num_kv_heads", got=num_kv_heads, expected=expected, instead="Change one of them."
            )
        if homo_head and num_dense_heads:
            expected = "0 with homo_head, where all heads are alike"
            raise WrongArgument(
                argument="num_dense_heads", got=num_dense_heads, expected=expected, instead="Leave one out."
            )
        self.local_blocks, self.vert_stride, self.homo_head = local_blocks, vert_stride, homo_head
        self.num_dense_heads, self.head_sliding_offset = num_dense_heads, head_sliding_offset
        self.active_heads = (0, num_heads) if active_head_range is None or homo_head else active_head_range

    def mask(self, heads: int, kv_heads: int, moved: bool = True) -> MaskMod:
        first_head, last = self.active_heads
        if not self.homo_head and heads != last - first_head:
            expected = f"{last - first_head}, as the module was made for"
            instead = "Make a module for that many heads, or give active_head_range."
            raise WrongArgument(argument="heads of q", got=heads, expected=expected, instead=instead)
        size, causal, local, stride = self.block_size, self.causal, self.local_blocks, self.vert_stride
        group = self.num_heads // self.num_kv_heads
        first_dense = self.num_kv_heads - self.num_dense_heads
        step, shift, alike = max(1, stride // self.num_heads), self.head_sliding_offset, self.homo_head
        some_dense, position = self.num_dense_heads > 0, _moved if moved else _in_place

        def past(b: Any, h: Any, q_idx: Any, kv_idx: Any, custom: Any) -> Any:
            return kv_idx <= position(b, q_idx, custom)

        def past_blocks(b: Any, h: Any, q_idx: Any, kv_idx: Any, custom: Any) -> Any:
            at = position(b, q_idx, custom)
            kv_head = 0 if alike else (h + first_head) // group
            q_block, kv_block = at // size, kv_idx // size
            kept = (q_block - kv_block < local) | ((kv_block + kv_head * step + shift) % stride == 0)
            kept = kept | (kv_head >= first_dense) if some_dense else kept
            return kept & (kv_idx <= at)

        def blocks_around(b: Any, h: Any, q_idx: Any, kv_idx: Any, custom: Any) -> Any:
            at = position(b, q_idx, custom)
            kv_head = 0 if alike else (h + first_head) // group
            distance = (at // size - kv_idx // size).abs()
            kept = (distance < local) | ((distance - local + 1) % stride == 0)
            kept = kept | (kv_head >= first_dense) if some_dense else kept
            return kept & (at >= 0)

        if causal and stride == 1:  # all of them
            return past
        return past_blocks if causal else blocks_around


def combine_attn_partitions(*parts: tuple[Tensor, Tensor], hdim: int = 1) -> Tensor:
    """The attention over all keys from attentions over parts of them.

    parts: (out, lse) of each part, lse (batch, heads, rows). hdim: the dimension of heads in out, 1 or 2. A row that no
    part has keys for gives 0.
    """
    logs = torch.stack([lse for _, lse in parts])
    largest = logs.amax(0)
    shares = torch.exp(logs - torch.where(largest.isfinite(), largest, 0.0))
    total = shares.sum(0)
    shares = shares / torch.where(total > 0, total, 1.0)
    outs = torch.stack([out for out, _ in parts])
    weights = shares[..., None] if hdim == 1 else shares.transpose(-1, -2)[..., None]
    return (outs * weights.to(outs.dtype)).sum(0)


def _moved(b: Any, q_idx: Any, custom: Any) -> Any:
    """Where a query stands among the keys."""
    return q_idx + custom.input_tensors["offset"][b]


def _in_place(b: Any, q_idx: Any, custom: Any) -> Any:
    return q_idx


def _three(
    q: Tensor, k: Tensor | None, v: Tensor | None, split: Callable[[Tensor], tuple[Tensor, ...]] | None
) -> tuple[Tensor, Tensor, Tensor]:
    if k is not None and v is not None:
        return q, k, v
    if split is None:
        expected = "given where k or v is left out"
        raise WrongArgument(argument="split_qkv", got=None, expected=expected, instead="Give k and v, or it.")
    if k is None:
        q, k, v = split(q)
    else:
        k, v = split(k)
    return q, k, v


def _power_of_two(argument: str, value: object) -> None:
    at_least(argument, value, 1)
    assert isinstance(value, int)
    if value & (value - 1):
        expected = "a power of two"
        raise WrongArgument(argument=argument, got=value, expected=expected, instead="Take 16, 32, 64, ...")

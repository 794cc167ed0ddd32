"""Rows of K and V by number, copied side by side into memory that one call leaves to the next; rows in float8 with
scales become numbers on the way."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from attn_engine.runtime.scaled import CODES, COLUMNS, numbers_of
from attn_engine.runtime.token_lists import PIECE, Piece

MOST_KEPT = 2
AT_ONCE = 2**17  # numbers in float8 that are converted at a time
_kept: list[Tensor] = []
_lock = threading.Lock()


def _spare(like: Tensor, numbers: int) -> Tensor:
    """Room for so many numbers, whatever is in it. New memory costs more than to fill it: a quarter of a step of
    decoding."""
    with _lock:
        for i, x in enumerate(_kept):
            if x.dtype is like.dtype and x.device == like.device and x.numel() >= numbers:
                return _kept.pop(i)
    return like.new_empty(numbers)


def _keep(buffer: Tensor) -> None:
    if buffer.is_cpu and buffer.numel() <= PIECE and not buffer.is_inference():
        with _lock:
            _kept.append(buffer)
            del _kept[:-MOST_KEPT]


class GatheredRows:
    """Rows of tensors (N, H, R, D), numbered n * R + r, brought side by side: their columns follow each other.

    scales: (N, H, R, 1 or one for every 128 columns) of those parts that are float8, None for others, which are then
    converted to `dtype`. No scales: no part is float8, and all are of one type.
    """

    def __init__(
        self,
        parts: tuple[Tensor, ...],
        scales: Sequence[Tensor | None] = (),
        dtype: torch.dtype | None = None,
    ) -> None:
        self._parts = parts
        self._scales = scales or (None,) * len(parts)
        self._like = parts[0][:0].to(dtype) if dtype else parts[0]
        self.columns = sum(x.shape[3] for x in parts)
        self._buffer: Tensor | None = None

    def read(self, piece: Piece) -> Tensor:
        """(n, kv heads, longest, columns) of a piece; overwritten by the next one."""
        n, longest = piece.rows.shape
        kv_heads = piece.kv_heads.stop - piece.kv_heads.start
        numbers = n * longest * kv_heads * self.columns
        if self._buffer is None or self._buffer.numel() < numbers:
            self._buffer = _spare(self._like, numbers)
        buffer = self._buffer[:numbers].view(n * longest, kv_heads, self.columns)
        column, rows = 0, piece.rows.flatten()
        for x, scale in zip(self._parts, self._scales, strict=True):
            to = buffer[..., column : column + x.shape[3]]
            if scale is None:
                _copy_rows(x[:, piece.kv_heads], rows, to)
            else:
                _copy_numbers(x[:, piece.kv_heads], scale[:, piece.kv_heads], rows, to)
            column += x.shape[3]
        return buffer.view(n, longest, kv_heads, self.columns).transpose(1, 2)

    def release(self) -> None:
        """Nobody reads what was gathered any more."""
        buffer, self._buffer = self._buffer, None
        if buffer is not None:
            _keep(buffer)


def _copy_rows(x: Tensor, rows: Tensor, to: Tensor) -> None:
    """The rows of x (N, H, R, D) to `to` (rows, H, D)."""
    batches, heads, count, dim = x.shape
    if batches * count == 0:
        to.zero_()
    elif x.dtype is to.dtype and (1 in (batches, count) or x.stride(0) == count * x.stride(2)):
        row = x.stride(2) if count > 1 else x.stride(0)
        flat = x.as_strided((batches * count, heads, dim), (row, x.stride(1), x.stride(3)))
        if heads == 1:
            torch.index_select(flat[:, 0], 0, rows, out=to[:, 0])
        else:
            torch.index_select(flat, 0, rows, out=to)
    else:
        to.copy_(x.transpose(1, 2)[rows // count, rows % count])


def _copy_numbers(x: Tensor, scale: Tensor, rows: Tensor, to: Tensor) -> None:
    """The same of rows in float8, times their scales; some at a time, for what lies between stays in a cache."""
    _, heads, _, dim = x.shape
    step = max(1, AT_ONCE // max(1, heads * dim))
    for first in range(0, len(rows), step):
        own = rows[first : first + step]
        codes = x.new_empty((len(own), heads, dim), dtype=CODES)
        factors = scale.new_empty((len(own), heads, scale.shape[3]))
        _copy_rows(x.view(CODES), own, codes)
        _copy_rows(scale, own, factors)
        values, block = numbers_of(codes), dim if scale.shape[3] == 1 else COLUMNS
        for i in range(scale.shape[3]):
            columns = slice(i * block, (i + 1) * block)
            part = to[first : first + step, :, columns]
            part.copy_(values[..., columns].mul_(factors[..., i : i + 1]))

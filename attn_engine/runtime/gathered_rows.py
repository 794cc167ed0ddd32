"""Rows of K and V by number, copied side by side into memory that one call leaves to the next."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from attn_engine.runtime.token_lists import PIECE, Piece

MOST_KEPT = 2
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
    """Rows of tensors (N, H, R, D), numbered n * R + r, brought side by side: their columns follow each other."""

    def __init__(self, parts: tuple[Tensor, ...]) -> None:
        self._parts = parts
        self.columns = sum(x.shape[3] for x in parts)
        self._buffer: Tensor | None = None

    def read(self, piece: Piece) -> Tensor:
        """(n, kv heads, longest, columns) of a piece; overwritten by the next one."""
        n, longest = piece.rows.shape
        kv_heads = piece.kv_heads.stop - piece.kv_heads.start
        numbers = n * longest * kv_heads * self.columns
        first = self._parts[0]
        if self._buffer is None or self._buffer.numel() < numbers:
            self._buffer = _spare(first, numbers)
        buffer = self._buffer[:numbers].view(n * longest, kv_heads, self.columns)
        column = 0
        for x in self._parts:
            self._read_part(
                x[:, piece.kv_heads], piece.rows.flatten(), buffer[..., column : column + x.shape[3]]
            )
            column += x.shape[3]
        return buffer.view(n, longest, kv_heads, self.columns).transpose(1, 2)

    @staticmethod
    def _read_part(x: Tensor, rows: Tensor, to: Tensor) -> None:
        batches, heads, count, dim = x.shape
        if batches * count == 0:
            to.zero_()
        elif 1 in (batches, count) or x.stride(0) == count * x.stride(2):
            row = x.stride(2) if count > 1 else x.stride(0)
            flat = x.as_strided((batches * count, heads, dim), (row, x.stride(1), x.stride(3)))
            if heads == 1:
                torch.index_select(flat[:, 0], 0, rows, out=to[:, 0])
            else:
                torch.index_select(flat, 0, rows, out=to)
        else:
            to.copy_(x.transpose(1, 2)[rows // count, rows % count])

    def release(self) -> None:
        """Nobody reads what was gathered any more."""
        buffer, self._buffer = self._buffer, None
        if buffer is not None:
            _keep(buffer)

"""Attention over lists of tokens: a piece of the queries after the other, each an ordinary call on gathered keys.

The keys of a piece are copied side by side, once for all heads that share them, and the kernels of any other call run
on them: one batch for each query, its heads as rows. Gradients gather again, run the kernels of the backward pass, and
add what each entry gets to its row, in the order of the entries: the same bits for any number of threads. Beside the
results there is a piece (`token_lists.PIECE` numbers, and as much again for its gradients) and, in the backward pass,
the gradients of all rows in the compute type.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from attn_engine.ir.ops import Number
from attn_engine.ir.passes.token_lists import QUERY_PLACES, TOKEN_LISTS
from attn_engine.ir.program import Attention
from attn_engine.runtime.call import Call
from attn_engine.runtime.gathered_rows import GatheredRows
from attn_engine.runtime.operator import run_backward, run_forward
from attn_engine.runtime.sequences import SPAN_NAMES
from attn_engine.runtime.token_lists import Piece, TokenLists


@dataclass(frozen=True, slots=True, eq=False)
class TokenCall:
    """What a call means besides its tensors. Tensors are (B, H, rows, D) here.

    full, ragged: the kernels for pieces whose lists are equally long, and for others. captures: names of the captured
    tensors, in order. key_parts: how many of the given tensors are columns of K, one after the other; dim_v: V is the
    first columns of K, or 0: a tensor of its own, the last one. scales: as of `Keys`.
    """

    full: Call
    ragged: Call
    lists: TokenLists
    numbers: Mapping[str, Number]
    captures: tuple[str, ...]
    key_parts: int
    dim_v: int
    scales: tuple[Tensor | None, ...] = ()

    def call(self, piece: Piece) -> Call:
        return self.full if piece.full else self.ragged


def tensors_of_piece(program: Attention, lists: TokenLists, piece: Piece) -> dict[str, Tensor]:
    """What the kernels of a program over lists read of them, by name."""
    read = {c.name for c in program.captures}
    found: dict[str, Tensor] = {}
    if QUERY_PLACES.name in read:
        found[QUERY_PLACES.name] = lists.places(piece)
    if TOKEN_LISTS.name in read:
        found[TOKEN_LISTS.name] = piece.positions
    if program.sequences is not None:
        both = (torch.full_like(piece.counts, lists.heads // lists.kv_heads), piece.counts)
        spans = (torch.stack((torch.zeros_like(x), x), 1).to(torch.int32) for x in both)
        found |= dict(zip(SPAN_NAMES, spans, strict=True))
    return found


@dataclass(frozen=True, slots=True, eq=False)
class Keys:
    """Where K and V are: tensors (N, H, rows, D) whose columns follow each other.

    values: one tensor, or none where V is the first dim_v columns of K. scales: of each of them, keys first, where any
    is float8: (N, H, rows, 1 or one for every 128 columns), or None.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    dim_v: int = 0
    scales: tuple[Tensor | None, ...] = ()

    def parts(self) -> list[tuple[Tensor, Tensor | None]]:
        """All of them, each with its scales."""
        tensors = (*self.keys, *self.values)
        return list(zip(tensors, self.scales or (None,) * len(tensors), strict=True))


class Rows:
    """A tensor (B, H, rows, D) or (B, H, rows) as pieces see it: (n, kv heads, query heads of one, ...)."""

    def __init__(self, x: Tensor) -> None:
        self._by_token = x.transpose(1, 2).flatten(0, 1)

    def of(self, piece: Piece) -> Tensor:
        kv_heads = piece.kv_heads.stop - piece.kv_heads.start
        return self._by_token[piece.tokens, piece.heads].unflatten(1, (kv_heads, -1))

    def put(self, piece: Piece, x: Tensor) -> None:
        self.of(piece).copy_(x)


def empty_rows(like: Tensor, *dims: int, dtype: torch.dtype | None = None) -> Tensor:
    """(B, H, rows, *dims) whose heads lie side by side."""
    batches, heads, rows, _ = like.shape
    return like.new_empty((batches, rows, heads, *dims), dtype=dtype).transpose(1, 2)


class _KeysAndValues:
    """K and V of a piece, from the tensors of a call."""

    def __init__(self, call: TokenCall, q: Tensor, tensors: Sequence[Tensor]) -> None:
        self._dim_v = call.dim_v
        own, others = slice(call.key_parts), slice(call.key_parts, None)
        scales, dtype = call.scales, q.dtype if call.scales else None
        self._keys = GatheredRows(tuple(tensors[own]), scales[own], dtype)
        self._values = None if call.dim_v else GatheredRows(tuple(tensors[others]), scales[others], dtype)

    @property
    def numbers_of_row(self) -> int:
        return self._keys.columns + (self._values.columns if self._values else 0)

    def read(self, piece: Piece) -> tuple[Tensor, Tensor]:
        keys = self._keys.read(piece)
        return keys, keys[..., : self._dim_v] if self._values is None else self._values.read(piece)

    def release(self) -> None:
        self._keys.release()
        if self._values is not None:
            self._values.release()


class TokenAttention(torch.autograd.Function):
    """o and the saved row values (B, H, rows) of (call, q, parts of k and v, captured tensors)."""

    @staticmethod
    def forward(ctx: Any, call: TokenCall, count: int, q: Tensor, *tensors: Tensor):
        keys, captured = tensors[:count], dict(zip(call.captures, tensors[count:], strict=True))
        gathered = _KeysAndValues(call, q, keys)
        first = call.full.compiled
        out = empty_rows(q, first.program.dim_v)
        saved = [empty_rows(q, dtype=first.compute) for _ in first.saved_names]
        for piece, extra in _pieces(call, gathered.numbers_of_row):
            given = {**captured, **extra}
            found = run_forward(
                call.call(piece), Rows(q).of(piece), *gathered.read(piece), given, call.numbers
            )
            for whole, x in zip((out, *saved), found, strict=True):
                Rows(whole).put(piece, x)
        gathered.release()
        ctx.call, ctx.count, ctx.rows = call, count, len(saved)
        ctx.learned = call.full.learned(captured)
        ctx.save_for_backward(q, *tensors, out, *saved)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*call.full.fixed(saved))
        return out, *saved

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor | None, *d_rows: Tensor | None):
        call: TokenCall = ctx.call
        q, *rest = ctx.saved_tensors
        tensors, out, saved = rest[: -1 - ctx.rows], rest[-1 - ctx.rows], rest[len(rest) - ctx.rows :]
        keys, captured = tensors[: ctx.count], dict(zip(call.captures, tensors[ctx.count :], strict=True))
        found = _gradients(call, q, keys, captured, (out, *saved), (d_out, *d_rows), ctx.learned)
        of_captured = (found[name] if name in ctx.learned else None for name in call.captures)
        of_keys = (found["keys"][i] for i in range(ctx.count))
        return None, None, found["q"], *of_keys, *of_captured


def _pieces(call: TokenCall, numbers_of_row: int) -> Iterator[tuple[Piece, dict[str, Tensor]]]:
    for piece in call.lists.pieces(numbers_of_row):
        yield piece, tensors_of_piece(call.call(piece).compiled.program, call.lists, piece)


def _gradients(
    call: TokenCall,
    q: Tensor,
    keys: Sequence[Tensor],
    captured: Mapping[str, Tensor],
    results: Sequence[Tensor],
    arriving: Sequence[Tensor | None],
    learned: tuple[str, ...],
) -> dict[str, Any]:
    """By name: "q", "keys" (one for each tensor) and those of the learned tensors."""
    gathered, compute = _KeysAndValues(call, q, keys), call.full.compiled.compute
    dq = empty_rows(q, q.shape[3])
    sums = [SummedRows(x, compute) for x in keys]
    of_captured = {n: torch.zeros_like(captured[n], dtype=compute) for n in learned}
    for piece, extra in _pieces(call, gathered.numbers_of_row):
        d_out, *d_rows = (None if x is None else Rows(x).of(piece) for x in arriving)
        tensors = (
            Rows(q).of(piece),
            *gathered.read(piece),
            *(Rows(x).of(piece).contiguous() for x in results),
        )
        given = {**captured, **extra}
        d_query, d_key, d_value, *more = run_backward(
            call.call(piece), d_out, tensors, given, call.numbers, learned, d_rows
        )
        Rows(dq).put(piece, d_query)
        add_to_rows(sums, piece, d_key, d_value, call)
        for name, x in zip(learned, more, strict=True):
            of_captured[name] += x
    gathered.release()
    of_captured = {n: x.to(captured[n].dtype) for n, x in of_captured.items()}
    return {"q": dq, "keys": [x.result() for x in sums], **of_captured}


class SummedRows:
    """The gradient of one tensor (N, H, R, D), to whose rows pieces add, entry after entry."""

    def __init__(self, x: Tensor, compute: torch.dtype) -> None:
        self._like = x
        batches, heads, rows, dim = x.shape
        self._sum = x.new_zeros((batches * rows, heads, dim), dtype=compute)
        self.dim = dim

    def add(self, kv_heads: slice, rows: Tensor, x: Tensor) -> None:
        """x: (entries, kv heads, dim)."""
        to, x = self._sum[:, kv_heads], x.to(self._sum.dtype)
        if to.is_cuda:  # its index_add_ adds in no fixed order
            to.index_put_((rows,), x, accumulate=True)
        elif to.shape[1] == 1:
            to[:, 0].index_add_(0, rows, x[:, 0])
        else:
            to.index_add_(0, rows, x)

    def add_range(self, batch: int, x: Tensor) -> None:
        """x (rows, dim) to the first rows of the only head of a batch."""
        first = batch * self._like.shape[2]
        self._sum[first : first + len(x), 0] += x

    def result(self) -> Tensor:
        batches, heads, rows, dim = self._like.shape
        return self._sum.view(batches, rows, heads, dim).transpose(1, 2).to(self._like.dtype)


def add_to_rows(
    sums: Sequence[SummedRows], piece: Piece, d_key: Tensor, d_value: Tensor, call: TokenCall
) -> None:
    """Send what the entries of a piece got, (n, kv heads, longest, D) each, to their rows."""
    if call.dim_v:
        d_key = d_key.to(call.full.compiled.compute)
        d_key[..., : call.dim_v] += d_value
    rows, inside = piece.rows, None if piece.full else piece.inside
    rows = rows.flatten() if inside is None else rows[inside]

    def entries(x: Tensor) -> Tensor:
        x = x.transpose(1, 2)
        return x.flatten(0, 1) if inside is None else x[inside]

    keys, column = entries(d_key), 0
    for x in sums[: call.key_parts]:
        x.add(piece.kv_heads, rows, keys[..., column : column + x.dim])
        column += x.dim
    for x in sums[call.key_parts :]:
        x.add(piece.kv_heads, rows, entries(d_value))

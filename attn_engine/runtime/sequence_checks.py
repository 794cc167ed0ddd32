"""What the tensors that say where sequences lie must be: kinds and shapes, then contents, before anything runs."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from attn_engine.errors import AttnEngineError, DeviceMismatch, NotATensor
from attn_engine.ir.program import Sequences
from attn_engine.runtime.paged_checks import first_wrong
from attn_engine.runtime.sequences import AXES, SequenceTables


class WrongSequences(AttnEngineError, ValueError):
    template = "{argument}: {what} is {got}, not {expected}."
    advice = "{instead}"


_CUMULATIVE = (
    "Sequence b has rows cu_len[b] to cu_len[b + 1] - 1: the sums of lengths from 0 on, int32 or int64."
)
_PLACES = "Sequence b has rows start[b] to start[b] + len[b] - 1 of its batch; without a len, to the end."


def check_places(given: Mapping[str, Tensor], q: Tensor, k: Tensor, *, packed: bool) -> None:
    """Raise a typed error for what cannot be told about sequences at all; q and k are (B, H, rows, D)."""
    mixed = [name for name in given if name.startswith("cu_") is not packed]
    if mixed:
        _refuse(mixed[0], "an argument beside cumulative lengths", "given", "left out", _PLACES)
    for name, x in given.items():
        if not isinstance(x, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise NotATensor(argument=name, got=type(x).__name__)
        if x.dtype not in (torch.int32, torch.int64):
            _refuse(
                name, "its dtype", x.dtype, "torch.int32 or torch.int64", _CUMULATIVE if packed else _PLACES
            )
        if x.device != q.device:
            raise DeviceMismatch(argument=name, got=x.device, expected=q.device)
    _check_packed(given, q, k) if packed else _check_in_batch(given, q)


def _check_packed(given: Mapping[str, Tensor], q: Tensor, k: Tensor) -> None:
    for name, x in given.items():
        if x.ndim != 1 or x.shape[0] < 1:
            _refuse(name, "its shape", tuple(x.shape), "(sequences + 1,)", _CUMULATIVE)
    if "cu_len_q" not in given:
        _refuse("cu_len_q", "it", "left out", "given with cu_len_kv", _CUMULATIVE)
    of_q, of_kv = given["cu_len_q"], given.get("cu_len_kv", given["cu_len_q"])
    if "cu_len_kv" not in given and q.shape[2] != k.shape[2]:
        expected = f"given where q and k have {q.shape[2]} and {k.shape[2]} rows"
        _refuse("cu_len_kv", "it", "left out", expected, _CUMULATIVE)
    if of_kv.shape != of_q.shape:
        expected = f"{tuple(of_q.shape)}, that of cu_len_q"
        _refuse("cu_len_kv", "its shape", tuple(of_kv.shape), expected, _CUMULATIVE)


def _check_in_batch(given: Mapping[str, Tensor], q: Tensor) -> None:
    for name, x in given.items():
        if tuple(x.shape) != (q.shape[0],):
            _refuse(name, "its shape", tuple(x.shape), f"({q.shape[0]},), one number for each batch", _PLACES)


def check_sequences(sequences: Sequences, tables: SequenceTables, sizes: Mapping[str, int]) -> None:
    """Raise WrongSequences for rows that the tensors of the call do not have; `sizes` are those of the tensors."""
    for axis in AXES:
        firsts, lengths, rows = tables.firsts[axis], tables.lengths[axis], sizes[f"{axis}_len"]
        if axis == "kv" and sequences.page:
            continue  # the table has said where they are
        if sequences.packed:
            _check_cumulative(f"cu_len_{axis}", firsts, lengths, rows, "q" if axis == "q" else "k")
            continue
        if (b := first_wrong(firsts < 0)) is not None:
            _refuse(f"start_{axis}", f"element {b}", int(firsts[b]), "0 or more", _PLACES)
        if (b := first_wrong(lengths < 0)) is not None:
            _refuse(f"len_{axis}", f"element {b}", int(lengths[b]), "0 or more", _PLACES)
        if (b := first_wrong(firsts + lengths > rows)) is not None:
            end = int(firsts[b] + lengths[b])
            _refuse(f"len_{axis}", f"the end of sequence {b}", end, f"{rows} or less", _PLACES)


def _check_cumulative(name: str, firsts: Tensor, lengths: Tensor, rows: int, tensor: str) -> None:
    if not len(firsts):
        return
    if int(firsts[0]) != 0:
        _refuse(name, "its first element", int(firsts[0]), "0", _CUMULATIVE)
    if (b := first_wrong(lengths < 0)) is not None:
        end = int(firsts[b] + lengths[b])
        _refuse(name, f"element {b + 1}", end, f"{int(firsts[b])} or more, as element {b} is", _CUMULATIVE)
    end = int(firsts[-1] + lengths[-1])
    if end > rows:
        _refuse(name, "its last element", end, f"{rows} or less, the rows of {tensor}", _CUMULATIVE)


def _refuse(argument: str, what: str, got: object, expected: str, instead: str) -> None:
    raise WrongSequences(argument=argument, what=what, got=got, expected=expected, instead=instead)

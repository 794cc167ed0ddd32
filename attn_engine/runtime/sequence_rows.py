"""Rows of sequences, as the dense definition sees them: a batch of the longest length, and back."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from attn_engine.codegen.lower.row_values import adjoint_param, row_gradient_param
from attn_engine.codegen.lower.values import saved_param
from attn_engine.ir.passes.rule_analysis import saved_of_empty_row
from attn_engine.ir.program import OnlineRule, Sequences
from attn_engine.runtime.sequences import SequenceTables


class PaddedRows:
    """Where the rows of every sequence are, along one axis ("q" or "kv") of tensors (B, H, rows, ...); B is 1 where
    sequences are packed."""

    def __init__(self, sequences: Sequences, tables: SequenceTables, axis: str, device: torch.device) -> None:
        first, length = tables.firsts[axis].to(device), tables.lengths[axis].to(device)
        position = torch.arange(tables.longest[axis], device=device)
        self.valid = position < length[:, None]  # (n, longest)
        self._row = torch.where(self.valid, first[:, None] + position, 0)
        own = torch.zeros_like(first) if sequences.packed else torch.arange(len(first), device=device)
        self._batch = own[:, None].expand_as(self._row)

    def padded(self, x: Tensor, fill: float = 0.0) -> Tensor:
        """(B, H, rows, ...) as (n, H, longest, ...); `fill` beyond the end of a sequence. Differentiable."""
        if self._row.numel() == 0 or x.shape[2] == 0:
            return x.new_full((len(self._row), x.shape[1], self._row.shape[1], *x.shape[3:]), fill)
        found = x.transpose(1, 2)[self._batch, self._row].transpose(1, 2)
        return torch.where(self._valid_like(found), found, fill)

    def restored(self, x: Tensor, shape: tuple[int, ...], fill: float = 0.0) -> Tensor:
        """(n, H, longest, ...) as (B, H, rows, ...) of this shape; `fill` in rows of no sequence. Differentiable."""
        target = x.new_full((shape[0], shape[2], shape[1], *shape[3:]), fill)
        places = self._batch[self.valid], self._row[self.valid]
        return target.index_put(places, x.transpose(1, 2)[self.valid]).transpose(1, 2)

    def _valid_like(self, x: Tensor) -> Tensor:
        return self.valid.view(self.valid.shape[0], 1, self.valid.shape[1], *[1] * (x.ndim - 3))


def with_padded_rows(
    sequences: Sequences, tables: SequenceTables, rule: OnlineRule, tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The tensors of a backward pass with Q and its row values as (n, H, longest, ...).

    Rows beyond the end of a sequence have seen no key.
    """
    rows = PaddedRows(sequences, tables, "q", tensors["Q"].device)
    empty = {saved_param(n): x for n, x in saved_of_empty_row(rule).items()}
    names = ["Q", "Delta", *empty, *(adjoint_param(n) for p in rule.adjoints for n, _ in p.values)]
    names += [row_gradient_param(n) for n, _ in rule.saved]
    fills = {name: -math.inf if math.isnan(x) else x for name, x in empty.items()}
    made = {n: rows.padded(tensors[n], fills.get(n, 0.0)) for n in names if n in tensors}
    return {**tensors, **made}

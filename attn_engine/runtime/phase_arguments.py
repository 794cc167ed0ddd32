"""Where the values of a chunk kernel's arguments come from at a launch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from attn_engine.ir.ops import Number

ArgumentValue = Callable[[Mapping[str, Tensor], Mapping[str, Number]], Any]


class TensorText(NamedTuple):
    """A tensor of a call, and what a text calls it, its sizes and its strides, outermost first."""

    tensor: str
    text: str
    sizes: tuple[str, ...]
    strides: tuple[str, ...]


def argument_values(scalars: Mapping[str, str], tensors: Iterable[TensorText]) -> dict[str, ArgumentValue]:
    """By the text's names. scalars: what a text calls captured numbers, and what a call does."""
    found = {text: _number(name) for text, name in scalars.items()}
    found |= {n: _number(n) for n in ("q_group", "k_group")}
    for t in tensors:
        found[t.text] = _tensor(t.tensor)
        found |= {n: _size(t.tensor, i) for i, n in enumerate(t.sizes)}
        found |= {n: _stride(t.tensor, i) for i, n in enumerate(t.strides)}
    return found


def _number(name: str) -> ArgumentValue:
    return lambda tensors, numbers: numbers[name]


def _tensor(name: str) -> ArgumentValue:
    return lambda tensors, numbers: tensors[name].detach()


def _size(name: str, dimension: int) -> ArgumentValue:
    return lambda tensors, numbers: tensors[name].shape[dimension]


def _stride(name: str, dimension: int) -> ArgumentValue:
    return lambda tensors, numbers: tensors[name].stride(dimension)

"""Checks of what library functions are made with: typed errors that name the argument."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch

from attn_engine.errors import WrongArgument


def at_least(argument: str, value: object, least: int) -> None:
    """Raise WrongArgument for what is no integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        expected = f"an integer of at least {least}"
        raise WrongArgument(argument=argument, got=value, expected=expected, instead=f"Give {least} or more.")


def integers(argument: str, value: object, ranks: tuple[int, ...]) -> None:
    """Raise WrongArgument for what is no integer tensor of one of these ranks."""
    given = value if isinstance(value, torch.Tensor) else None
    if given is None or given.dtype.is_floating_point or given.ndim not in ranks:
        got = value if given is None else f"{given.dtype}, shape {tuple(given.shape)}"
        expected = f"an integer tensor of {' or '.join(map(str, ranks))} dimensions"
        raise WrongArgument(argument=argument, got=got, expected=expected, instead="Convert it with .int().")


def sizes(argument: str, value: Sequence[int], most: int) -> tuple[int, ...]:
    """`value` as a tuple of one to `most` positive integers; raises WrongArgument."""
    found = tuple(value) if isinstance(value, list | tuple) else ()
    if not 1 <= len(found) <= most:
        expected = f"one to {most} sizes"
        raise WrongArgument(
            argument=argument, got=value, expected=expected, instead="Give a tuple of integers."
        )
    for size in found:
        at_least(argument, size, 1)
    return found


def per_dimension(argument: str, value: int | Sequence[int], count: int) -> tuple[int, ...]:
    """One number for each of `count` dimensions: `value` itself, or the same for all; raises WrongArgument."""
    found = (value,) * count if isinstance(value, int) else tuple(value)
    if len(found) != count:
        expected = f"one number, or {count}"
        raise WrongArgument(
            argument=argument, got=value, expected=expected, instead="Give one per dimension."
        )
    for number in found:
        at_least(argument, cast(object, number), 1)
    return found

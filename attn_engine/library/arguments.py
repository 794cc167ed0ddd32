"""Checks of what library functions are made with: typed errors that name the argument."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from numbers import Real
from typing import cast

import torch

from attn_engine.errors import AttnEngineError, WrongArgument


@contextmanager
def called(**names: str) -> Iterator[None]:
    """Errors of a call inside name the arguments that this function's own caller gave: called(len_kv="lengths")."""
    try:
        yield
    except AttnEngineError as error:
        argument = error.details.get("argument")
        if argument not in names:
            raise
        details = {**error.details, "argument": names[str(argument)]}
        raise type(error)(location=error.location, **details) from None


def at_least(argument: str, value: object, least: int) -> None:
    """Raise WrongArgument for what is no integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        expected = f"an integer of at least {least}"
        raise WrongArgument(argument=argument, got=value, expected=expected, instead=f"Give {least} or more.")


def number(argument: str, value: object, least: float | None = None) -> float:
    """`value` as a float, of at least `least`; raises WrongArgument."""
    found = float(value) if isinstance(value, Real) and not isinstance(value, bool) else None
    if found is None or (least is not None and not found >= least):
        expected = "a number" if least is None else f"a number of at least {least:g}"
        raise WrongArgument(argument=argument, got=value, expected=expected, instead="Give a float.")
    return found


def scale_of(argument: str, value: object, dim: int) -> float:
    """`value` as a float, or 1 / sqrt(dim) for None; raises WrongArgument."""
    return dim**-0.5 if value is None else number(argument, value)


def divisible(heads: int, kv_heads: int, of: str = "q", keys: str = "k") -> None:
    """Raise WrongArgument where the heads of `of` are no multiple of those of `keys`."""
    if kv_heads < 1 or heads % kv_heads:
        expected = f"a multiple of the heads of {keys}, {kv_heads}"
        instead = f"Check the layout of {of} and {keys}."
        raise WrongArgument(argument=f"heads of {of}", got=heads, expected=expected, instead=instead)


def one_each(argument: str, value: object, count: int) -> None:
    """Raise WrongArgument for what is no integer tensor (count,)."""
    integers(argument, value, (1,))
    assert isinstance(value, torch.Tensor)
    if value.shape[0] != count:
        instead = "Give one number for each sequence."
        raise WrongArgument(
            argument=argument, got=tuple(value.shape), expected=f"({count},)", instead=instead
        )


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

"""What is wrong with lists of tokens."""

from __future__ import annotations

from attn_engine.errors import AttnEngineError


class WrongTokens(AttnEngineError, ValueError):
    template = "{argument}: {what} is {got}, not {expected}."
    advice = "{instead}"


ABOUT_INDICES = (
    "It is int32 or int64, a list of keys for every query: positions, or places in a cache, page * rows of a page + "
    "row; -1 for none."
)


def refuse(argument: str, what: str, got: object, expected: str, instead: str = ABOUT_INDICES) -> WrongTokens:
    """The error, to be raised."""
    return WrongTokens(argument=argument, what=what, got=got, expected=expected, instead=instead)

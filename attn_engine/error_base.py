"""The base of every error: a message with the user's line and the next step, filled from keywords."""

from __future__ import annotations

from string import Formatter
from textwrap import fill
from typing import Any, ClassVar

from attn_engine.locations import Location, user_location


class AttnEngineError(Exception):
    """Base of every error that attn_engine raises on purpose.

    Give the keywords of `template` and `advice`; `location` is found by itself when it is not given.
    """

    template: ClassVar[str] = "{message}"
    advice: ClassVar[str] = ""

    def __init__(self, *, location: Location | None = None, **details: object) -> None:
        wanted = self.keywords()
        if wanted != details.keys():
            raise AssertionError(f"{type(self).__name__} takes {sorted(wanted)}, not {sorted(details)}")
        self.details = details
        self.location = location or user_location()
        self.message = " ".join(part.format(**details) for part in (self.template, self.advice) if part)
        super().__init__(str(self))

    @classmethod
    def keywords(cls) -> set[str]:
        """What the constructor takes besides `location`."""
        return {name for _, name, _, _ in Formatter().parse(cls.template + cls.advice) if name}

    def __str__(self) -> str:
        if self.location is None:
            return self.message
        message = self.message
        if "\n" not in message:
            message = fill(
                message, 108, subsequent_indent="  ", break_on_hyphens=False, break_long_words=False
            )
        return f"{self.location}\n  {message}"

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["details"][name]
        except KeyError:
            raise AttributeError(name) from None

    def __reduce__(self) -> Any:
        return _rebuild, (type(self), self.location, self.details)


def _rebuild(
    cls: type[AttnEngineError], location: Location | None, details: dict[str, object]
) -> AttnEngineError:
    return cls(location=location, **details)

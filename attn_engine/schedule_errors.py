"""Errors and warnings about targets, schedules and tuning; `attn_engine.errors` has them too."""

from __future__ import annotations

from attn_engine.error_base import AttnEngineError


class UnknownTarget(AttnEngineError, ValueError):
    template = "target={target!r} is not known."
    advice = "Use one of {known}."


class IllegalSchedule(AttnEngineError, ValueError):
    template = "schedule: {field}={got!r} is not {expected}."
    advice = "{instead}"


class OutOfSharedMemory(AttnEngineError, ValueError):
    template = (
        "Kernel {kernel} needs {needed} bytes of shared memory in tiles of {tiles}; "
        "a block on {target} has {limit}."
    )
    advice = "{instead}"


class NothingToTune(AttnEngineError, NotImplementedError):
    template = 'tune=True has nothing to measure on backend "{backend}": {reason}.'
    advice = "{instead}"


class StoreIgnored(UserWarning):
    """A file of stored schedules cannot be read or written; it is moved aside or left, and the default is used."""

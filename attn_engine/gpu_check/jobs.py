"""A check as a job: carried out, timed, and its errors told apart from those of the machine."""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass

import torch

from attn_engine.errors import GradientNotSupported, UnsupportedOnBackend
from attn_engine.gpu_check.catalogue import Check
from attn_engine.gpu_check.checks import KINDS, Failed, Place
from attn_engine.gpu_check.outcome import Outcome


@dataclass(frozen=True, slots=True)
class CheckJob:
    """A check of the catalogue at a place."""

    check: Check
    place: Place

    @property
    def name(self) -> str:
        return self.check.name

    @property
    def heavy(self) -> bool:
        return self.check.heavy and not self.place.small

    def run(self) -> Outcome:
        try:
            return timed(lambda: KINDS[self.check.kind](self.check.case, self.place))
        finally:
            gc.collect()
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()


class Comparison:
    """A job that compares a call with formulas. Its class says which."""

    __slots__ = ()
    place: Place
    heavy: bool

    @property
    def name(self) -> str:
        raise NotImplementedError

    def compare(self) -> str:
        """A line of numbers; raises Failed."""
        raise NotImplementedError

    def run(self) -> Outcome:
        return timed(self.compare)


def timed(run: Callable[[], str]) -> Outcome:
    """What `run` says, or why it failed. What a backend refuses by name, or memory is too small for, was not run."""
    begin = time.perf_counter()

    def seconds() -> float:
        return round(time.perf_counter() - begin, 2)

    try:
        detail = run()
    except Failed as failure:
        return Outcome("failed", str(failure), seconds())
    except (UnsupportedOnBackend, GradientNotSupported) as error:
        return Outcome("not run", f"the backend says that it has no kernel for it: {error}", seconds())
    except torch.OutOfMemoryError as error:
        return Outcome("not run", f"the device has too little memory: {error}", seconds())
    except Exception as error:
        where = "".join(traceback.format_tb(error.__traceback__)[-2:])
        return Outcome("failed", f"{type(error).__name__}: {error}\n{where}", seconds(), {"crashed": True})
    return Outcome("passed", detail, seconds())

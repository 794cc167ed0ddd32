"""The traced program of an engine: when it is made, and when it is made again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Generic, Protocol, TypeVar

from torch import Tensor

from attn_engine.errors import (
    AttnEngineError,
    IndexNotInteger,
    MaskIsNotBool,
    ScoreIsBool,
    WrongOperands,
)
from attn_engine.frontend import CustomIO
from attn_engine.ir.ops import Storage
from attn_engine.runtime.bind import storage_of
from attn_engine.runtime.call_checks import CallChecks


class Traced(Protocol):
    """A program and what its functions captured."""

    def stale(self, storages: dict[str, Storage]) -> bool: ...


T = TypeVar("T", bound=Traced)


class Tracing(Generic[T]):
    """The part of an engine that keeps its program up to date.

    Mistakes show when the engine is made. How custom inputs lie is not known then: they are taken for float32, and an
    error that another kind might cure waits for the call that brings the tensors.
    """

    custom_io: CustomIO
    _checks: CallChecks
    _traced: T | None
    _first_error: AttnEngineError | None

    def _trace(self, storages: dict[str, Storage]) -> T:
        raise NotImplementedError

    def _first_trace(self) -> T | None:
        try:
            return self._trace(self._storages({}))
        except (IndexNotInteger, MaskIsNotBool, ScoreIsBool, WrongOperands) as error:
            if not len(self.custom_io):
                raise
            self._first_error = error
            return None

    @property
    def _present(self) -> T:
        if self._traced is None and self._first_error is None:
            self._traced = self._first_trace()
        if self._traced is None:
            assert self._first_error is not None
            raise self._first_error
        return self._traced

    def _storages(self, custom: Mapping[str, Tensor]) -> dict[str, Storage]:
        names = self._checks.custom_shapes
        return {n: storage_of(n, custom[n].dtype) if n in custom else Storage.FLOAT32 for n in names}

    def _current(self, storages: dict[str, Storage]) -> T:
        """The program of this moment for custom inputs that lie like this."""
        if self._traced is None or self._traced.stale(storages):
            self._traced = self._trace(storages)
        return self._traced

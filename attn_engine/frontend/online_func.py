"""The base of normalisers, and what tracing one gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from attn_engine.frontend.custom_io import CustomIO
from attn_engine.frontend.session import BoundScalar, BoundTensor, Guard
from attn_engine.frontend.trace import captures_changed
from attn_engine.ir.program import OnlineRule


class OnlineFunc:
    """Base of normalisers. A subclass says which row values it carries and defines, statically or not:

    online_fwd(scores, online_rowscales, b, h, q_idx) -> (weights, new online_rowscales, o_scale): one tile of keys;
        the output becomes output * o_scale + weights @ v. `scores.get_reduce("max" | "min" | "sum" | "abssum")` reduces
        the tile's scores of a row.
    online_fwd_epilogue(o, online_rowscales, b, h, q_idx) -> (output, final_rowscales): after the last tile.
    forward(scores, final_rowscales, b, h, q_idx, kv_idx) -> weights: normalised weights again, for the backward pass.
    backward(dp, scores, final_rowscales, doosum, b, h, q_idx, kv_idx) -> gradient of the scores: `scores` are the
        weights of `forward`, dp their gradient, doosum the row sum of dO * O.

    forward, backward and combine may be left out, each by itself: they are derived (RuleNotDerivable says what is in
    the way). engine.check compares those that are given with the derived ones.
    A number that the methods read (a global, a closure's, an attribute) is a constant of the kernels; it is looked at
    again at every call, and another value makes other kernels. Numbers that change often belong into score_mod.
    Row values and their initial numbers are given to the constructor, or as class attributes of the same names.
    """

    online_rowscales: Mapping[str, Any] = {}
    final_rowscales: Mapping[str, Any] = {}
    external_fwd_tensors: CustomIO | None = None
    methods: ClassVar[tuple[str, ...]] = (
        "online_fwd",
        "online_fwd_epilogue",
        "forward",
        "backward",
        "combine",
    )

    def __init__(
        self,
        online_rowscales: Mapping[str, Any] | None = None,
        final_rowscales: Mapping[str, Any] | None = None,
        external_fwd_tensors: CustomIO | None = None,
    ) -> None:
        if online_rowscales is not None:
            self.online_rowscales = online_rowscales
        if final_rowscales is not None:
            self.final_rowscales = final_rowscales
        if external_fwd_tensors is not None:
            self.external_fwd_tensors = external_fwd_tensors

    online_fwd: Callable[..., Any]
    online_fwd_epilogue: Callable[..., Any]


@dataclass(frozen=True, slots=True)
class RuleTrace:
    """A traced rule, and what it took for granted.

    opaque: the methods read things that cannot be watched (elements of a list, a module's numbers): trace them again at
    every call. tensors, scalars: how to read what a row function captures, as in `Trace`.
    """

    rule: OnlineRule
    guards: tuple[Guard, ...]
    opaque: bool
    tensors: tuple[BoundTensor, ...] = ()
    scalars: tuple[BoundScalar, ...] = ()

    def stale(self) -> bool:
        """Whether something that the methods read has changed, so that tracing again may give another rule."""
        return captures_changed(self.tensors, self.scalars, self.guards)

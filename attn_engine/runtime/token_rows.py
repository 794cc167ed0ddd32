"""A token's functions on torch tensors, for many tokens at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from attn_engine.ir.expr import Expr, Var
from attn_engine.ir.linear import BETA, D_IDX, DV_IDX, KEY, QUERY, T_IDX, VALUE, LinearProgram, decay_var
from attn_engine.ir.ops import Number
from attn_engine.ir.program import BATCH, HEAD
from attn_engine.runtime.dense import evaluate_all
from attn_engine.runtime.linear_inputs import LinearInputs

# Where each axis of the result is in the layout of runtime/dense.py.
_PLACES = {"q": 2, "d": 4, "dv": 5}


class TokenRows:
    """Evaluates expressions of the tokens `tokens` (positions, in the order of the recurrence) of a group of
    sequences, in `dtype`; differentiable. with_inputs=False: of positions, captured tensors and numbers alone."""

    def __init__(
        self,
        program: LinearProgram,
        inputs: LinearInputs,
        batches: slice,
        tokens: Tensor,
        dtype: torch.dtype,
        with_inputs: bool = True,
    ) -> None:
        self.program, self.inputs, self.dtype = program, inputs, dtype
        self.count, self.batches = len(tokens), batches
        self.environment: dict[Var, Tensor | Number] = {v: inputs.scalars[v.name] for v in program.scalars}
        device, heads = inputs.q.device, inputs.heads

        def along(place: int, values: Tensor) -> Tensor:
            return values.to(device).view([-1 if i == place else 1 for i in range(6)])

        rows = batches.stop - batches.start
        self.shape = (rows, heads)
        self.environment |= {
            BATCH: along(0, torch.arange(batches.start, batches.stop)),
            HEAD: along(1, torch.arange(heads)),
            T_IDX: along(2, tokens),
            D_IDX: along(4, torch.arange(inputs.q.shape[3])),
            DV_IDX: along(5, torch.arange(inputs.v.shape[3])),
        }
        if with_inputs:
            self._give_inputs(tokens)

    def _give_inputs(self, tokens: Tensor) -> None:
        program, inputs = self.program, self.inputs
        for var, x in ((QUERY, inputs.q), (KEY, inputs.k), (VALUE, inputs.v), (BETA, inputs.beta)):
            if x is not None:
                self.give(var, self._of_tokens(x, tokens))
        if inputs.decay is not None:
            given = decay_var(program.decay_given)
            decay = inputs.decay
            self.give(given, decay[None] if decay.ndim == 1 else self._of_tokens(decay, tokens))

    def _of_tokens(self, x: Tensor, tokens: Tensor) -> Tensor:
        x = x[self.batches].index_select(2, tokens.to(x.device))
        heads = self.inputs.heads
        return x if x.shape[1] in (heads, 0) else x.repeat_interleave(heads // x.shape[1], dim=1)

    def give(self, var: Var, x: Tensor) -> None:
        """Set a variable to x: (batch, head), then the variable's axes."""
        shape = [*x.shape[:2], 1, 1, 1, 1]
        for axis, size in zip(var.axes, x.shape[2:], strict=True):
            shape[_PLACES[axis]] = size
        self.environment[var] = x.to(self.dtype).reshape(shape)

    def values(self, wanted: Sequence[tuple[Expr, tuple[str, ...]]]) -> list[Tensor]:
        """Each expression as (batch, head), then the axes named beside it."""
        sizes = {"q": self.count, "d": self.inputs.q.shape[3], "dv": self.inputs.v.shape[3]}
        tensors: Mapping[str, Tensor] = self.inputs.captured
        found = evaluate_all(tuple(e for e, _ in wanted), self.environment, tensors, self.dtype)
        done: list[Tensor] = []
        for x, (_, axes) in zip(found, wanted, strict=True):
            full = [*self.shape, 1, 1, 1, 1]
            for axis in axes:
                full[_PLACES[axis]] = sizes[axis]
            x = x.to(self.dtype).expand(full)
            done.append(x.reshape(*self.shape, *(sizes[axis] for axis in axes)))
        return done
